#!/usr/bin/env bash
# Collects wheels of what Espalier needs, for a machine that has torch and no package index.
#
#   bash launch/offline_wheels.sh --out wheels --python 3.12              # where there is an index
#   python3.12 -m pip install --no-index --no-deps wheels/*.whl           # on the other machine
#   python3.12 -m pip check                                               # there: what else it lacks; name that, too:
#   bash launch/offline_wheels.sh --out wheels --python 3.12 sentencepiece xxhash
#
# By itself it takes what machines with torch commonly lack: deepspeed, megatron-core, pydantic, rich and what these
# bring, zstandard, a filelock that is new enough, and liger-kernel (which wants the triton of a torch for CUDA).
# Versions are those of constraints.txt. DeepSpeed is on no index as a wheel: it is built here from its source, without
# compiled operators, and fits any Python.
#
#   --out DIR          folder for the wheels, made if it is missing
#   --python VERSION   Python of the other machine, such as 3.12 (default: this one's)
#
# Variables: ESPALIER_PYTHON and ESPALIER_INDEX as in launch/environment.sh.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
packages=(megatron-core pydantic pydantic_core annotated-types typing-inspection typing_extensions hjson py-cpuinfo zstandard liger-kernel
    filelock rich markdown-it-py mdurl pygments)

refuse() {
    echo "error: $*" >&2
    exit 2
}

out="" version=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --out | --python)
        [ $# -ge 2 ] && [ -n "$2" ] || refuse "$1 needs a value: see bash launch/offline_wheels.sh --help"
        if [ "$1" = --out ]; then out="$2"; else version="$2"; fi
        shift 2
        ;;
    -*) refuse "$1 is not an option of launch/offline_wheels.sh: see bash launch/offline_wheels.sh --help" ;;
    *)
        packages+=("$1")
        shift
        ;;
    esac
done
[ -n "$out" ] || refuse "--out is missing: name a folder for the wheels"
case "$version" in "" | 3.[0-9]*) ;; *) refuse "--python is $version: give a version such as 3.12" ;; esac

python="${ESPALIER_PYTHON:-python3}"
common=(--quiet --disable-pip-version-check --no-deps --constraint "$root/constraints.txt")
[ -z "${ESPALIER_INDEX:-}" ] || export PIP_INDEX_URL="$ESPALIER_INDEX" # it may hold a password, which others see in a command line
"$python" -m pip download "${common[@]}" --dest "$out" --only-binary :all: ${version:+--python-version "$version"} "${packages[@]}"
DS_BUILD_OPS=0 "$python" -m pip wheel "${common[@]}" --wheel-dir "$out" deepspeed
du -ch "$out"/*.whl
