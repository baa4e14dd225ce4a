#!/usr/bin/env bash
# Train on two "hosts": network namespaces joined by a virtual cable. One host's processes are killed and started again.
# Needs root and iproute2; embedded data, CPU, some minutes.
#   bash tests/two_hosts.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-$(mktemp -d)}
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=pop
# a new store for each rendezvous: hosts that start again must not find the old one
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

clean_up() {
    for host in 1 2; do
        ip netns pids "pop$host" 2>/dev/null | xargs -r kill -9 || true
        ip netns del "pop$host" 2>/dev/null || true
    done
}
trap clean_up EXIT
clean_up
ip netns add pop1
ip netns add pop2
ip link add pop netns pop1 type veth peer name pop netns pop2
for host in 1 2; do
    ip netns exec "pop$host" ip addr add "10.77.0.$host/24" dev pop
    ip netns exec "pop$host" ip link set pop up
    ip netns exec "pop$host" ip link set lo up
done

train() { # HOST FOLDER: this host's part of the run
    ip netns exec "pop$1" python -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --max-restarts 3 \
        --rdzv_backend c10d --rdzv_id pop --rdzv_endpoint 10.77.0.1:29400 --local_addr "10.77.0.$1" \
        --rdzv_conf "is_host=$((2 - $1))" \
        train_base.py --dataset shapes --data-dir "$work/shapes" --backbone resnet18 --os 32 --input-size 65,65 \
        --base-size 65,65 --num-workers 0 --restore-from none --num-epoch 6 --batch-size 16 --fix-bn \
        --print-frequency 1 --save-every-steps 5 --snapshot-dir "$2" >"$work/host$1.log" 2>&1
}

python - "$work/shapes" <<'PYTHON'
import sys
from dataset.shapes import make_shapes
make_shapes(sys.argv[1], seed=1, train_images=120, val_images=8)
PYTHON

echo "== both hosts, uninterrupted"
train 1 "$work/whole" & first=$!
train 2 "$work/whole" & second=$!
wait $first
wait $second

echo "== both hosts, the second one's processes are killed in epoch 2 and started again"
train 1 "$work/killed" & first=$!
train 2 "$work/killed" & second=$!
until grep -qs 'epoch 2/6 step 2/' "$work/killed/log.txt"; do sleep 0.2; done
ip netns pids pop2 | xargs kill -9
wait $second || true
echo "killed; starting the second host again"
train 2 "$work/killed" & second=$!
wait $first
wait $second
grep -h 'resumed' "$work/killed/log.txt"
python - "$work" <<'PYTHON'
import sys
from pathlib import Path
import torch
whole, killed = (torch.load(Path(sys.argv[1]) / run / 'last.pth', weights_only=True)['model'] for run in ('whole', 'killed'))
same = all(torch.equal(whole[key], killed[key]) for key in whole)
print('same weights' if same else 'WEIGHTS DIFFER')
sys.exit(not same)
PYTHON
