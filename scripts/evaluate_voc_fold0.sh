#!/usr/bin/env bash
# Evaluate PASCAL-5i, fold 0, at the masks' original size.
#   DATA_PATH=VOC2012 RESTORE_PATH=runs/voc_fold0_1shot bash scripts/evaluate_voc_fold0.sh [flags of test.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluation voc "$@"
