"""What must fit together in a run that trains a decoder, beside what every run must."""

from __future__ import annotations

from collections.abc import Callable

from dsr_scale.base.errors import InputError
from dsr_scale.config.decoder import DecoderRun, decoder_shape
from dsr_scale.config.encoders import TransformersText, VitImage
from dsr_scale.config.shape_checks import Problems


def encoder_problems(run: DecoderRun) -> Problems:
    """Latents that a decoder can be trained for, and no captions that nobody reads."""
    image = run.encoders.image
    if not isinstance(image, VitImage):
        yield InputError(
            found=f"a decoder for encoders.image.kind = {image.kind}",
            required="the latents of a vision transformer: pixels are their own image, and an "
            "autoencoder brings its decoder along",
            remedy="set encoders.image.kind to vit, or train a diffusion transformer with model: …",
        )
    if run.encoder.mode == "inline" and isinstance(run.encoders.text, TransformersText):
        yield InputError(
            found="a decoder run with encoder.mode = inline, encoders.text.kind = transformers",
            required="no text encoder, which would be loaded for nothing: a decoder reads no captions",
            remedy="set encoders.text.kind to none; keep it where a service or cache is shared with "
            "a text-to-image run",
        )


def decoder_size_problems(run: DecoderRun) -> Problems:
    """Sizes of the network, for one square."""
    if run.data.buckets:
        yield InputError(
            found=f"a decoder run with {len(run.data.buckets)} data.buckets",
            required="squares of data.resolution: the decoder has positions for no other grid",
            remedy="remove data.buckets",
        )
    decoder_shape(run)


def decoder_layout_problems(run: DecoderRun) -> Problems:
    """A decoder fits one device: it is data parallel only."""
    parallel = run.parallel
    found = {"tp": parallel.tp, "pp": parallel.pp, "virtual_stages": parallel.virtual_stages}
    split = [f"parallel.{name} = {size}" for name, size in found.items() if size > 1]
    split += ["parallel.sp = true"] if parallel.sp else []
    if split:
        yield InputError(
            found=f"a decoder run with {', '.join(split)}",
            required="data parallel ranks only: the largest decoder has 0.5 billion parameters",
            remedy="leave the section parallel out; parallel.zero = 2 divides gradients as well",
        )
    if parallel.zero == 3 or parallel.offload:
        yield InputError(
            found=f"a decoder run with parallel.zero = {parallel.zero}, parallel.offload = "
            f"{str(parallel.offload).lower()}",
            required="ZeRO-1 or ZeRO-2 on the device: the adaptive weight looks at the last layer's "
            "whole weight",
            remedy="set parallel.zero to 1 or 2 and parallel.offload to false",
        )
    if run.training.recompute == "selective":
        yield InputError(
            found="a decoder run with training.recompute = selective",
            required="none, or full: each block's input alone is kept",
            remedy="set training.recompute to none or full",
        )
    if run.training.compile:
        yield InputError(
            found="a decoder run with training.compile = true",
            required="a decoder that is not compiled",
            remedy="set training.compile to false",
        )


def adversarial_problems(run: DecoderRun) -> Problems:
    """Steps at which the discriminator comes in."""
    adversarial = run.decoder.adversarial
    if adversarial is None:
        return
    start, joins = adversarial.discriminator_start_step, adversarial.generator_start_step
    if joins < start:
        yield InputError(
            found=f"decoder.adversarial.generator_start_step = {joins}, "
            f"discriminator_start_step = {start}",
            required="a discriminator that has learnt something before the decoder listens to it",
            remedy="raise generator_start_step, or lower discriminator_start_step",
        )


def loss_problems(run: DecoderRun) -> Problems:
    """Something to reconstruct by."""
    losses = run.decoder.losses
    if losses.l1 == 0 and losses.lpips.weight == 0:
        yield InputError(
            found="decoder.losses.l1 = 0, decoder.losses.lpips.weight = 0",
            required="a loss of reconstruction",
            remedy="raise one of them",
        )


def evaluation_problems(run: DecoderRun) -> Problems:
    """Images that can be encoded."""
    if run.evaluation.shards is not None and run.encoder.mode == "cache":
        yield InputError(
            found=f"evaluation.shards = {run.evaluation.shards}, encoder.mode = cache",
            required="images of the cache: no other latents are at hand",
            remedy="remove evaluation.shards, or set encoder.mode to inline or service",
        )


DECODER_CHECKS: tuple[Callable[[DecoderRun], Problems], ...] = (
    encoder_problems,
    decoder_size_problems,
    decoder_layout_problems,
    adversarial_problems,
    loss_problems,
    evaluation_problems,
)
