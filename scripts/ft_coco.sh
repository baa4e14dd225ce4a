#!/usr/bin/env bash
# Stage 2 on COCO-20i, fold 0, SHOT images per novel class (1), three seeds.
#   DATA_PATH=COCO RESTORE_PATH=runs/coco_fold0_base bash scripts/ft_coco.sh [flags of ft_pop.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
novel_stage coco --snapshot-dir "${SAVE_DIR:-$ROOT/runs/coco_fold${FOLD:-0}_${SHOT:-1}shot}" "$@"
