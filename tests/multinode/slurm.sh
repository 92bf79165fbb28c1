#!/usr/bin/env bash
# Submits launch/slurm.sbatch for real, to a Slurm of one node on this machine that is made for it and taken down again.
#
#   bash tests/multinode/slurm.sh
#
# Needs root; installs slurm-wlm and munge with apt-get where they are missing. Where that cannot be, it says why it skips,
# and ends with 0. The job gets SIGUSR1 in mid-run, saves, goes back into the queue by itself, and ends in its second life.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root"
steps=40

skip() {
    echo "slurm: skipped, since $*"
    exit 0
}

fail() {
    echo "slurm: $*" >&2
    tail -n 40 "$work"/*.log >&2
    exit 1
}

[ "$(id -u)" = 0 ] || skip "starting Slurm takes root"
if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y slurm-wlm munge; } >/dev/null 2>&1 ||
        skip "slurm-wlm cannot be installed"
fi
! pgrep -x slurmctld >/dev/null || skip "a Slurm runs on this machine already"
# shellcheck source=launch/environment.sh
source launch/environment.sh --test

work="$(mktemp -d /tmp/espalier_slurm_XXXXXX)"
host="$(hostname -s)"
cat >"$work/slurm.conf" <<CONF
ClusterName=espalier
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MinJobAge=300
KillWait=60
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=trial Nodes=$host Default=YES State=UP
CONF
export SLURM_CONF="$work/slurm.conf"
mkdir -p "$work/state" "$work/spool" /run/munge
pgrep -x munged >/dev/null || { chown munge: /run/munge && runuser -u munge -- /usr/sbin/munged; }
end() {
    scancel --user root 2>/dev/null || true
    for name in slurmd slurmctld; do
        [ ! -f "$work/$name.pid" ] || kill "$(cat "$work/$name.pid")" 2>/dev/null || true
    done
    sleep 1
    rm -rf "$work"
}
trap end EXIT
slurmctld -f "$SLURM_CONF" >"$work/start.log" 2>&1 || skip "slurmctld does not start: $(tail -n 1 "$work/start.log")"
slurmd -f "$SLURM_CONF" >>"$work/start.log" 2>&1 || skip "slurmd does not start: $(tail -n 1 "$work/start.log")"
for _ in $(seq 60); do
    [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || break
    sleep 0.5
done
[ "$(sinfo -h -o %T)" = idle ] || skip "the node of this Slurm is $(sinfo -h -o %T) and not idle"

PYTHONPATH="$root" "$espalier_python" - "$work" "$steps" <<'PYTHON'
import sys
from pathlib import Path

from tests.support.training_runs import make_corpus, write_config

work, steps = Path(sys.argv[1]), int(sys.argv[2])
make_corpus(work / "corpus")
settings = {
    "train": {"steps": steps, "micro_batch": 4, "global_batch": 8, "log_every": 1, "validate_every": 0},
    "parallel": {"tensor": 2},
    "rank": {"schedule": [{"step": 8, "rank": 6}]},
    "checkpoint": {"every": 10},
}
write_config(work / "run.yaml", work / "corpus", work / "run", **settings)
PYTHON
export GLOO_SOCKET_IFNAME=lo ESPALIER_SLOTS=2
began=$SECONDS
job="$(sbatch --parsable --output "$work/job.log" launch/slurm.sbatch --config "$work/run.yaml")"
wait_for() { # text seconds
    for _ in $(seq "$2"); do
        ! grep -qF "$1" "$work/job.log" 2>/dev/null || return 0
        sleep 1
    done
    fail "the job never said '$1'"
}
wait_for "step 1/$steps" 240
echo "slurm: submission to the end of the first step: $((SECONDS - began)) s"
wait_for "step 12/$steps" 120
scancel --signal=USR1 --batch "$job" # as Slurm does when the time is nearly up
wait_for "error: SIGUSR1: saved at step" 120
grep -F "error: SIGUSR1" "$work/job.log"
signalled=$SECONDS
wait_for "[resume] step" 600
grep -F "[resume] step" "$work/job.log"
echo "slurm: SIGUSR1 to the resumed run: $((SECONDS - signalled)) s"
wait_for "step $steps/$steps" 240
for _ in $(seq 60); do
    state="$(scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')"
    [ "$state" != COMPLETED ] || break
    sleep 1
done
[ "$state" = COMPLETED ] || fail "the job is $state and not COMPLETED"
echo "slurm: all as it should be, after $(scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') restart"
