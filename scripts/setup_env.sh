# Source this: afterwards `python` is one that satisfies requirements.txt, and $ROOT is the project's folder.
# The active environment is used as it is where it satisfies them; otherwise .venv is made and filled, once.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_satisfied() { "$1" "$ROOT/scripts/check_requirements.py" >/dev/null 2>&1; }

_make_venv() {
    local candidate base=
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "error: no Python >= 3.10 found; install one and run this again" >&2
        return 1
    fi
    echo "this Python lacks: $(python "$ROOT/scripts/check_requirements.py" 2>&1 | paste -sd ' ')"
    echo "installing the requirements into $ROOT/.venv (several GB and minutes the first time)"
    "$base" -m venv "$ROOT/.venv" || {
        echo "error: $base cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2
        return 1
    }
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
}

if ! _satisfied python; then
    if ! _satisfied "$ROOT/.venv/bin/python"; then
        _make_venv || exit 1
        _satisfied "$ROOT/.venv/bin/python" || {
            echo "error: $ROOT/.venv still lacks: $("$ROOT/.venv/bin/python" "$ROOT/scripts/check_requirements.py" 2>&1)" >&2
            exit 1
        }
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
fi
