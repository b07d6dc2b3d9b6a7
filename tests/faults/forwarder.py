"""Carries IP packets between two network namespaces: `forwarder.py PID PID`, each a process that lives in one.

It makes a TUN device in each, and copies what comes out of one into the other. Standard input says what to do with it:
`pass`, `drop`, or `lose PERCENT`. It ends with its input.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LONGEST = 65536


def tun_in_namespace_of(pid: int, address: str) -> int:
    """A TUN device there; its descriptor works from everywhere. This process moves to that namespace."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    subprocess.run(["ip", "address", "add", f"{address}/24", "dev", "tun0"], check=True)
    subprocess.run(["ip", "link", "set", "tun0", "up"], check=True)
    return tun


def main() -> None:
    tuns = [tun_in_namespace_of(int(pid), f"10.99.0.{n}") for n, pid in enumerate(sys.argv[1:3], 1)]
    other = {tuns[0]: tuns[1], tuns[1]: tuns[0]}
    print("ready", flush=True)
    lost = 0.0
    while True:
        ready, _, _ = select.select([*tuns, sys.stdin], [], [])
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            lost = {"pass": 0.0, "drop": 1.0}.get(line.strip(), -1.0)
            lost = float(line.split()[1]) / 100 if lost < 0 else lost
            print(line.strip(), flush=True)
        for tun in tuns:
            if tun in ready:
                packet = os.read(tun, _LONGEST)
                if random.random() >= lost:
                    os.write(other[tun], packet)


if __name__ == "__main__":
    main()
