"""From a run file that trains a decoder to everything it needs, cheapest checks first.

The run shares its loop with diffusion transformers (`started.Started`), and stream, encoders,
checkpoints and ZeRO as well. Its own are the two networks that judge, which are opened first: their
weights are what is most likely missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.config import decoder_costs
from dsr_scale.config.decoder import DecoderRun, DecoderShape, decoder_shape
from dsr_scale.config.derive import BatchArithmetic, batch_arithmetic
from dsr_scale.config.encoders import VitImage
from dsr_scale.data.loader import BatchStream
from dsr_scale.data.samples import Samples
from dsr_scale.decoders.discriminator import open_discriminator
from dsr_scale.decoders.network import RaeDecoderNetwork, build_decoder_network
from dsr_scale.decoders.perceptual import Perceptual, open_lpips
from dsr_scale.encoders.whitening import Whitening, load_whitening
from dsr_scale.parallel.assemble import LocalModel
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.pipeline import Probes
from dsr_scale.parallel.recompute import recompute_blocks
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import Section
from dsr_scale.train.decoder_critic import Critic
from dsr_scale.train.decoder_engine import DecoderEngine
from dsr_scale.train.decoder_measures import DecoderMeasures
from dsr_scale.train.decoder_objective import Reconstructing, Reconstruction
from dsr_scale.train.feed import Feed
from dsr_scale.train.sources import Source, open_source


@dataclass(frozen=True)
class DecoderTraining:
    """The parts of a started run."""

    run: DecoderRun
    ranks: Ranks
    shape: DecoderShape
    batches: BatchArithmetic
    source: Source
    whitening: Whitening | None
    perceptual: Perceptual | None
    feed: Feed
    engine: DecoderEngine
    measures: DecoderMeasures

    @property
    def samples(self) -> Samples:
        """The data set."""
        return self.source.samples

    @property
    def timestep_shift(self) -> float | None:
        """None: a decoder has no timesteps."""
        return None

    @property
    def training_flops(self) -> int:
        """Of one image in the decoder; those of the networks that judge are not counted."""
        return decoder_costs.training_flops(self.shape)

    def forward_backward(
        self,
        examples: Sequence[Reconstruction],
        *,
        step: int,
        section: Section,
        probes: Probes | None,
    ) -> Tensor:
        """Gradients of step `step`, from 0; its mean loss over all ranks, on the device."""
        return self.engine.forward_backward(examples, step=step, section=section)

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """Name and global shape of everything that a checkpoint of this run holds."""
        return self.engine.checkpoint_shapes()


def build_decoder(run: DecoderRun, ranks: Ranks) -> DecoderTraining:
    """Opens judges, data and encoders, builds the decoder and puts it under ZeRO.

    Raises InputError that says what to fetch where weights are missing.
    """
    shape = decoder_shape(run)
    image = run.encoders.image
    assert isinstance(image, VitImage), "checked before the start"
    if ranks.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = run.training.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = run.training.precision == "tf32"
    perceptual = _perceptual(run, ranks)
    critic = _critic(run, ranks)
    batches = batch_arithmetic(run, ranks.data.size)
    source = open_source(run, ranks)
    whitening = load_whitening(image, resolution=run.data.resolution, device=ranks.device)
    measures = DecoderMeasures(ranks)
    engine = _engine(run, shape, batches, perceptual, critic, measures, ranks)
    feed = Feed(
        Reconstructing(whitening, run.decoder.noise_tau, run.seed),
        ranks,
        batches.accumulation_steps,
        _stream(run, ranks, batches, source),
        source.encoders,
    )
    return DecoderTraining(
        run, ranks, shape, batches, source, whitening, perceptual, feed, engine, measures
    )


def new_network(shape: DecoderShape, seed: int) -> RaeDecoderNetwork:
    """The decoder of `shape` on the CPU in float32, with the initial values of `seed`."""
    return build_decoder_network(
        latent_channels=shape.channels,
        grid=shape.grid,
        image_size=shape.resolution,
        patch=shape.patch,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_width=shape.mlp_width,
        image_mean=shape.image_mean,
        image_std=shape.image_std,
        seed=seed,
    )


def _perceptual(run: DecoderRun, ranks: Ranks) -> Perceptual | None:
    lpips = run.decoder.losses.lpips
    if lpips.weight == 0:
        return None
    return open_lpips(lpips.network, lpips.backbone).to(ranks.device)


def _critic(run: DecoderRun, ranks: Ranks) -> Critic | None:
    config = run.decoder.adversarial
    if config is None:
        return None
    try:
        discriminator = open_discriminator(
            config.model, config.revision, blocks=config.blocks, seed=run.seed
        )
    except InputError as problem:
        raise InputError(
            found=f"decoder.adversarial: {problem.found}",
            required=problem.required,
            remedy=problem.remedy,
        ) from problem
    if run.training.precision == "bf16":
        discriminator.features.to(torch.bfloat16)
    return Critic(discriminator.to(ranks.device), config, seed=run.seed, ranks=ranks)


def _engine(
    run: DecoderRun,
    shape: DecoderShape,
    batches: BatchArithmetic,
    perceptual: Perceptual | None,
    critic: Critic | None,
    measures: DecoderMeasures,
    ranks: Ranks,
) -> DecoderEngine:
    network = new_network(shape, run.seed)
    layers = {str(number): layer for number, layer in enumerate(network.decoder.decoder_layers)}
    recompute_blocks(nn.ModuleDict(layers), run.training.recompute)
    local = LocalModel(
        network,
        splits={name: None for name, _ in network.named_parameters()},
        owned=frozenset(network.state_dict()),
        on_every_stage=frozenset(),
        spans=(),
    )
    zero = start_zero(
        local,
        None,
        run.training,
        run.parallel,
        ranks=ranks,
        accumulation_steps=batches.accumulation_steps,
    )
    return DecoderEngine(
        zero,
        perceptual,
        critic,
        losses=run.decoder.losses,
        adversarial=run.decoder.adversarial,
        training=run.training,
        measures=measures,
        ranks=ranks,
    )


def _stream(run: DecoderRun, ranks: Ranks, batches: BatchArithmetic, source: Source) -> BatchStream:
    return BatchStream(
        source.samples,
        run.data,
        seed=run.seed,
        global_batch_images=batches.global_images,
        microbatch_images=batches.microbatch_images,
        rank=ranks.data.rank,
        world_size=ranks.data.size,
        encoder=source.rows,
        keep_images=True,
        start_method=source.start_method,
    )
