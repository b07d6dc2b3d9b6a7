"""Core files: one of a process that crashes would hold the secret and the records, outside of `private/`."""

from __future__ import annotations

import resource


def forbid_core_files() -> None:
    """Let neither this process nor those it starts from now on leave a core file, whatever the shell allows.

    The limit is 1 byte, which is too little for any file. Where the kernel pipes cores to a handler, it does so at any
    limit, 0 included, but for 1, which means no (Linux, fs/coredump.c).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else 1  # only root could raise it again
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
