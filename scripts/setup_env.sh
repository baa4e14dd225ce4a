# shellcheck shell=bash
# Source this with the name of a requirements file:
#   source scripts/setup_env.sh requirements.txt
# Afterwards `python` satisfies the file, and $ROOT is the project's folder. The active environment is used as it is
# where it satisfies the file. Otherwise an environment is made and filled, once: in .venv, or in the user's cache
# folder where the project's folder is read-only. An interrupted installation is finished by the next start.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# _satisfied PYTHON FILE
_satisfied() { "$1" "$ROOT/scripts/check_requirements.py" "$2" >/dev/null 2>&1; }

# _complete ENV FILE: the environment satisfies the file, and no installation is under way
_complete() { [ ! -e "$1/.incomplete" ] && _satisfied "$1/bin/python" "$2"; }

# _new_enough PYTHON: it runs and is supported
_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# _lacking PYTHON FILE: print in one line what PYTHON lacks
_lacking() {
    if ! command -v "$1" >/dev/null; then
        echo "there is no $1"
    elif ! _new_enough "$1"; then
        echo "Python >= 3.10 (found $("$1" --version 2>&1))"
    else
        "$1" "$ROOT/scripts/check_requirements.py" "$2" 2>&1 | paste -sd ';' - | sed 's/;/; /g'
    fi
}

# _base_python: print the Python that environments are made from
_base_python() {
    local candidate
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if _new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.10 found; install one and run the same command again" >&2
    return 1
}

# _writable ENV: the environment can be made or changed
_writable() { if [ -e "$1" ]; then [ -w "$1" ]; else [ -w "$(dirname "$1")" ]; fi; }

# _cache_env: print the folder of the environment for a read-only project folder
_cache_env() {
    local cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
    if [ -z "$cache" ] || ! mkdir -p "$cache" 2>/dev/null || [ ! -w "$cache" ]; then
        echo "error: $ROOT is read-only, and so is the cache folder '$cache'; set XDG_CACHE_HOME to a folder with" \
            "several GB of space" >&2
        return 1
    fi
    echo "$cache/pop-$(printf %s "$ROOT" | cksum | cut -d ' ' -f 1)"
}

# _lock PYTHON: hold the lock on file descriptor 9 until it is closed. The lock belongs to the descriptor, so it
# outlives the Python process that takes it; macOS has no flock command.
_lock() {
    "$1" -c '
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("another set-up is running; waiting until it is done", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
' || echo "warning: this file system has no locks; do not start a second set-up before this one is done" >&2
}

# _make_env PYTHON ENV: an empty environment with pip
_make_env() {
    local log pip_folder
    log=$("$1" -m venv --clear "$2" 2>&1) && return
    # Debian's Python without the package python3-venv cannot put pip into an environment, but it may have pip itself
    log+=$'\n'$("$1" -m venv --clear --without-pip "$2" 2>&1) &&
        pip_folder=$("$1" -c 'import pip; print(pip.__path__[0] + "/..")' 2>/dev/null) &&
        log+=$'\n'$(PYTHONPATH=$pip_folder _pip "$2" install --ignore-installed pip 2>&1) &&
        return
    printf '%s\n' "$log" >&2
    echo "error: $1 cannot make the virtual environment $2; on Debian and Ubuntu run: apt-get install python3-venv" >&2
    return 1
}

# _pip ENV ARGUMENT...
_pip() {
    local python=$1/bin/python
    shift
    "$python" -m pip --quiet --disable-pip-version-check "$@"
}

# _install ENV FILE [--headless]: install what the file lists, with the OpenCV that can be imported on this machine
_install() {
    local env=$1 file=$2
    shift 2
    # distributions of OpenCV share one folder: the one that cannot be imported has to go first
    if ! "$env/bin/python" -c 'import cv2' >/dev/null 2>&1; then
        _pip "$env" uninstall --yes opencv-python opencv-python-headless opencv-contrib-python \
            opencv-contrib-python-headless >/dev/null 2>&1 || true
    fi
    "$env/bin/python" "$ROOT/scripts/check_requirements.py" --list "$@" "$file" >"$env/requirements.txt" &&
        _pip "$env" install --requirement "$env/requirements.txt"
}

# _fill PYTHON ENV FILE: start or finish the installation; PYTHON makes the environment
_fill() {
    local base=$1 env=$2 file=$3
    if [ -e "$env/.incomplete" ]; then
        echo "finishing the interrupted installation in $env"
    else
        echo "installing $(basename "$file") into $env (several GB and minutes the first time)"
    fi
    if ! _new_enough "$env/bin/python" || ! _pip "$env" --version >/dev/null 2>&1; then
        _make_env "$base" "$env" || return 1
    fi
    touch "$env/.incomplete"
    if ! _install "$env" "$file"; then
        echo "error: pip could not install the requirements (see above); run the same command again to continue" >&2
        return 1
    fi
    # libraries other than libGL.so.1 may be missing too
    if ! _satisfied "$env/bin/python" "$file"; then
        _install "$env" "$file" --headless || return 1
    fi
    if ! _satisfied "$env/bin/python" "$file"; then
        echo "error: $env still lacks: $(_lacking "$env/bin/python" "$file"); delete that folder and run the same" \
            "command again" >&2
        return 1
    fi
    rm "$env/.incomplete"
}

# _setup_env FILE
_setup_env() {
    local file=$ROOT/$1 env=$ROOT/.venv base done=
    if _satisfied python "$file"; then return; fi
    if ! _writable "$env" && ! _complete "$env" "$file"; then env=$(_cache_env) || return 1; fi
    if ! _complete "$env" "$file"; then
        base=$(_base_python) || return 1
        echo "the active Python lacks: $(_lacking python "$file")"
        if [ "$env" != "$ROOT/.venv" ]; then echo "$ROOT is read-only; the environment goes to $env"; fi
        exec 9>"$env.lock" || return 1
        _lock "$base"
        # another set-up may have done it meanwhile
        if _complete "$env" "$file" || _fill "$base" "$env" "$file"; then done=1; fi
        exec 9>&-
        [ -n "$done" ] || return 1
        echo "the environment is ready: $env"
    fi
    export PATH="$env/bin:$PATH"
}

_setup_env "${1:?a requirements file, e.g. requirements.txt}"
