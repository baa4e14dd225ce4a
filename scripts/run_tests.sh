#!/usr/bin/env bash
# Set up the environment and run the whole test suite, a process per core; further flags go to pytest.
#   bash scripts/run_tests.sh [-k NAME ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
ruff check .
# the tests write many checkpoints, each flushed to disk: into memory, where it has room for them
if [ "$(df -Pm /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')" -gt 8000 ] 2>/dev/null; then
    export TMPDIR=/dev/shm
fi
# threads beside processes would only get in each other's way
export OMP_NUM_THREADS=1
exec python -m pytest --numprocesses auto --dist loadfile "$@"
