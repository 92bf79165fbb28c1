#!/usr/bin/env bash
# Runs the checks and the tests, setting up the environment first where needed.
#
#   bash tests/run.sh                          ruff, mypy, import contracts, and all tests of the default suite
#   bash tests/run.sh tests/model -k factored  only pytest, with these arguments
#   bash tests/run.sh -m "slow or matrix"      the tests that the default suite leaves out
#
# The exit code is 0 if everything passed. Variables: see launch/environment.sh.
set -euo pipefail

if [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh --test

# One thread per process, nothing from or to the network but the loopback interface.
export OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
export MASTER_ADDR=127.0.0.1
if [ "$(uname -s)" = Linux ]; then
    export GLOO_SOCKET_IFNAME=lo
fi

if [ $# -gt 0 ]; then
    exec "$espalier_python" -m pytest "$@"
fi

status=0
echo "ruff check"
"$espalier_python" -m ruff check . || status=1
echo "ruff format"
"$espalier_python" -m ruff format --check --quiet . || {
    echo "some files are not formatted: run ruff format"
    status=1
}
echo "mypy"
"$espalier_python" -m mypy || status=1
echo "import contracts"
"$espalier_python" -c "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))" ||
    status=1
echo "pytest"
# Whole files to each of two processes, which keep workers of their own (tests/support/distributed.py).
"$espalier_python" -m pytest --numprocesses 2 --dist loadfile || status=1
exit $status
