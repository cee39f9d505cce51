"""A run that trains a decoder: pixels from an image encoder's latents (docs/decoders.md).

The file has a section `decoder` where that of a diffusion transformer has `model` and `diffusion`.
Data, encoders, the way to them, training and checkpoints are the same sections.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import latent_channels, latent_grid
from dsr_scale.config.encoders import EncodersConfig, NoText
from dsr_scale.config.run import AnyRun
from dsr_scale.config.section import Section
from dsr_scale.config.training import OptimizerConfig

Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]


class LpipsConfig(Section):
    """The perceptual distance, from features of a frozen classifier."""

    weight: float = Field(default=1.0, ge=0)
    """0 goes without, and needs no weights."""
    network: Literal["vgg", "alex"] = "vgg"
    """Which classifier; published decoders use VGG."""
    backbone: str | None = None
    """File of torchvision's weights; None is where torch keeps downloaded ones."""


class LossesConfig(Section):
    """What reconstruction is judged by, as a weighted sum of means over pixels and images."""

    l1: float = Field(default=1.0, ge=0)
    """Weight of the absolute difference of colours in [0, 1]."""
    lpips: LpipsConfig = LpipsConfig()


class AdversarialConfig(Section):
    """A discriminator on features of a frozen ViT, and the term it adds to the decoder's loss."""

    weight: float = Field(default=0.75, gt=0)
    """Of the term, on top of the adaptive weight, which makes it pull at the last layer as hard as
    the reconstruction does."""
    largest_adaptive_weight: float = Field(default=1e4, gt=0)
    """Bound of the adaptive weight."""
    model: str = "facebook/dino-vits8"
    """Hub name or local directory of the frozen ViT."""
    revision: str | None = None
    """Commit of the hub repository."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(2, 5, 8, 11), min_length=1)
    """Blocks whose output has a head, counted from 0."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the heads. The rate follows `training.schedule` in proportion to the decoder's."""
    discriminator_start_step: int = Field(default=0, ge=0)
    """First step, from 0, that trains the heads."""
    generator_start_step: int = Field(default=0, ge=0)
    """First step that adds the term to the decoder's loss."""


class DecoderSection(Section):
    """The network in training, RAE's ViT decoder, and what it learns from."""

    preset: Literal["b", "l", "xl"] | None = None
    """Published sizes by name; sizes given beside it win."""
    width: int | None = Field(default=None, gt=0)
    """Token width."""
    depth: int | None = Field(default=None, gt=0)
    """Blocks."""
    heads: int | None = Field(default=None, gt=0)
    """Attention heads."""
    mlp_width: int | None = Field(default=None, gt=0)
    """Hidden width of the blocks' MLP; left out, four times the width."""
    image_mean: tuple[Share, Share, Share] = (0.5, 0.5, 0.5)
    """RGB colour that an output of 0 means, in [0, 1]; published decoders use their encoder's."""
    image_std: tuple[Deviation, Deviation, Deviation] = (0.5, 0.5, 0.5)
    """Colour that an output of 1 adds."""
    noise_tau: float = Field(default=0.8, ge=0)
    """Latents are trained on with Gaussian noise of a deviation drawn from [0, this) for each image;
    0 is without. Less suits reconstruction, more suits sampled latents."""
    losses: LossesConfig = LossesConfig()
    adversarial: AdversarialConfig | None = None
    """None trains without a discriminator."""


class DecoderEvaluationConfig(Section):
    """Reconstructions by the EMA weights while training, of noiseless latents."""

    every_steps: int | None = Field(default=1000, gt=0)
    """Steps between measurements; None measures nothing."""
    images: int = Field(default=64, gt=0)
    """Measured are the first so many of `shards`, centre-cropped and not mirrored."""
    shards: str | None = None
    """Images that are not trained on, in the format of `data.shards`; None takes those trained on."""
    shown: int = Field(default=8, ge=0)
    """So many of them are drawn in `grids/`, each above its reconstruction; 0 draws none."""
    inception_weights: str | None = None
    """File of Inception weights for rFID; None is where torch keeps downloaded ones."""


class DecoderRun(AnyRun):
    """Every setting of a run that trains a decoder."""

    encoders: EncodersConfig = EncodersConfig(text=NoText())
    decoder: DecoderSection
    evaluation: DecoderEvaluationConfig = DecoderEvaluationConfig()


class DecoderShape(Section):
    """All that fixes the decoder: saved in checkpoints, compared on resume."""

    channels: int
    """Latent channels C."""
    grid: int
    """Side of the square latent grid."""
    resolution: int
    """Side of the image."""
    patch: int
    """Side of the square of pixels that a latent becomes."""
    width: int
    depth: int
    heads: int
    mlp_width: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


class _Sizes(NamedTuple):
    width: int
    depth: int
    heads: int
    mlp_width: int


_PRESETS = {
    "b": _Sizes(768, 12, 12, 3072),
    "l": _Sizes(1024, 24, 16, 4096),
    "xl": _Sizes(1152, 28, 16, 4096),
}
"""RAE's decoders."""


def decoder_shape(run: DecoderRun) -> DecoderShape:
    """The network that a run file describes. Raises InputError for sizes that do not fit together."""
    section, side = run.decoder, run.data.resolution
    width, depth, heads, mlp_width = _sizes(section)
    rows, columns = latent_grid(run.encoders, side, side, side)
    assert rows == columns, "a square image"
    if side % rows:
        raise InputError(
            found=f"data.resolution = {side}, a grid of {rows}×{rows} latents",
            required="a whole number of pixels for each latent",
            remedy=f"set data.resolution to a multiple of {rows}",
        )
    if width % heads or width % 4:
        raise InputError(
            found=f"decoder.width = {width}, decoder.heads = {heads}",
            required="a width divisible by the heads, and by 4 for sine and cosine of two axes",
            remedy="choose a width that is a multiple of 64 and heads of 64 or 72 channels",
        )
    return DecoderShape(
        channels=latent_channels(run.encoders),
        grid=rows,
        resolution=side,
        patch=side // rows,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        image_mean=section.image_mean,
        image_std=section.image_std,
    )


def _sizes(section: DecoderSection) -> _Sizes:
    preset = None if section.preset is None else _PRESETS[section.preset]
    width = section.width or (preset and preset.width)
    depth = section.depth or (preset and preset.depth)
    heads = section.heads or (preset and preset.heads)
    if not (width and depth and heads):
        raise InputError(
            found="a decoder without "
            + ", ".join(
                f"decoder.{name}"
                for name, size in (("width", width), ("depth", depth), ("heads", heads))
                if not size
            ),
            required="a preset, or width, depth and heads",
            remedy=f"set decoder.preset to one of {', '.join(_PRESETS)}, or give the missing sizes",
        )
    published = None if preset is None or section.width else preset.mlp_width
    return _Sizes(width, depth, heads, section.mlp_width or published or 4 * width)
