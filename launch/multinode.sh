#!/usr/bin/env bash
# Trains on the hosts of a hostfile, through deepspeed and pdsh (or OpenMPI), from one of them.
#
#   bash launch/multinode.sh --hostfile hosts --config FILE run.folder=/shared/runs/x
#   bash launch/multinode.sh --hostfile hosts --config FILE --supervise run.folder=/shared/runs/x
#   bash launch/multinode.sh --hostfile hosts --config FILE --launcher openmpi run.folder=/shared/runs/x
#   bash launch/multinode.sh --hostfile hosts --config FILE --dry-run      (shows the commands, starts nothing)
#
# hosts:   node1 slots=8
#          node2 slots=8
#
# Needs: ssh without a password from this host to all of them, this one included; pdsh or OpenMPI here; this checkout and
# its environment at the same path everywhere. Everything else: launch/multinode.py. Variables: launch/environment.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh" "" # or it would take this script's arguments for its own
exec "$espalier_python" "$root/launch/multinode.py" "$@"
