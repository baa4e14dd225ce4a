#!/usr/bin/env bash
# Stage 1 on COCO-20i, fold 0: batch 16 on four GPUs (NPROC).
#   DATA_PATH=COCO RESTORE_PATH=resnet50_v2.pth bash scripts/train_coco_fold0_base_q.sh [flags of train_base.py]
set -euo pipefail
NPROC=${NPROC:-4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base_stage coco 16 --snapshot-dir "${SAVE_DIR:-$ROOT/runs/coco_fold${FOLD:-0}_base}" "$@"
