"""From a run file to everything a run needs, cheapest checks first.

The order is the order of cost: config arithmetic, output directory, data index, encoders, network,
ZeRO. What a person got wrong is found before the expensive part, on every rank alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.config import costs, decoder_costs
from dsr_scale.config.checks import check_run
from dsr_scale.config.decoder import DecoderRun, decoder_shape
from dsr_scale.config.derive import (
    BatchArithmetic,
    ModelShape,
    batch_arithmetic,
    model_shape,
    timestep_shift,
)
from dsr_scale.config.model import ClassConditioning
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.data.loader import BatchStream, Samples
from dsr_scale.model.build import build_on_meta
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import require_flash
from dsr_scale.parallel import fragments
from dsr_scale.parallel.assemble import assemble, make_pipeline
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.pipeline import Probes
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import Section, ZeroEngine
from dsr_scale.train.diffusion_measures import DiffusionMeasures
from dsr_scale.train.feed import Feed
from dsr_scale.train.objective import Example, FlowMatching
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
    engine: ZeroEngine[DiT]
    measures: DiffusionMeasures

    @property
    def training_flops(self) -> int:
        """Of one image."""
        return costs.training_flops(self.shape)

    def forward_backward(
        self, examples: Sequence[Example], *, step: int, section: Section, probes: Probes | None
    ) -> Tensor:
        """Gradients of a step; its mean loss over all replicas. Nothing depends on the step number."""
        return self.engine.forward_backward(examples, section=section, probes=probes)

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """Name and global shape of everything that a checkpoint of this run holds."""
        whole = build_on_meta(self.shape)
        shapes = {
            f"{kind}.{name}": parameter.shape
            for kind in self.engine.kinds
            for name, parameter in whole.named_parameters()
        }
        for name in fragments.persistent_buffers(whole):
            shapes[f"buffers.{name}"] = whole.get_buffer(name).shape
        return shapes


def check_before_start(run: RunConfig | DecoderRun, *, processes: int) -> None:
    """All that can be refused without torch.distributed, a GPU or a network weight."""
    check_run(run, devices=processes)
    directory = Path(run.directory)
    atomic_files.require_writable_directory(directory)
    if isinstance(run, DecoderRun):
        parameters = sum(decoder_costs.parameters(decoder_shape(run)).values())
    else:
        parameters = sum(p.numel() for p in build_on_meta(model_shape(run)).parameters())
    _check_room(run, directory, parameters)


def _check_room(run: AnyRun, directory: Path, parameters: int) -> None:
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
    measures = DiffusionMeasures(run.tracking, engine.network, ranks, split_rows=run.parallel.sp)
    return Training(run, ranks, shape, shift, batches, source.samples, feed, engine, measures)


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
