"""What follows from a run file: shapes, token counts, batch arithmetic. The only converter.

Everything here is integer arithmetic on the config, without torch, so that `plan` and the
launchers run on a login node and a wrong size fails before a GPU is allocated.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    BytesText,
    EncodersConfig,
    PixelsImage,
    TransformersText,
    VaeImage,
    VitImage,
)
from dsr_scale.config.model import (
    AttentionVariant,
    ConditioningConfig,
    HeadConfig,
    ModelConfig,
)
from dsr_scale.config.presets import with_preset
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.config.section import Section


class VitGeometry(NamedTuple):
    """What must be known of a vision transformer before it is loaded."""

    channels: int
    patch: int
    input_size: int


KNOWN_VITS: dict[str, VitGeometry] = {
    "facebook/dinov2-with-registers-small": VitGeometry(384, 14, 224),
    "facebook/dinov2-with-registers-base": VitGeometry(768, 14, 224),
    "facebook/dinov2-with-registers-large": VitGeometry(1024, 14, 224),
    "facebook/dinov2-with-registers-giant": VitGeometry(1536, 14, 224),
    "facebook/dinov2-small": VitGeometry(384, 14, 224),
    "facebook/dinov2-base": VitGeometry(768, 14, 224),
    "facebook/dinov2-large": VitGeometry(1024, 14, 224),
    "facebook/dinov2-giant": VitGeometry(1536, 14, 224),
    "facebook/dinov3-vits16-pretrain-lvd1689m": VitGeometry(384, 16, 256),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": VitGeometry(768, 16, 256),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": VitGeometry(1024, 16, 256),
    "google/siglip2-base-patch16-256": VitGeometry(768, 16, 256),
    "google/siglip2-large-patch16-256": VitGeometry(1024, 16, 256),
    "google/siglip2-so400m-patch14-224": VitGeometry(1152, 14, 224),
    "google/siglip2-so400m-patch16-256": VitGeometry(1152, 16, 256),
    "facebook/vit-mae-base": VitGeometry(768, 16, 256),
    "facebook/vit-mae-large": VitGeometry(1024, 16, 256),
    "facebook/vit-mae-huge": VitGeometry(1280, 14, 224),
}
"""Published encoders at the input size that gives 16×16 tokens (docs/method.md §4)."""

BYTE_VOCABULARY = 257
"""256 byte values and one padding id."""

BYTE_LAYERS = 2
"""Blocks over a caption's bytes: a bag of bytes has no words, two layers of attention find them."""

FREQUENCIES = 256
"""Random Fourier frequencies of the timestep embedding; each gives a sine and a cosine."""

HIDDEN_MULTIPLE = 128
"""Hidden widths are zero-padded to a multiple of this; the padding computes nothing."""


