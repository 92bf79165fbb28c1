#!/usr/bin/env bash
# Keeps a run going: starts it again after a fault, from its newest checkpoint.
#
#   bash launch/supervise.sh deepspeed --num_gpus 8 pretrain/train.py --config FILE run.folder=runs/x
#   bash launch/supervise.sh --wait 30 --attempts 5 deepspeed --hostfile hosts pretrain/train.py --config FILE
#
# Everything else: launch/supervise.py. Variables: launch/environment.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh" "" # or it would take this script's arguments for its own
exec "$espalier_python" "$root/launch/supervise.py" "$@"
