"""Networks of one machine that can be broken: network namespaces, joined by a forwarder that can stop forwarding.

Everything here lives by a pipe to this process: whatever ends it, the namespaces end too, and with them their devices.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Run in a new namespace: names the host by its own address, since Gloo listens where the host's name leads.
_HOLD = 'hostname "$0" && ip link set lo up && echo ready && exec cat >/dev/null'
_HERE = Path(__file__).parent


@dataclass
class Host:
    """A host with nothing but a loopback device, held by a process."""

    holder: subprocess.Popen[str]

    @property
    def enter(self) -> list[str]:
        """What to put before a command so that it runs on this host, under the same process id."""
        return enter(self.holder.pid)

    def cut(self) -> None:
        """Take the loopback device down: every packet vanishes, no connection is told."""
        subprocess.run([*self.enter, "ip", "link", "set", "lo", "down"], check=True)


@dataclass
class Pair:
    """Two hosts, and the link between them."""

    hosts: list[Host]
    forwarder: subprocess.Popen[str]

    def launch(self, argv: Sequence[str]) -> list[str]:
        """The real launcher with one rank on each host."""
        return [sys.executable, str(_HERE / "nodes.py"), *(str(host.holder.pid) for host in self.hosts), "--", *argv]

    def link(self, command: str) -> None:
        """`pass`, `drop`, or `lose PERCENT` of the packets from now on."""
        assert self.forwarder.stdin is not None
        assert self.forwarder.stdout is not None
        self.forwarder.stdin.write(f"{command}\n")
        self.forwarder.stdin.flush()
        assert self.forwarder.stdout.readline().strip() == command


def enter(pid: int) -> list[str]:
    """The command that enters the network and the host name of a process."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net", f"--uts=/proc/{pid}/ns/uts"]


@contextlib.contextmanager
def held(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that says `ready` and lasts until its standard input ends; Ctrl-C is not for it, as it cleans up."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", f"{command[0]} failed"
            yield process
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(30)


@contextlib.contextmanager
def one_host(name: str = "localhost") -> Iterator[Host]:
    """A host of its own for a job."""
    with held(["unshare", "--net", "--uts", "sh", "-c", _HOLD, name]) as holder:
        yield Host(holder)


@contextlib.contextmanager
def two_hosts() -> Iterator[Pair]:
    """A host for each rank, with real IP packets between them."""
    with one_host("10.99.0.1") as first, one_host("10.99.0.2") as second:
        pids = [str(host.holder.pid) for host in (first, second)]
        with held([sys.executable, str(_HERE / "forwarder.py"), *pids]) as forwarder:
            yield Pair([first, second], forwarder)


def can_be_made() -> str | None:
    """Why no namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode != 0:
        return "this kernel or container lets nobody make network namespaces"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    return None
