#!/usr/bin/env bash
# Stage 1 on PASCAL-5i, fold 0: batch 8 on one GPU.
#   DATA_PATH=VOC2012 RESTORE_PATH=resnet50_v2.pth bash scripts/train_voc_fold0_base.sh [flags of train_base.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base_stage voc 8 --snapshot-dir "${SAVE_DIR:-$ROOT/runs/voc_fold${FOLD:-0}_base}" "$@"
