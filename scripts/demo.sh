#!/usr/bin/env bash
# Run both stages and the evaluation on embedded data, then teach one more class; minutes on a CPU. Prints tables and
# writes pictures.
#   bash scripts/demo.sh
set -euo pipefail
if [ $# -gt 0 ]; then
    echo "usage: bash scripts/demo.sh (no arguments; deletes runs/demo and starts anew)" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt
cd "$ROOT"

trap 'echo "the demo starts from the beginning each time" >&2' INT TERM
run=runs/demo
rm -rf "$run"
data=(--dataset shapes --data-dir data/shapes --fold 0)
network=(--backbone resnet18 --os 16 --base-size "97,97" --test-batch-size 10 --fp16)
training=(--input-size "97,97" --print-frequency 10)

echo "== stage 1: base classes"
python train_base.py "${data[@]}" "${network[@]}" "${training[@]}" --restore-from none --snapshot-dir "$run/base" \
    --batch-size 16 --learning-rate 1e-2 --num-epoch 5 --val-every 5
echo "== few-shot lists"
python -m utils.gen_fs_list --dataset shapes --data-dir data/shapes --fold 0 --shot 5 --seed 123 234
echo "== stage 2: novel classes, 5 shots, two seeds"
python ft_pop.py "${data[@]}" "${network[@]}" "${training[@]}" --restore-from "$run/base" --snapshot-dir "$run/5shot" \
    --shot 5 --random-seed 123,234 --batch-size 4 --num-epoch 6 --val-every 2 --fix-lr --update-base
echo "== evaluation"
python test.py "${data[@]}" "${network[@]}" --restore-from "$run/5shot" --shot 5 --random-seed 123,234 --overlay 4
echo "== a class of one's own, from five photographs with masks"
python -m dataset.shapes --support "$run/photographs" --class-name "plain disc"
python -m utils.teach --restore-from "$run/base" --support "$run/photographs" --out "$run/taught" --fp16
python -m utils.predict --restore-from "$run/taught" --images data/shapes/JPEGImages/val_0000.jpg \
    --save-path "$run/segmented"
