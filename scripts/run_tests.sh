#!/usr/bin/env bash
# Set up the environment and run the whole test suite; further flags go to pytest.
#   bash scripts/run_tests.sh [-k NAME ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
ruff check .
exec python -m pytest "$@"
