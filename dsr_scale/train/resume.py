"""Saving a run and going on with it, on the same ranks or on others.

The newest complete and undamaged checkpoint wins; what is unfinished or damaged is named in the log
and never loaded. What comes back is bit-identical to never having stopped on the same ranks, and
equal up to rounding on any others: each rank writes and reads its own part of every tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dsr_scale.checkpoint import directory, tensors
from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.checkpoint.verification import newest_verified
from dsr_scale.train.started import Started
from dsr_scale.train.state import RunState, check_resumable, library_versions


def fresh_state(training: Started) -> RunState:
    """The state before the first step."""
    ranks = training.ranks
    return RunState(
        step=0,
        samples_seen=0,
        skipped_steps=0,
        skipped_in_a_row=0,
        guard=tuple(training.engine.guard.statistics.tolist()),
        corrupt_seen=0,
        data_fingerprint=training.samples.fingerprint,
        data_samples=len(training.samples),
        config=training.run.model_dump(mode="json"),
        model_shape=training.shape.model_dump(mode="json"),
        timestep_shift=training.timestep_shift,
        tracker_run_id=None,
        layout={
            "tp": ranks.tensor.size,
            "pp": ranks.pipeline.size,
            "dp": ranks.data.size,
            "zero": training.run.parallel.zero,
        },
        versions=library_versions(),
    )


def start_save(training: Started, state: RunState, writer: CheckpointWriter) -> float:
    """Begins to write a checkpoint; older ones go when it is complete. A collective.

    Returns the seconds that the caller was held up.
    """
    run_directory = Path(training.run.directory)
    settings = training.run.checkpoint
    return writer.start(
        directory.step_directory(run_directory, state.step),
        training.engine.pieces(owned=True),
        state.to_json(),
        on_committed=lambda: directory.remove_old(
            run_directory,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
        ),
    )


def restore(training: Started, console: Console) -> RunState:
    """The state to start from: of the newest good checkpoint, or of step 0. A collective.

    Raises InputError when the checkpoint belongs to another network, data set or objective.
    """
    fresh = fresh_state(training)
    ranks, engine = training.ranks, training.engine
    found = newest_verified(
        Path(training.run.directory),
        ranks.host_group if ranks.world_size > 1 else None,
        lambda message: console.print(message, style="yellow", markup=False, soft_wrap=True),
    )
    if found is None:
        return fresh
    checkpoint, content = found
    saved = RunState.from_json(content)
    check_resumable(saved, fresh)
    ranks.on_first(lambda: tensors.check_fits(checkpoint, training.checkpoint_shapes()))
    tensors.load_pieces(checkpoint, engine.pieces(owned=False))
    engine.refresh(applied_steps=saved.step - saved.skipped_steps)
    engine.guard.statistics.copy_(torch.tensor(saved.guard, dtype=torch.float64))
    console.print(f"resumed from {checkpoint} at step {saved.step}", soft_wrap=True)
    return replace(
        fresh,
        step=saved.step,
        samples_seen=saved.samples_seen,
        skipped_steps=saved.skipped_steps,
        skipped_in_a_row=saved.skipped_in_a_row,
        guard=saved.guard,
        corrupt_seen=saved.corrupt_seen,
        tracker_run_id=saved.tracker_run_id,
    )
