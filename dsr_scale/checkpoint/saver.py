"""Saving a run while it goes on: every rank writes what it owns, one directory appears.

    start()   pieces → host buffer          the only part that the training loop waits for
    thread    buffer → <step>.partial/      each rank its file, flushed and summed on the way
              run_state.json, rename        rank 0, once every rank's file is on disk
    wait()    the outcome                   the same on every rank

Nothing is gathered: a rank needs host memory for its own share of weights, moments and EMA, taken
once and kept for the next save. The alternative, writing from the live state, would stop training
for the whole write.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dsr_scale.base import atomic_files
from dsr_scale.base.boxes import Piece
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.checkpoint.agreement import (
    FailedTogetherError,
    described,
    on_first,
    place,
    together,
)
from dsr_scale.checkpoint.checksums import SummingFileSystem
from dsr_scale.checkpoint.planners import PiecesSavePlanner


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, from a thread of its own on every rank.

    `group` is a gloo group of all ranks that nothing else uses: its messages are sent from the
    thread. A single process may pass None.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._buffer = torch.empty(0)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.last_write_s: float | None = None
        """Seconds from `start` to the complete checkpoint, of the newest that was finished."""
        # Said by a save without collectives. Filters belong to the process, not to the thread.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def start(
        self,
        target: Path,
        pieces: Iterable[Piece],
        run_state: Mapping[str, Any],
        on_committed: Callable[[], object] | None = None,
    ) -> float:
        """Copies the pieces, begins to write the checkpoint `target`, and returns. A collective.

        Returns the seconds the caller was held up: by the copy, and by an earlier save that was
        still being written. `on_committed` is called on rank 0, in the thread, once `target` is
        complete. Raises InputError on every rank when the earlier save failed.
        """
        began = time.perf_counter()
        self.wait()
        held = self._copy(list(pieces))
        # No daemon: a program that ends lets the save end.
        self._thread = threading.Thread(
            target=self._run,
            args=(target, held, copy.deepcopy(dict(run_state)), on_committed, began),
            name="checkpoint",
        )
        self._thread.start()
        return time.perf_counter() - began

    def poll(self) -> bool:
        """Whether a save has failed; `wait` says how. Never waits and never raises."""
        return self._failure is not None

    def wait(self) -> None:
        """Waits for the running save.

        Raises InputError on every rank when it failed on one, RuntimeError when a rank is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _copy(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with their values in host memory."""
        needed = sum(piece.box.numel for piece in pieces)
        devices = {piece.tensor.device for piece in pieces if piece.tensor.is_cuda}
        if needed > self._buffer.numel():
            # The old buffer goes before the new one comes.
            self._buffer = torch.empty(0)
            self._buffer = torch.empty(needed, dtype=torch.float32, pin_memory=bool(devices))
        memory = self._buffer.numpy()
        held = []
        start = 0
        for piece in pieces:
            assert piece.tensor.dtype == torch.float32, piece.name
            stop = start + piece.box.numel
            values = piece.tensor.detach().reshape(-1)
            self._buffer[start:stop].copy_(values, non_blocking=True)
            # By way of numpy the view has a storage of its own size: torch.save writes storages
            # whole, and DCP would copy every piece again to make one.
            held.append(piece._replace(tensor=torch.from_numpy(memory[start:stop])))
            start = stop
        for device in devices:
            torch.cuda.synchronize(device)
        return held

    def _run(
        self,
        target: Path,
        held: list[Piece],
        run_state: dict[str, Any],
        on_committed: Callable[[], object] | None,
        began: float,
    ) -> None:
        try:
            save(target, held, run_state, group=self._group)
            self.last_write_s = time.perf_counter() - began
            if on_committed is not None:
                _after(target, on_committed, self._group)
        except InputError as error:
            self._failure = error
        # Of a bug, or a peer that is gone, the loop must hear as well; a person can do nothing there.
        except BaseException as error:
            reason = f"the checkpoint {target} could not be written: {described(error)}"
            self._failure = RuntimeError(reason)
            self._failure.__cause__ = error


def save(
    target: Path,
    pieces: Iterable[Piece],
    run_state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None,
) -> None:
    """Writes the checkpoint `target` from pieces in host memory, or leaves none. A collective.

    Another complete checkpoint of that name is kept until this one is whole. Raises InputError on
    every rank when the disk of one is full or refuses.
    """
    rank, _ = place(group)
    partial = target.with_name(target.name + directory.PARTIAL_SUFFIX)
    try:
        on_first(lambda: _make_empty(partial), group)
        written = together(lambda: _write_tensors(partial, pieces, group), group)
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        on_first(lambda: _commit(partial, target, run_state, files), group)
    except (InputError, FailedTogetherError) as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = error.found if isinstance(error, InputError) else str(error)
        raise _failed(target, reason, error) from error


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(
    partial: Path, pieces: Iterable[Piece], group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Writes this rank's file, and on rank 0 DCP's metadata; their sizes and checksums by name."""
    # A copy-ahead is for tensors on a GPU; it would open a context on GPU 0 in every rank.
    storage = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
    storage.fs = summing = SummingFileSystem()
    dcp.save(
        {},
        storage_writer=storage,
        planner=PiecesSavePlanner(pieces),
        process_group=group,
        # Alone there is nobody to agree with; and after a save that agreed through gloo, steps on 2
        # CPU cores took 137 ms instead of 98 for the rest of the run (why is not known).
        no_dist=place(group)[1] == 1,
    )
    return summing.written


def _commit(
    partial: Path, target: Path, run_state: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    directory.write_run_state(partial, run_state, files)
    replaced = target.with_name(target.name + directory.REPLACED_SUFFIX)
    if target.exists():
        target.replace(replaced)
    atomic_files.rename(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _failed(target: Path, reason: str, cause: BaseException) -> InputError:
    error = InputError(
        found=f"the checkpoint {target} could not be written: {reason}",
        required="room for the whole checkpoint, and permission to write it",
        remedy="free space or change the permissions; start again with the same command, "
        "which goes on from the last complete checkpoint",
    )
    error.__cause__ = cause
    return error


def _after(
    target: Path, on_committed: Callable[[], object], group: dist.ProcessGroup | None
) -> None:
    try:
        on_first(on_committed, group)
    except FailedTogetherError as error:
        raise InputError(
            found=f"{target} is complete, but old checkpoints could not be removed: {error}",
            required="permission to remove them",
            remedy="remove them by hand, then start again with the same command",
        ) from error
