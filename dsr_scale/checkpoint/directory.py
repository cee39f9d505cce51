"""Checkpoint directories by step: which exist, which is newest, which may go.

    <run>/checkpoints/step_00000300/         complete: .metadata, __RANK_0.distcp, run_state.json
    <run>/checkpoints/step_00000400.partial  an unfinished save; named in the log, never loaded
    <run>/checkpoints/step_00000200.damaged  failed its checksums at a resume, which left it behind

A save is written under the `.partial` name and renamed when everything is on disk, so a killed
save can never become the newest. `run_state.json` is written last. It lists every other file with
its checksum and ends the chain with one of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.section import Section

RUN_STATE_FILE = "run_state.json"
PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
DAMAGED_SUFFIX = ".damaged"
FORMAT = 2
"""Of run_state.json and of the tensors' names."""
_STEP = re.compile(r"step_(\d+)")


class DamagedError(InputError):
    """A file of a checkpoint is not what was saved."""


def checkpoints_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def step_directory(run_directory: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` optimizer steps."""
    return checkpoints_directory(run_directory) / f"step_{step:08d}"


def complete_steps(run_directory: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    entries = checkpoints_directory(run_directory).glob("step_*")
    return sorted(int(entry.name.removeprefix("step_")) for entry in entries if _complete(entry))


def partial_saves(run_directory: Path) -> list[Path]:
    """Saves and removals that were cut off: everything that is neither complete nor set aside."""
    entries = sorted(checkpoints_directory(run_directory).glob("step_*"))
    return [entry for entry in entries if not _complete(entry) and entry.suffix != DAMAGED_SUFFIX]


def _complete(entry: Path) -> bool:
    return bool(_STEP.fullmatch(entry.name)) and (entry / RUN_STATE_FILE).is_file()


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


def write_run_state(
    checkpoint: Path, run_state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes the file that makes a checkpoint complete; `files` are all others by name."""
    # Through JSON once, so that what is summed is what a reader will see: string keys, lists.
    content = json.loads(json.dumps({**run_state, "format": FORMAT, "files": files}))
    content["checksum"] = _checksum(content)
    atomic_files.write_bytes(checkpoint / RUN_STATE_FILE, _rendered(content))


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The run state saved with a checkpoint.

    Raises DamagedError when a byte of it differs from what was written, InputError when it is of
    another format.
    """
    path = checkpoint / RUN_STATE_FILE
    try:
        written = path.read_bytes()
        state = json.loads(written)
        intact = isinstance(state, dict)
    except FileNotFoundError as error:
        raise _damaged(checkpoint, "it is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, str(error)) from error
    if not intact:
        raise _damaged(checkpoint, "it holds no run state")
    if "checksum" in state or state.get("format") == FORMAT:
        expected = _checksum({key: value for key, value in state.items() if key != "checksum"})
        # The text is compared as well: a changed blank changes no value.
        if state.get("checksum") != expected or written != _rendered(state):
            raise _damaged(checkpoint, "its checksum differs")
    if state.get("format") != FORMAT:
        raise InputError(
            found=f"format {state.get('format')} in {path}",
            required=f"format {FORMAT}",
            remedy="use the version of dsr-scale that the run was trained with",
        )
    return state


SectionT = TypeVar("SectionT", bound=Section)


def saved_section(checkpoint: Path, kind: type[SectionT], content: object) -> SectionT:
    """A part of the run state of `checkpoint` as this version's section.

    Raises InputError for what another version saved, or a run that trains something else.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(
            found=f"{RUN_STATE_FILE} in {checkpoint} has no {kind.__name__} of this version: {error}",
            required="a checkpoint of this version of dsr-scale, of a run that this command is for",
            remedy="use the version that the run was trained with, or name another run",
        ) from error


def _damaged(checkpoint: Path, reason: str) -> DamagedError:
    return DamagedError(
        found=f"{checkpoint / RUN_STATE_FILE} is damaged: {reason}",
        required="the file as it was saved",
        remedy=f"remove {checkpoint}; the checkpoint before it is used then",
    )


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _rendered(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it neither counts as one nor is lost."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED_SUFFIX)
    if aside.exists():
        shutil.rmtree(aside)
    atomic_files.rename(checkpoint, aside)
    return aside


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
