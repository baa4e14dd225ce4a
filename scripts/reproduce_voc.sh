#!/usr/bin/env bash
# The paper's table on PASCAL-5i: all folds, 1, 5 and 10 shots, three seeds.
#   DATA_PATH=VOC2012 RESTORE_PATH=resnet50_v2.pth bash scripts/reproduce_voc.sh [flags of utils.sweep]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
reproduce voc "" --shot 1 5 10 "$@"
