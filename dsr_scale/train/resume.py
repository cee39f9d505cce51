"""Saving a run and going on with it.

The newest complete checkpoint wins; unfinished saves are named in the log and never loaded. What
comes back is bit-identical to never having stopped, on the same machine and number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from dsr_scale.checkpoint import directory, tensors
from dsr_scale.train.build import Training
from dsr_scale.train.state import RunState, check_resumable, library_versions


def fresh_state(
    training: Training,
) -> RunState:
    """The state before the first step."""
    return RunState(
        step=0,
        samples_seen=0,
        skipped_steps=0,
        corrupt_seen=0,
        data_fingerprint=training.samples.fingerprint,
        data_samples=len(training.samples),
        config=training.run.model_dump(mode="json"),
        model_shape=training.shape.model_dump(mode="json"),
        timestep_shift=training.timestep_shift,
        tracker_run_id=None,
        world_size=training.ranks.world_size,
        versions=library_versions(),
    )


def save(training: Training, state: RunState) -> Path:
    """Writes a checkpoint and removes those that are no longer kept. A collective."""
    run_directory = Path(training.run.directory)
    target = directory.step_directory(run_directory, state.step)
    tensors.save(
        target,
        training.engine.full_tensors(),
        state.to_json(),
        group=training.ranks.host_group,
    )
    training.ranks.on_first(
        lambda: directory.remove_old(
            run_directory,
            keep_last=training.run.checkpoint.keep_last,
            keep_every_steps=training.run.checkpoint.keep_every_steps,
        )
    )
    return target


def restore(training: Training, console: Console) -> RunState:
    """The state to start from: of the newest complete checkpoint, or of step 0.

    Raises InputError when the checkpoint belongs to another network, data set or seed.
    """
    run_directory = Path(training.run.directory)
    fresh = fresh_state(training)
    # One rank looks: on a shared file system others may still see yesterday's listing.
    found = training.ranks.on_first(lambda: _newest(run_directory, fresh, console))
    if found is None:
        return fresh
    checkpoint, content = found
    saved = RunState.from_json(content)
    tensors.load(checkpoint, training.engine.shapes(), training.engine.restore)
    training.engine.restore_step_count(saved.step - saved.skipped_steps)
    console.print(f"resumed from {checkpoint} at step {saved.step}")
    return saved


def _newest(
    run_directory: Path, fresh: RunState, console: Console
) -> tuple[Path, dict[str, Any]] | None:
    for partial in directory.partial_saves(run_directory):
        console.print(f"unfinished save {partial} is ignored", style="yellow", markup=False)
    steps = directory.complete_steps(run_directory)
    if not steps:
        return None
    checkpoint = directory.step_directory(run_directory, steps[-1])
    content = directory.read_run_state(checkpoint)
    check_resumable(RunState.from_json(content), fresh)
    return checkpoint, content
