#!/usr/bin/env bash
# The paper's table on COCO-20i: all folds, 1 and 5 shots, three seeds; `best` is selected on 2,000 images.
# Stage 1 uses four GPUs (NPROC).
#   DATA_PATH=COCO RESTORE_PATH=resnet50_v2.pth bash scripts/reproduce_coco.sh [flags of utils.sweep]
set -euo pipefail
NPROC=${NPROC:-4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce coco "--val-limit 2000" --shot 1 5 "$@"
