#!/usr/bin/env bash
# Evaluate COCO-20i, fold 0, at the masks' original size.
#   DATA_PATH=COCO RESTORE_PATH=runs/coco_fold0_1shot bash scripts/evaluate_coco_fold0.sh [flags of test.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluation coco "$@"
