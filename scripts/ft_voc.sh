#!/usr/bin/env bash
# Stage 2 on PASCAL-5i, fold 0, SHOT images per novel class (1), three seeds.
#   DATA_PATH=VOC2012 RESTORE_PATH=runs/voc_fold0_base bash scripts/ft_voc.sh [flags of ft_pop.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
novel_stage voc --snapshot-dir "${SAVE_DIR:-$ROOT/runs/voc_fold${FOLD:-0}_${SHOT:-1}shot}" "$@"
