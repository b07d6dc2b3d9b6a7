"""Orbax checkpoints: parameters, optimizer, accountant state and the run's decisions, in one atomic save."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dpdist.errors import InputError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, used by all its processes together.

    Args:
        directory: `checkpoints/` of the run.
        keep: how many of the newest are kept.
        timeout: seconds an asynchronous save may take before it counts as failed.
        read_only: for looking at a run; nothing is made or deleted.
    """

    def __init__(self, directory: Path, *, keep: int = 1, timeout: int = 300, read_only: bool = False) -> None:
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(timeout_secs=timeout),
            ),
        )

        # Orbax asks JAX about preemption too, with a count of its own: `preempted` would miss the notice.
        self._manager.reached_preemption = lambda step: False

    def latest(self) -> int | None:
        """The newest committed step. Depends on the file system: let process 0 decide."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin saving `state` (copied off the devices before this returns) and `meta` (JSON) as `step`."""
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def committed(self, step: int) -> bool:
        """True where `step` is safely on disk: Orbax renames a checkpoint to its final name when it is whole."""
        return (self.directory / str(step)).is_dir()

    def wait(self) -> None:
        """Until every save begun is committed; an error of a save is raised here."""
        self._manager.wait_until_finished()

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
            InputError: it cannot be read.
        """
        return self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a checkpoint, with the shapes and shardings of `abstract_state`, on any topology.

        Raises:
            InputError: it cannot be read.
        """
        return self._restore(step, ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))["state"]

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError) as error:
            logger.exception("checkpoint %d of %s", step, self.directory)
            raise InputError(
                str(self.directory / str(step)),
                type(error).__name__,
                "this checkpoint cannot be read (damaged?). Bring it back from a backup, or start a new run: going on "
                "from an older one would draw this run's noise again for other parameters.",
            ) from error

    def close(self) -> None:
        """Finish and release the manager."""
        self._manager.close()
