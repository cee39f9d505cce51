"""Saving a run and going on with it.

The newest complete checkpoint wins; unfinished saves are named in the log and never loaded. What
comes back is bit-identical to never having stopped, on the same machine and number of ranks.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dsr_scale.checkpoint import directory, tensors
from dsr_scale.train.build import Training
from dsr_scale.train.state import RunState, check_resumable, library_versions


def run_state(
    training: Training, *, step: int, corrupt_seen: int, tracker_run_id: str | None
) -> RunState:
    """The state after `step` finished steps."""
    return RunState(
        step=step,
        samples_seen=step * training.batches.global_images,
        corrupt_seen=corrupt_seen,
        data_fingerprint=training.samples.fingerprint,
        data_samples=len(training.samples),
        config=training.run.model_dump(mode="json"),
        model_shape=training.shape.model_dump(mode="json"),
        timestep_shift=training.timestep_shift,
        tracker_run_id=tracker_run_id,
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
    if training.ranks.is_first:
        directory.remove_old(
            run_directory,
            keep_last=training.run.checkpoint.keep_last,
            keep_every_steps=training.run.checkpoint.keep_every_steps,
        )
    return target


def restore(training: Training, console: Console) -> RunState:
    """The state to start from: of the newest complete checkpoint, or of step 0.

    Raises InputError when the checkpoint belongs to another network, data set or seed.
    """
    run_directory = Path(training.run.directory)
    for partial in directory.partial_saves(run_directory):
        console.print(f"[yellow]unfinished save {partial} is ignored[/yellow]")
    fresh = run_state(training, step=0, corrupt_seen=0, tracker_run_id=None)
    steps = directory.complete_steps(run_directory)
    if not steps:
        return fresh
    checkpoint = directory.step_directory(run_directory, steps[-1])
    saved = RunState.from_json(directory.read_run_state(checkpoint))
    check_resumable(saved, fresh)
    tensors.load(checkpoint, training.engine.shapes(), training.engine.restore)
    training.engine.restore_step_count(saved.step)
    console.print(f"resumed from {checkpoint} at step {saved.step}")
    return saved
