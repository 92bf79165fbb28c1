#!/usr/bin/env bash
# Sets up the Python environment of this checkout, once; a second call takes well under a second.
#
#   bash launch/environment.sh [--test]     makes or completes .venv; --test adds what the checks and tests need
#   source launch/environment.sh [--test]   the same, and then uses it: `python`, `deepspeed` and `tensorboard` are its own
#
# Variables:
#   ESPALIER_PYTHON=/path/to/python3.12     the Python to build .venv with (3.11 or newer; by default the first one found)
#   ESPALIER_INDEX=URL                      the package index to install from
#   ESPALIER_USE_CURRENT_PYTHON=1           no .venv and no installation: what is installed for python3 (or ESPALIER_PYTHON)
#
# Without an NVIDIA GPU torch is installed as its CPU-only build, if the index has that.

espalier_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    bash "$espalier_root/launch/environment.sh" "$@" || return 1
    if [ "${ESPALIER_USE_CURRENT_PYTHON:-}" = 1 ] || [ ! -f "$espalier_root/setup.py" ]; then
        espalier_python="$(command -v "${ESPALIER_PYTHON:-python3}")"
        export PYTHONPATH="$espalier_root${PYTHONPATH:+:$PYTHONPATH}"
    else
        espalier_python="$espalier_root/.venv/bin/python"
        export VIRTUAL_ENV="$espalier_root/.venv"
        export PATH="$VIRTUAL_ENV/bin:$PATH"
        # The default folder is shared by all environments of a user, and each would compile DeepSpeed's operator anew.
        export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
        unset PYTHONHOME
    fi
    return 0
fi

set -euo pipefail

venv="$espalier_root/.venv"
stamp="$venv/espalier_installed"

fail() {
    echo "error: $*" >&2
    exit 1
}

say() {
    echo "environment: $*"
}

require_compiler() {
    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        fail "no C++ compiler is found, and DeepSpeed compiles a small operator at its first use: install g++ (on Debian: build-essential)"
}

require_headers() { # python
    [ -f "$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
        fail "$1 has no C headers, and DeepSpeed compiles a small operator against them: install its development package (on Debian: python3-dev)"
}

suits() { # python
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${ESPALIER_PYTHON:-}" ]; then
        suits "$ESPALIER_PYTHON" || fail "ESPALIER_PYTHON=$ESPALIER_PYTHON is not a Python of 3.11 or newer: name another one"
        python="$ESPALIER_PYTHON"
    else
        python=""
        for candidate in python3.11 python3.12 python3.13 python3 python; do
            if suits "$candidate"; then
                python="$candidate"
                break
            fi
        done
        [ -n "$python" ] || fail "no Python of 3.11 or newer is found: install one, or name one with ESPALIER_PYTHON=/path/to/python3.11"
    fi
    require_headers "$python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv package (on Debian: python3-venv)"
}

# Scripts in a virtual environment hold its path, so one that was moved or copied along with the checkout is of no use.
venv_is_usable() {
    local reported own
    reported="$("$venv/bin/pip" --version 2>/dev/null | sed -n 's/^pip [^ ]* from \(.*\) (python.*$/\1/p')"
    for own in "$venv"/lib/python3*/site-packages/pip; do
        [ "$reported" -ef "$own" ] && suits "$venv/bin/python" && return 0
    done
    return 1
}

pip_install() { # an index may hold a password, which others see in a command line
    ${ESPALIER_INDEX:+env "PIP_INDEX_URL=$ESPALIER_INDEX"} "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "$@"
}

# The pinned torch first: as a mere dependency of others it would bring several GB of CUDA packages to every machine.
install_torch() {
    local version complaint
    version="$(sed -n 's/^torch==//p' "$espalier_root/constraints.txt")"
    if "$venv/bin/python" -c "import sys; from importlib.metadata import version; sys.exit(version('torch').split('+')[0] != '$version')" 2>/dev/null; then
        return
    fi
    if [ "$(uname -s)" = Linux ] && ! { nvidia-smi -L 2>/dev/null | grep -q GPU; }; then
        say "installing torch $version for the CPU"
        if complaint="$(pip_install "torch==$version+cpu" 2>&1)"; then
            return
        fi
        case "$complaint" in
        *"No matching distribution"* | *ResolutionImpossible*) ;; # the latter where pip has constraints of its own
        *)
            echo "$complaint" >&2
            fail "torch $version could not be installed"
            ;;
        esac
        say "the package index has no CPU-only torch $version: installing the full one, with several GB of CUDA packages"
    else
        say "installing torch $version"
    fi
    pip_install "torch==$version" || fail "torch $version could not be installed"
}

# Compiled here once rather than by all processes of the first run together.
compile_operator() {
    # A compilation that was killed leaves its lock, and torch waits for it without end.
    rm -f "${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"/{,*/}*/lock
    PATH="$venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}" "$venv/bin/python" -c '
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
if builder is not None and builder.is_compatible():
    builder.load(verbose=False)
' >"$venv/espalier_compile.log" 2>&1 || {
        cat "$venv/espalier_compile.log" >&2
        fail "DeepSpeed's communication operator could not be compiled"
    }
}

extras=base
case "${1:-}" in
"") ;;
--test) extras=test ;;
-h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
*)
    echo "error: $1 is not an option of launch/environment.sh: see bash launch/environment.sh --help" >&2
    exit 2
    ;;
esac

if [ "${ESPALIER_USE_CURRENT_PYTHON:-}" = 1 ] || [ ! -f "$espalier_root/setup.py" ]; then # the latter: an installed copy
    current="${ESPALIER_PYTHON:-python3}"
    suits "$current" || fail "$current is not a Python of 3.11 or newer: name one with ESPALIER_PYTHON"
    require_compiler
    "$current" "$espalier_root/launch/installed_packages.py"
    exit 0
fi

fingerprint="$(cat "$espalier_root/constraints.txt" "$espalier_root/setup.py" <(echo "$espalier_root") | cksum)"
if [ -f "$stamp" ]; then
    { read -r installed_fingerprint && read -r installed_extras; } <"$stamp" || true
    if [ "${installed_fingerprint:-}" = "$fingerprint" ] && [ -x "$venv/bin/python" ] &&
        { [ "${installed_extras:-}" = test ] || [ "$extras" = base ]; }; then
        exit 0
    fi
    [ "${installed_extras:-}" != test ] || extras=test # what was there stays up to date
fi

began=$SECONDS
require_compiler
if ! venv_is_usable; then
    find_python
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
install_torch
say "installing the other packages"
if [ "$extras" = test ]; then
    pip_install -c "$espalier_root/constraints.txt" -e "$espalier_root[test]" || fail "the packages could not be installed"
else
    pip_install -c "$espalier_root/constraints.txt" -e "$espalier_root" || fail "the packages could not be installed"
fi
say "compiling DeepSpeed's communication operator"
compile_operator
printf '%s\n%s\n' "$fingerprint" "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready after $((SECONDS - began)) s"
