"""Orbax checkpoints: parameters, optimizer, accountant state and the run's decisions, in one atomic save.

Built on Orbax's `AsyncCheckpointer` and not on its `CheckpointManager`, which caches the list of steps and reports a
failed save only after it has waited for the other processes. Here the directory is the only source of truth.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpdist.errors import InputError
from dpdist.run.integrity import META, STATE, array_handler, damage, is_intact, sealed

logger = logging.getLogger(__name__)

#: In the name of every directory that Orbax has not finished, or that we are deleting.
_UNFINISHED = ".orbax-checkpoint-tmp"


class SaveFailedError(RuntimeError):
    """A checkpoint could not be saved. The older ones are whole.

    Args:
        step: of the checkpoint.
        path: where it was to go.
        reason: e.g. `No space left on device`.
        newest: the newest committed step.
    """

    def __init__(self, step: int, path: Path, reason: str, newest: int | None) -> None:
        self.step, self.path, self.reason, self.newest = step, path, reason, newest
        whole = "there is no whole checkpoint" if newest is None else f"the newest whole checkpoint is step {newest}"
        full = reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
        remedy = "free space and run the same command again" if full else "mend that and run the same command again"
        super().__init__(f"step {step} could not be saved in {path}: {reason}; {remedy}; {whole}.")


class Checkpoints:
    """The checkpoints of one run, used by all its processes together.

    Where a save fails, `check`, `wait`, `save` and `close` raise at once on the processes it failed on, and on the
    others after `timeout`, unless the job has ended by then. No further save is possible.

    Args:
        directory: `checkpoints/` of the run.
        keep: how many of the newest are kept.
        timeout: seconds an asynchronous save may take before it counts as failed.
        read_only: create and delete nothing.
    """

    def __init__(self, directory: Path, *, keep: int = 1, timeout: int = 300, read_only: bool = False) -> None:
        self.directory = directory.absolute()
        self._keep, self._timeout = keep, timeout
        self._main = jax.process_index() == 0
        self._background: threading.Thread | None = None
        self._saving: int | None = None
        self._failure: SaveFailedError | None = None

        # Given the active processes, Orbax's barriers go through the coordination service, with a limit of 300 s;
        # otherwise they are device collectives, which wait for ever.
        together = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())), barrier_sync_key_prefix="dpdist"
        )
        # If Orbax fails to create directories in the background, its threads wait 300 s for them.
        asynchronous = ocp.AsyncOptions(timeout_secs=timeout, create_directories_asynchronously=False)
        composite = ocp.CompositeOptions(multiprocessing_options=together, async_options=asynchronous)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=composite, **{STATE: array_handler(), META: ocp.JsonCheckpointHandler()}
            ),
            async_options=asynchronous,
            multiprocessing_options=together,
        )
        if self._main and not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()

    def steps(self) -> list[int]:
        """Committed steps, ascending. Depends on the file system: let process 0 decide."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def latest(self) -> int | None:
        """The newest committed step. Depends on the file system: let process 0 decide."""
        return max(self.steps(), default=None)

    def committed(self, step: int) -> bool:
        """Whether `step` is whole and would survive a loss of power. For process 0.

        Orbax renames a checkpoint to its final name when it is whole, but synchronises nothing.
        """
        if step == self._saving and self.busy():
            return False
        failed = self._failure is not None and self._failure.step == step  # it may have its name and not be on disk
        return self._path(step).is_dir() and not failed

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin to save `state` (copied off the devices before this returns) and `meta` (JSON) as `step`. Collective.

        Process 0, which alone writes `meta`, adds digests of the state and of `meta` itself.

        Raises:
            SaveFailedError: this save could not begin, or the one before it has failed.
            ValueError: there is a checkpoint of `step`.
        """
        self.wait()
        seal = sealed(meta, state) if self._main else {}
        items = {STATE: ocp.args.PyTreeSave(state), META: ocp.args.JsonSave(seal)}
        try:
            self._checkpointer.save(self._path(step), args=ocp.args.Composite(**items))
        except (OSError, jax.errors.JaxRuntimeError) as error:
            self._fail(step, error)
            self.check()
        self._saving = step
        self._background = threading.Thread(target=self._finish, args=(step,), name="dpdist-checkpoint")
        self._background.start()

    def synchronise(self, step: int) -> None:
        """fsync a checkpoint's files and directories. For process 0.

        Raises:
            OSError: one of them cannot be synchronised.
        """
        whole = self._path(step)
        for path in [*whole.rglob("*"), whole, self.directory]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def busy(self, patience: float = 0.0) -> bool:
        """Wait up to `patience` s; return whether a save is still running on this process."""
        if self._background is not None:
            self._background.join(patience)
        return self._background is not None and self._background.is_alive()

    def check(self) -> None:
        """Raise the error of a background save, if there is one; never waits.

        Raises:
            SaveFailedError: a save has failed.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until the running save is committed.

        Raises:
            SaveFailedError: it has failed.
        """
        if self._background is not None:
            self._background.join()
        self.check()

    def verify(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in words that quote nothing of it; None where it is whole.

        For process 0 alone, before all processes restore together: it waits for nobody, and reads the whole state.
        """
        return damage(self._path(step))

    def set_aside(self, step: int, to: Path) -> Path:
        """Move a checkpoint into the directory `to`, under a new name, so that it no longer counts. For process 0.

        Raises:
            OSError: it cannot be moved there.
        """
        to.mkdir(parents=True, exist_ok=True)
        names = (f"{step}" if number == 0 else f"{step}-{number}" for number in range(len(list(to.iterdir())) + 1))
        target = next(to / name for name in names if not (to / name).exists())
        return self._path(step).rename(target)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint, read by this process alone.

        Raises:
            InputError: it cannot be read, or is not what was saved.
        """
        try:
            meta = ocp.JsonCheckpointHandler().restore(self._path(step) / META)
        except Exception as error:  # a damaged file makes its parser raise anything
            raise self._unreadable(step, type(error).__name__) from error
        if not is_intact(meta):
            raise self._unreadable(step, "not what was saved")
        return meta

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a checkpoint, with the shapes and shardings of `abstract_state`, on any topology.

        `verify` it first: this does not compare it with its digest, as only process 0 needs to hold all of it.

        Raises:
            InputError: it cannot be read.
        """
        placed = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        return self._restore(step, STATE, ocp.args.PyTreeRestore(abstract_state, restore_args=placed))

    def close(self) -> None:
        """Wait for the running save, and release what Orbax holds.

        Raises:
            SaveFailedError: the last save has failed.
        """
        try:
            self.wait()
        except SaveFailedError:
            with contextlib.suppress(Exception):  # Orbax's pending writes fail for the same reason
                self._checkpointer.close()
            raise
        self._checkpointer.close()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _restore(self, step: int, item: str, args: Any) -> Any:
        self.wait()
        try:
            return self._checkpointer.restore(self._path(step), args=ocp.args.Composite(**{item: args}))[item]
        except (OSError, ValueError, KeyError) as error:
            logger.exception("checkpoint %d of %s", step, self.directory)
            raise self._unreadable(step, type(error).__name__) from error

    def _unreadable(self, step: int, value: str) -> InputError:
        return InputError(
            str(self._path(step)),
            value,
            "this checkpoint cannot be read (damaged?). Bring back this checkpoint alone; or train the run again: it "
            "goes on from the one before, as a new incarnation.",
        )

    def _finish(self, step: int) -> None:
        """On the background thread: wait for the commit, fsync it, and only then delete older checkpoints."""
        try:
            self._checkpointer.wait_until_finished()
            if self._main:
                self.synchronise(step)
        except BaseException as error:
            self._fail(step, error)
            return
        if self._main:
            try:
                self._delete_older(step)
            except OSError:  # the next save will try again
                logger.exception("an old checkpoint in %s could not be deleted", self.directory)

    def _fail(self, step: int, error: BaseException) -> None:
        logger.error("checkpoint %d of %s", step, self.directory, exc_info=error)
        if self._main:
            self._remove_unfinished()  # half a checkpoint must not fill a disk that others need
        self._failure = SaveFailedError(step, self._path(step), self._reason(error), self.latest())

    def _reason(self, error: BaseException) -> str:
        """The operating system's message for an error; of others only the type, as their messages may quote data."""
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        for cause in chain:
            code = re.search(r"os_error_code='(\d+)'", str(cause))  # TensorStore has no exception type for it
            number = int(code[1]) if code else getattr(cause, "errno", None)
            if number is not None:
                return os.strerror(number)
        if any(isinstance(cause, TimeoutError) for cause in chain):
            return f"not done after {self._timeout} s, or it has failed on another process"
        return type(error).__name__

    def _delete_older(self, newest: int) -> None:
        """Delete all but the newest `keep` checkpoints, of those up to `newest`, which has just been committed."""
        for step in [step for step in self.steps() if step <= newest][: -self._keep]:
            # Renamed first: a kill in between leaves no partial checkpoint under a name that counts.
            shutil.rmtree(self._path(step).rename(self.directory / f"{step}{_UNFINISHED}-deleted"))

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
