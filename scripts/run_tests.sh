#!/usr/bin/env bash
# Set up the environment, then check style, imports and behaviour; one test process per core. Flags go to pytest.
#   bash scripts/run_tests.sh                  everything, as CI does
#   bash scripts/run_tests.sh -m "not slow"    quick: without the tests that take long and rarely break
#   bash scripts/run_tests.sh -k NAME          some tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements-dev.txt
cd "$ROOT"
ruff check .
lint-imports --no-logo --no-cache
# the tests write many checkpoints and flush each to disk, so they use memory where there is enough, and give it back
if [ -z "${TMPDIR:-}" ] && [ "$(df -Pm /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')" -gt 8000 ] 2>/dev/null; then
    TMPDIR=$(mktemp -d /dev/shm/pop-tests.XXXXXX)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
fi
# each test process runs one thread, since there are as many processes as cores
export OMP_NUM_THREADS=1
python -m pytest --numprocesses auto --dist loadfile "$@"
