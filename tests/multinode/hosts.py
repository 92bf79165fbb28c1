"""Hosts on one machine: network namespaces with addresses, host names and sshd of their own, joined by a switch.

    with network(2) as hosts:
        hosts[0].run(["ssh", "host2", "hostname"])

They share the file system, as nodes share a run folder. Names are known to all by a hosts file that is mounted over
`/etc/hosts` inside the namespaces alone. Needs root, iproute2, openssh-server.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUBNET = "198.51.100"  # of RFC 5737, for documentation


@dataclass(frozen=True)
class Host:
    """A host, and how to do things in it."""

    name: str
    namespace: str
    address: str
    folder: Path
    """Keys and settings of ssh, which all hosts share."""

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` there: own network, own host name, own /etc/hosts."""
        inside = f'hostname {self.name}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            inside,
            "sh",
            *command,
        ]

    def environment(self) -> dict[str, str]:
        """Environment with an `ssh` that knows the keys, and gloo on the host's own interface."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ESPALIER_", "MASTER_"))}
        return kept | {"PATH": f"{self.folder}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "wire"}

    def start(self, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command in the background; its output goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                self.command(command), env={**self.environment(), **environment}, stdout=file, stderr=subprocess.STDOUT
            )

    def cut(self, down: bool = True) -> None:
        """Takes the host's link down, as if somebody had pulled the cable."""
        _ip("-n", self.namespace, "link", "set", "wire", "down" if down else "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Makes `count` hosts, `host1` and so on, and removes them whatever happens."""
    switch, servers = f"espalier_{os.getpid()}_switch", []
    with tempfile.TemporaryDirectory(prefix="espalier_hosts_") as name:
        folder = Path(name)
        hosts = [Host(f"host{n}", f"espalier_{os.getpid()}_{n}", f"{SUBNET}.{n}", folder) for n in range(1, count + 1)]
        _write_settings(folder, hosts)
        Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants, and only a system that starts it makes
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for host in hosts:
                _join(host, switch)
                command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
                servers.append(host.start(command, folder / f"{host.name}.sshd", {}))
            _wait_for(hosts)
            yield hosts
        finally:
            for server in servers:
                server.terminate()
                server.wait()
            for namespace in (*(host.namespace for host in hosts), switch):
                subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _join(host: Host, switch: str) -> None:
    _ip("netns", "add", host.namespace)
    pair = ["link", "add", "wire", "netns", host.namespace, "type", "veth"]
    _ip(*pair, "peer", "name", host.name, "netns", switch)
    _ip("-n", switch, "link", "set", host.name, "master", "bridge")
    _ip("-n", switch, "link", "set", host.name, "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "wire")
    for interface in ("lo", "wire"):
        _ip("-n", host.namespace, "link", "set", interface, "up")


def _write_settings(folder: Path, hosts: Sequence[Host]) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        # The second name is what launch/kubernetes.yaml gives its pods.
        + "".join(f"{host.address} {host.name} espalier-{n}.espalier\n" for n, host in enumerate(hosts)),
        encoding="utf-8",
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPermitRootLogin yes\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nMaxStartups 50\n",
        encoding="utf-8",
    )
    (folder / "ssh_config").write_text(
        f"Host host*\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n  LogLevel ERROR\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  ServerAliveInterval 5\n  ServerAliveCountMax 2\n",
        encoding="utf-8",
    )
    ssh = folder / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    ssh.chmod(0o755)
    folder.chmod(0o711)


def _wait_for(hosts: Sequence[Host]) -> None:
    for host in hosts:
        end = time.monotonic() + 20.0
        probe = hosts[0].command(["ssh", host.name, "true"])
        while subprocess.run(probe, env=hosts[0].environment(), capture_output=True, check=False).returncode:
            if time.monotonic() > end:
                raise RuntimeError(f"no sshd on {host.name}: {(host.folder / f'{host.name}.sshd').read_text()}")
            time.sleep(0.2)
