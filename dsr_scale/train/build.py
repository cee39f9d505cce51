"""From a run file to everything a run needs, cheapest checks first.

The order is the order of cost: config arithmetic, output directory, data index, encoders, network,
ZeRO. What a person got wrong is found before the expensive part, on every rank alike.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.config.checks import check_run
from dsr_scale.config.derive import (
    BatchArithmetic,
    ModelShape,
    batch_arithmetic,
    model_shape,
    timestep_shift,
)
from dsr_scale.config.model import ClassConditioning
from dsr_scale.config.run import RunConfig
from dsr_scale.data.loader import BatchStream, Samples
from dsr_scale.model.build import build_on_meta
from dsr_scale.model.layers import require_flash
from dsr_scale.parallel.assemble import assemble, make_pipeline
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import ZeroEngine
from dsr_scale.train.feed import Feed
from dsr_scale.train.objective import FlowMatching
from dsr_scale.train.sources import Source, open_source


@dataclass(frozen=True)
class Training:
    """The parts of a started run."""

    run: RunConfig
    ranks: Ranks
    shape: ModelShape
    timestep_shift: float
    batches: BatchArithmetic
    samples: Samples
    feed: Feed
    engine: ZeroEngine


def check_before_start(run: RunConfig, *, processes: int) -> None:
    """All that can be refused without torch.distributed, a GPU or a network weight."""
    check_run(run, devices=processes)
    directory = Path(run.directory)
    atomic_files.require_writable_directory(directory)
    _check_room(run, directory)


def _check_room(run: RunConfig, directory: Path) -> None:
    model = build_on_meta(model_shape(run))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # fp32 weights, two moments, averages; one more save than is kept exists while it is written.
    checkpoint_bytes = 4 * (3 + len(run.training.ema_decays)) * parameters
    existing = len(complete_steps(directory))
    missing = max(1, run.checkpoint.keep_last + 1 - existing)
    free = shutil.disk_usage(directory).free
    if missing * checkpoint_bytes > free:
        raise InputError(
            found=f"{free / 2**30:.1f} GiB free at {directory}, {existing} checkpoints there",
            required=f"{missing * checkpoint_bytes / 2**30:.1f} GiB for {missing} more checkpoints of "
            f"{parameters / 1e6:.1f} M parameters",
            remedy="free space, set another directory=…, or lower checkpoint.keep_last",
        )


def build_training(run: RunConfig, ranks: Ranks) -> Training:
    """Opens data and encoders, builds this rank's part of the network and puts it under ZeRO."""
    shape = model_shape(run)
    if shape.attention == "flash":
        require_flash(ranks.device)
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = run.training.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = run.training.precision == "tf32"
    shift = timestep_shift(run, shape)
    batches = batch_arithmetic(run, ranks.data.size)
    source = open_source(run, ranks)
    feed = Feed(
        FlowMatching(run.diffusion, shift, run.seed),
        ranks,
        batches.accumulation_steps,
        _stream(run, ranks, shape, batches, source),
        source.encoders,
    )
    local = assemble(
        shape, seed=run.seed, ranks=ranks, parallel=run.parallel, training=run.training
    )
    engine = start_zero(
        local,
        make_pipeline(local, ranks, run.parallel),
        run.training,
        run.parallel,
        ranks=ranks,
        accumulation_steps=batches.accumulation_steps,
    )
    return Training(run, ranks, shape, shift, batches, source.samples, feed, engine)


def _stream(
    run: RunConfig, ranks: Ranks, shape: ModelShape, batches: BatchArithmetic, source: Source
) -> BatchStream | None:
    """The batches, on the one rank of a replica that reads."""
    if not ranks.leads_replica:
        return None
    return BatchStream(
        source.samples,
        run.data,
        seed=run.seed,
        global_batch_images=batches.global_images,
        microbatch_images=batches.microbatch_images,
        rank=ranks.data.rank,
        world_size=ranks.data.size,
        num_classes=shape.conditioning.num_classes
        if isinstance(shape.conditioning, ClassConditioning)
        else None,
        encoder=source.rows,
        start_method=source.start_method,
    )


def empty_network(shape: ModelShape, device: torch.device) -> torch.nn.Module:
    """An uninitialised fp32 network of `shape`, to be filled with EMA weights."""
    return build_on_meta(shape).to_empty(device=device).eval().requires_grad_(False)
