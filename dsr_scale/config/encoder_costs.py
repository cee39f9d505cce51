"""What the frozen encoders cost: FLOPs of an image and of a caption, bytes that travel, bytes on disk.

FLOPs are counted from the shapes of matrix products and convolutions, as for the trained network
(`costs.py`). Captions count at their padded length, which is what the encoder computes, and attention
over all of it: a padding mask makes no product smaller. Unknown sizes give no number but a reason.
"""

from __future__ import annotations

from typing import NamedTuple

from dsr_scale.config.derive import latent_channels, latent_grid, vit_geometry
from dsr_scale.config.encoder_geometry import (
    Autoencoder,
    Transformer,
    UnknownModel,
    autoencoder,
    image_transformer,
    text_transformer,
)
from dsr_scale.config.encoders import (
    BytesText,
    NoText,
    PixelsImage,
    TransformersText,
    VaeImage,
    VitImage,
)
from dsr_scale.config.local_pack import LocalPack
from dsr_scale.config.run import AnyRun

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

BYTE_ID_BYTES = 2
"""A caption's byte ids travel as int16."""

ASSUMED_FILE_BYTES = 40_000
"""An image file where no pack can be read: a JPEG of 256 to 400 pixels at usual quality."""

ASSUMED_CAPTION_BYTES = 100
"""A caption where no pack can be read."""


class Flops(NamedTuple):
    """Forward FLOPs, 2 per multiply-add, or why they are not known."""

    count: int | None
    unknown: str | None = None


def image_flops(run: AnyRun) -> Flops:
    """FLOPs of one square image in the image encoder; 0 where latents are the pixels."""
    image = run.encoders.image
    try:
        match image:
            case PixelsImage():
                return Flops(0)
            case VitImage():
                return Flops(_vit_flops(run, image))
            case VaeImage():
                sizes = autoencoder(image.model)
                return Flops(autoencoder_flops(sizes, run.data.resolution))
    except UnknownModel as error:
        return Flops(None, str(error))


def caption_flops(run: AnyRun) -> Flops:
    """FLOPs of one caption in the text encoder; 0 for bytes and without captions."""
    text = run.encoders.text
    if not isinstance(text, TransformersText):
        return Flops(0)
    try:
        return Flops(transformer_flops(text_transformer(text.model), text.max_length))
    except UnknownModel as error:
        return Flops(None, str(error))


def transformer_flops(sizes: Transformer, tokens: int) -> int:
    """All blocks over one sequence; embeddings are look-ups and cost nothing."""
    attention = 2 * sizes.width * (sizes.attention + sizes.key_value)
    mlp = (3 if sizes.gated else 2) * sizes.width * sizes.hidden
    return sizes.depth * (2 * tokens * (attention + mlp) + 4 * tokens**2 * sizes.attention)


def _vit_flops(run: AnyRun, image: VitImage) -> int:
    """Patch embedding and blocks; a test-time register is one more token."""
    sizes = image_transformer(image.model, image.known_as)
    side = run.data.resolution
    height, width = latent_grid(run.encoders, side, side, side)
    patches, patch = height * width, vit_geometry(image).patch
    registers = int(image.outliers.kind == "registers")
    embedding = 2 * patches * 3 * patch**2 * sizes.width
    return embedding + transformer_flops(sizes, patches + sizes.special_tokens + registers)


def autoencoder_flops(sizes: Autoencoder, side: int) -> int:
    """The encoder half of a KL autoencoder on an image of `side` × `side` pixels."""
    pixels, narrow = side * side, sizes.widths[0]
    total = _convolution(3, narrow, 3, pixels)
    for level, width in enumerate(sizes.widths):
        for block in range(sizes.blocks):
            total += _residual(width if block else narrow, width, pixels)
        narrow = width
        if level < len(sizes.widths) - 1:
            pixels //= 4
            total += _convolution(width, width, 3, pixels)
    total += 2 * _residual(narrow, narrow, pixels)
    if sizes.attention:
        total += 8 * pixels * narrow**2 + 4 * pixels**2 * narrow
    moments = 2 * sizes.latent_channels
    total += _convolution(narrow, moments, 3, pixels)
    return total + (_convolution(moments, moments, 1, pixels) if sizes.quantizer else 0)


def _convolution(inputs: int, outputs: int, kernel: int, pixels: int) -> int:
    return 2 * inputs * outputs * kernel**2 * pixels


def _residual(inputs: int, outputs: int, pixels: int) -> int:
    """Two 3×3 convolutions, and a 1×1 one beside them where the width changes."""
    beside = _convolution(inputs, outputs, 1, pixels) if inputs != outputs else 0
    return (
        _convolution(inputs, outputs, 3, pixels)
        + _convolution(outputs, outputs, 3, pixels)
        + beside
    )


class Traffic(NamedTuple):
    """Bytes per image between a trainer and an encoder server."""

    up: int
    """Image and caption."""
    latents: int
    text: int
    """Text tokens at the full length; they travel without padding, so this is the most."""


def traffic(run: AnyRun, pack: LocalPack) -> Traffic:
    """Bytes of one image's request and answer; message headers are left out."""
    caption = ASSUMED_CAPTION_BYTES
    if pack.caption_characters is not None:
        caption = round(pack.caption_characters)
    if isinstance(run.encoders.text, NoText):
        caption = 0
    if run.encoder.send == "pixels":
        up = 3 * run.data.resolution**2 + caption
    else:
        # A stored sample holds its captions.
        up = pack.sample_bytes or ASSUMED_FILE_BYTES + caption
    return Traffic(up, latent_bytes(run), caption_token_bytes(run))


def latent_bytes(run: AnyRun) -> int:
    """Bytes of one square image's latents, in `encoders.latent_dtype`."""
    side = run.data.resolution
    height, width = latent_grid(run.encoders, side, side, side)
    elements = latent_channels(run.encoders) * height * width
    return elements * DTYPE_BYTES[run.encoders.latent_dtype]


def caption_token_bytes(run: AnyRun) -> int:
    """Bytes of one caption's tokens at the full length; 0 without captions."""
    match run.encoders.text:
        case TransformersText() as text:
            return text.max_length * text.channels * DTYPE_BYTES[text.dtype]
        case BytesText() as text:
            return text.max_length * BYTE_ID_BYTES
        case _:
            return 0


class Cache(NamedTuple):
    """What `encoder.mode = cache` would keep of the run's data."""

    impossible: str | None
    """Why latents cannot be kept; None where they can."""
    variants: int
    """Latents of an image: as it is, and mirrored where the run mirrors any."""
    disk_bytes: int | None
    """None where the number of samples is unknown or the cache impossible."""


def cache(run: AnyRun, samples: int | None) -> Cache:
    """Latents of every variant and one caption's tokens of every sample."""
    impossible = None
    if run.data.crop == "random":
        impossible = "random crops are different images every time"
    elif run.data.buckets:
        impossible = "the bucket of an image may differ from epoch to epoch"
    variants = 2 if run.data.horizontal_flip > 0 else 1
    size = None
    if samples is not None and impossible is None:
        size = samples * (variants * latent_bytes(run) + caption_token_bytes(run))
    return Cache(impossible, variants, size)
