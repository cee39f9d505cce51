"""Checkpoint directories by step: which exist, which is newest, which may go.

    <run>/checkpoints/step_00000300/        complete: tensors and run_state.json
    <run>/checkpoints/step_00000400.partial an unfinished save; named in the log, never loaded

A save is written under the `.partial` name and renamed when everything is on disk, so a killed
save can never become the newest.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError

RUN_STATE_FILE = "run_state.json"
PARTIAL_SUFFIX = ".partial"
FORMAT = 1
"""Of run_state.json and of the tensors' names."""
_STEP = re.compile(r"step_(\d+)")


def checkpoints_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def step_directory(run_directory: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` optimizer steps."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def complete_steps(run_directory: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    parent = checkpoints_directory(run_directory)
    if not parent.is_dir():
        return []
    found = []
    for entry in parent.iterdir():
        match = _STEP.fullmatch(entry.name)
        if match and (entry / RUN_STATE_FILE).is_file():
            found.append(int(match[1]))
    return sorted(found)


def partial_saves(run_directory: Path) -> list[Path]:
    """Saves and removals that were cut off: everything that is no complete checkpoint."""
    entries = sorted(checkpoints_directory(run_directory).glob("step_*"))
    return [entry for entry in entries if not (entry / RUN_STATE_FILE).is_file()]


def find_checkpoint(run_directory: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, or the newest complete one. Raises InputError when there is none."""
    steps = complete_steps(run_directory)
    if not steps:
        raise InputError(
            found=f"no complete checkpoint under {checkpoints_directory(run_directory)}",
            required="the run directory of a run that saved at least once",
            remedy="check the path, or train first: dsr-scale train CONFIG",
        )
    if step is None:
        return step_directory(run_directory, steps[-1])
    if step not in steps:
        raise InputError(
            found=f"no complete checkpoint of step {step} under {run_directory}",
            required="one of the steps " + ", ".join(map(str, steps)),
            remedy="choose one of these with --step",
        )
    return step_directory(run_directory, step)


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The run state saved with a checkpoint. Raises InputError when it is damaged or of another format."""
    path = checkpoint / RUN_STATE_FILE
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            found=f"{path} is damaged: {error}",
            required="the file as it was saved",
            remedy=f"remove {checkpoint}; the checkpoint before it is used then",
        ) from error
    if state.get("format") != FORMAT:
        raise InputError(
            found=f"format {state.get('format')} in {path}",
            required=f"format {FORMAT}",
            remedy="use the version of dsr-scale that the run was trained with",
        )
    return state


def remove_old(run_directory: Path, *, keep_last: int, keep_every_steps: int | None) -> list[int]:
    """Removes all but the last `keep_last` checkpoints and the multiples of `keep_every_steps`.

    What an earlier save or removal left unfinished goes as well.
    """
    removed = []
    for leftover in partial_saves(run_directory):
        shutil.rmtree(leftover)
    for step in complete_steps(run_directory)[:-keep_last]:
        if keep_every_steps is None or step % keep_every_steps:
            target = step_directory(run_directory, step)
            # The state file goes first: a removal cut short leaves an incomplete checkpoint.
            (target / RUN_STATE_FILE).unlink()
            shutil.rmtree(target)
            removed.append(step)
    return removed
