#!/usr/bin/env bash
# Trains over two and three hosts of one machine: network namespaces with sshd, launched by launch/multinode.sh.
#
#   bash tests/multinode/run.sh
#
# Needs root; installs openssh-server, pdsh, openmpi-bin and iproute2 with apt-get where they are missing. Where that
# cannot be, it says why it skips, and ends with 0.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root"

skip() {
    echo "multinode: skipped, since $*"
    exit 0
}

[ "$(id -u)" = 0 ] || skip "making network namespaces takes root"
missing=()
for pair in ip:iproute2 sshd:openssh-server pdsh:pdsh ompi_info:openmpi-bin; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || skip "${missing[*]} are not installed, and there is no apt-get"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"; } >/dev/null 2>&1 ||
        skip "${missing[*]} cannot be installed"
fi
# A container may lack the right, or the kernel a module.
ip netns add espalier_trial 2>/dev/null || skip "this system makes no network namespaces"
trial() { ip -n espalier_trial link add "$@" 2>/dev/null; }
{ trial bridge type bridge && trial wire type veth peer name other; } || { ip netns delete espalier_trial; skip "this system makes no bridges or virtual links"; }
ip netns delete espalier_trial
# shellcheck source=launch/environment.sh
source launch/environment.sh --test
export PYTHONPATH="$root"
"$espalier_python" tests/multinode/run.py "$@"
