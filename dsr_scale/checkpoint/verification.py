"""Whether a checkpoint is what was saved, and which is the newest that is.

Every byte of every file is summed and compared, so a flipped one is found before training goes on
from it. The ranks of a job share the files between them; one process reads them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.checkpoint.agreement import on_first, place, together
from dsr_scale.checkpoint.checksums import problem_with

Progress = Callable[[int], object]
"""Hears of every number of bytes read."""


def verify(checkpoint: Path, progress: Progress | None = None) -> list[str]:
    """What is wrong with a checkpoint, by file name; empty when every byte is as it was saved.

    Raises InputError for a checkpoint of another format.
    """
    try:
        state = directory.read_run_state(checkpoint)
    except directory.DamagedError as error:
        return [error.found]
    return verify_shared(checkpoint, state, 0, 1, progress)


def verify_shared(
    checkpoint: Path,
    state: Mapping[str, Any],
    rank: int,
    ranks: int,
    progress: Progress | None = None,
) -> list[str]:
    """Rank's share of `verify`, given the run state; all ranks together read every file once."""
    files: dict[str, dict[str, Any]] = state["files"]
    largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    found = [
        problem_with(checkpoint / name, files[name], progress)
        for name in largest_first[rank::ranks]
    ]
    problems = [problem for problem in found if problem is not None]
    if rank == 0:
        unlisted = {path.name for path in checkpoint.glob("*.distcp")} - files.keys()
        problems += [f"{name} is not listed in the run state" for name in sorted(unlisted)]
    return problems


def newest_verified(
    run_directory: Path,
    group: dist.ProcessGroup | None,
    report: Callable[[str], object],
) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete and undamaged checkpoint with its run state; None where none is complete.

    A collective on `group`, a gloo group of all ranks; a single process may pass None. `report`
    hears, on rank 0, of unfinished saves and of damaged checkpoints, which are set aside once an
    older one is found to go on from. Raises InputError on every rank when all are damaged: to
    start over is for a person to decide.
    """
    rank, _ = place(group)

    def tell(message: str) -> None:
        if rank == 0:
            report(message)

    # One rank looks: on a shared file system others may still see yesterday's listing.
    partial, steps = on_first(
        lambda: (directory.partial_saves(run_directory), directory.complete_steps(run_directory)),
        group,
    )
    for entry in partial:
        tell(f"unfinished save {entry} is ignored")
    damaged: list[Path] = []
    for step in reversed(steps):
        checkpoint = directory.step_directory(run_directory, step)
        state, problems = _verified(checkpoint, group)
        if state is not None and not problems:
            on_first(lambda: [directory.set_aside(entry) for entry in damaged], group)
            return checkpoint, state
        damaged.append(checkpoint)
        for problem in problems:
            tell(f"checkpoint {checkpoint} is damaged and not used: {problem}")
    if damaged:
        raise InputError(
            found=f"{len(damaged)} checkpoints under {run_directory}, all of them damaged",
            required="at least one whose files are as they were saved",
            remedy="restore one from a copy (dsr-scale checkpoint verify names the damaged files), "
            "or start over in another run directory",
        )
    return None


def _verified(
    checkpoint: Path, group: dist.ProcessGroup | None
) -> tuple[dict[str, Any] | None, list[str]]:
    def read() -> tuple[dict[str, Any] | None, list[str]]:
        try:
            return directory.read_run_state(checkpoint), []
        except directory.DamagedError as error:
            return None, [error.found]

    state, problems = on_first(read, group)
    if state is not None:
        rank, ranks = place(group)
        of_ranks = together(lambda: verify_shared(checkpoint, state, rank, ranks), group)
        problems = [problem for of_rank in of_ranks for problem in of_rank]
    return state, problems