class ModelShape(Section):
    """All that fixes the network: saved in checkpoints and bundles, compared on resume."""

    width: int
    depth: int
    heads: int
    head: HeadConfig | None
    patch: int
    channels: int
    """Latent channels C."""
    grid: tuple[int, int]
    """Latent height and width of the square training image; other grids are allowed at run time."""
    registers: int
    register_start: int
    conditioning: ConditioningConfig
    text_kind: Literal["none", "bytes", "features"]
    text_channels: int
    """Width of text features; 0 for bytes and for class conditioning."""
    text_length: int
    """Padded caption length in tokens."""
    qk_norm: bool
    attention: Literal["sdpa", "flash"]
    attention_variant: AttentionVariant = "plain"
    registers_masked: bool = False

    def registers_in(self, block: int) -> int:
        """Registers among the rows of block `block`; the head's blocks follow the body's."""
        return self.registers if block >= self.register_start else 0

    @property
    def image_tokens(self) -> int:
        """Tokens of the square training image."""
        return (self.grid[0] // self.patch) * (self.grid[1] // self.patch)


def hidden_width(width: int) -> int:
    """Published hidden width of the SwiGLU, int(⅔·4·D)."""
    return int(2 / 3 * 4 * width)


def padded_hidden_width(width: int) -> int:
    """Hidden width as stored, a multiple of `HIDDEN_MULTIPLE`."""
    return math.ceil(hidden_width(width) / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


def vit_geometry(image: VitImage) -> VitGeometry:
    """Channels, patch and input size of a ViT encoder, from the config or the table of known ones."""
    known = KNOWN_VITS.get(image.known_as)
    channels = image.channels or (known.channels if known else 0)
    patch = image.patch or (known.patch if known else 0)
    input_size = image.input_size or (known.input_size if known else 0)
    if not (channels and patch and input_size):
        raise InputError(
            found=f"encoders.image.{'model' if image.name is None else 'name'} = "
            f"{image.known_as!r}, which is not in the table of known encoders",
            required="its token width, patch and input size",
            remedy="set encoders.image.channels, encoders.image.patch and encoders.image.input_size, "
            "or encoders.image.name if the model is a copy of a known one",
        )
    return VitGeometry(channels, patch, input_size)


def latent_channels(encoders: EncodersConfig) -> int:
    """C of the image encoder's latents."""
    match encoders.image:
        case PixelsImage(patch=patch):
            return 3 * patch * patch
        case VitImage() as image:
            return vit_geometry(image).channels
        case VaeImage(channels=channels):
            return channels


def latent_grid(
    encoders: EncodersConfig, height: int, width: int, resolution: int
) -> tuple[int, int]:
    """Latent (height, width) of an image of `height` × `width` pixels.

    A ViT sees a square image of `resolution` pixels at its own input size; other buckets are
    scaled by the same factor. Raises InputError when the sides do not divide.
    """
    match encoders.image:
        case PixelsImage(patch=patch):
            unit, sides = patch, (height, width)
        case VitImage() as image:
            geometry = vit_geometry(image)
            unit = geometry.patch
            sides = (
                round(height * geometry.input_size / resolution),
                round(width * geometry.input_size / resolution),
            )
        case VaeImage(downsample=downsample):
            unit, sides = downsample, (height, width)
    if sides[0] % unit or sides[1] % unit:
        raise InputError(
            found=f"an image of {height}×{width} pixels, {sides[0]}×{sides[1]} at the encoder",
            required=f"sides divisible by the encoder's patch of {unit}",
            remedy="change data.resolution, data.buckets or the encoder's patch",
        )
    return sides[0] // unit, sides[1] // unit


def register_start(model: ModelConfig) -> int:
    """First block that sees the registers: the config's, or ceil(2·depth/7) (docs/method.md §2)."""
    if model.registers.start is not None:
        return model.registers.start
    return math.ceil(2 * model.depth / 7)


def model_shape(run: RunConfig) -> ModelShape:
    """The network that a run file describes. Raises InputError for sizes that do not fit together."""
    model = with_preset(run.model)
    text = run.encoders.text
    text_kind: Literal["none", "bytes", "features"] = "none"
    text_channels = text_length = 0
    if model.conditioning.kind != "class":
        match text:
            case BytesText():
                text_kind, text_length = "bytes", text.max_length
            case TransformersText():
                text_kind, text_channels, text_length = "features", text.channels, text.max_length
    return ModelShape(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        head=model.head,
        patch=model.patch,
        channels=latent_channels(run.encoders),
        grid=latent_grid(
            run.encoders, run.data.resolution, run.data.resolution, run.data.resolution
        ),
        registers=model.registers.count,
        register_start=register_start(model),
        conditioning=model.conditioning,
        text_kind=text_kind,
        text_channels=text_channels,
        text_length=text_length,
        qk_norm=model.qk_norm,
        attention=model.attention,
        attention_variant=model.attention_variant,
        registers_masked=model.registers.masked,
    )


def timestep_shift(run: RunConfig, shape: ModelShape) -> float:
    """α of the timestep shift: the config's number, or √(latent elements / 4096) (RAE §2.2)."""
    if run.diffusion.shift != "dimension":
        return run.diffusion.shift
    return math.sqrt(shape.grid[0] * shape.grid[1] * shape.channels / 4096)


class BatchArithmetic(NamedTuple):
    """How one global batch is shared out."""

    global_images: int
    data_parallel: int
    microbatch_images: int
    accumulation_steps: int


def batch_arithmetic(run: AnyRun, data_parallel: int) -> BatchArithmetic:
    """Gradient accumulation for `data_parallel` ranks. Raises InputError when it does not divide."""
    global_images = run.training.global_batch_images
    microbatch = run.training.microbatch_images
    if global_images % (data_parallel * microbatch):
        rank_images = max(1, global_images // data_parallel)
        choices = [n for n in range(1, rank_images + 1) if global_images % (data_parallel * n) == 0]
        advice = (
            f"set training.microbatch_images to one of {', '.join(map(str, choices[-6:]))}"
            if choices
            else f"set training.global_batch_images to a multiple of {data_parallel}"
        )
        raise InputError(
            found=f"training.global_batch_images = {global_images}, training.microbatch_images = "
            f"{microbatch}, data-parallel ranks = {data_parallel}",
            required="a global batch divisible by ranks × micro-batch",
            remedy=advice,
        )
    return BatchArithmetic(
        global_images,
        data_parallel,
        microbatch,
        global_images // (data_parallel * microbatch),
    )


class ParallelLayout(NamedTuple):
    """Devices as tensor × pipeline × data-parallel ranks."""

    tp: int
    pp: int
    dp: int

    @property
    def devices(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp


def parallel_layout(run: AnyRun, devices: int) -> ParallelLayout:
    """The run's layout on `devices` processes. Raises InputError when they are no whole replicas."""
    tp, pp = run.parallel.tp, run.parallel.pp
    replica = tp * pp
    if devices < 1 or devices % replica:
        below = devices // replica * replica
        nearest = f"{below} or {below + replica}" if below > 0 else f"{replica}"
        raise InputError(
            found=f"{devices} devices, parallel.tp = {tp}, parallel.pp = {pp}",
            required=f"a positive multiple of tp · pp = {replica}, the devices of one replica",
            remedy=f"start {nearest} processes (plan: --devices), or change parallel.tp or parallel.pp",
        )
    return ParallelLayout(tp, pp, devices // replica)
