"""A `dpdist` command whose processes are forks of one Python that has imported everything.

Eighty ranks of a SLURM job would spend minutes of two cores on importing JAX eighty times. `fork_server` starts that
Python and makes a command, which passes its arguments, environment, directory and open files to it, forwards the
signals it gets, and ends as the fork ends; a command that is killed takes its fork along.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

#: What a rank runs. It imports next to nothing: eighty of them start at once.
_COMMAND = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(request)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(answers.readline() or "1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def fork_server(directory: Path, environ: Mapping[str, str], *imports: str) -> Iterator[Path]:
    """The command, while the server runs.

    Args:
        directory: a short path, for the command and the server's socket.
        environ: what the server starts with; JAX reads most of its settings as it is imported.
        imports: further modules to import once.
    """
    address, command = directory / "forks.socket", directory / "dpdist"
    command.write_text(_COMMAND.format(python=sys.executable, address=str(address)))
    command.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, str(address), *imports], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield command
    finally:
        server.stdin.close()
        server.wait(30)


def serve(address: str) -> None:
    """Fork for every command that connects, until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(128)
    print("ready", flush=True)
    forks: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.02):
                if key.fileobj is sys.stdin:
                    for pid in forks:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    command, _ = listener.accept()
                    forks[fork(command, listener)] = command
                    selector.register(command, selectors.EVENT_READ)
                else:  # it says nothing more: it has been killed
                    selector.unregister(key.fileobj)
                    for pid, command in forks.items():
                        if command is key.fileobj:
                            os.kill(pid, signal.SIGKILL)
            while forks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                command = forks.pop(ended[0])
                with contextlib.suppress(KeyError):
                    selector.unregister(command)
                with contextlib.suppress(OSError):
                    command.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
                command.close()


def fork(command: socket.socket, listener: socket.socket) -> int:
    """The process id of a fork that does what the command was asked to."""
    head, ancillary, *_ = command.recvmsg(8, socket.CMSG_LEN(3 * array.array("i").itemsize))
    files = array.array("i", ancillary[0][2])
    with command.makefile("rb") as stream:
        argv, environ, directory = json.loads(stream.read(int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        command.close()
        listener.close()
        become(argv, environ, directory, list(files))
    for file in files:
        os.close(file)
    command.sendall(b"%d\n" % pid)
    return pid


def become(argv: list[str], environ: dict[str, str], directory: str, files: list[int]) -> NoReturn:
    """Go on as `dpdist` with these arguments."""
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["dpdist", *argv]

    import dpdist_launch.cli

    end_with(dpdist_launch.cli.main)


def share() -> None:
    """Before the first fork: keep the collector from touching, and so copying, the pages that forks share."""
    gc.collect()
    gc.freeze()


def end_with(main: Callable[[], int]) -> NoReturn:
    """End this fork as a process ends whose last call is `main`, but for taking all its objects apart.

    That would copy every page it shares with the others: seconds of each of eighty forks.
    """
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # tells executors to end their threads, and joins all threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    share()
    serve(sys.argv[1])
