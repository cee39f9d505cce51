"""The frozen encoders: which network turns pixels into latents, captions into tokens, latents into pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsr_scale.config.section import Section

Dtype = Literal["fp32", "bf16", "fp16"]

CAPTION_PLACEHOLDER = "{caption}"
"""Where the caption goes in `encoders.text.template`."""


class PixelsImage(Section):
    """Raw pixels in [-1, 1], one token per patch: the paper's JiT-style setting. Needs no weights."""

    kind: Literal["pixels"] = "pixels"
    patch: int = Field(default=16, gt=0)
    """Side of a patch, in pixels; latents are [3·patch², H/patch, W/patch]."""


class NoTreatment(Section):
    """The encoder as it is; right for checkpoints with trained registers."""

    kind: Literal["none"] = "none"


class TestTimeRegisters(Section):
    """An appended zero token takes over the activation of register neurons (DSR, TTR Alg. 2)."""

    kind: Literal["registers"] = "registers"
    neurons: str
    """Register file of `dsr-scale registers`, or `package:NAME` for a published list that ships here."""
    maximum: Literal["shared", "per_neuron"] = "shared"
    """What the register receives: one signed extreme of a layer's neurons (as released), or each
    neuron's own (as the paper writes it)."""
    keep_first_patch: bool = False
    """Leave patch 0 of encoders without CLS token as it is, as the released code does."""


class Zeroing(Section):
    """Register neurons are set to zero and nothing takes over; breaks the encoder, for comparison."""

    kind: Literal["zeroing"] = "zeroing"
    neurons: str
    """Register file, or `package:NAME`."""


class AttentionBias(Section):
    """Register neurons are set to zero, and every layer attends to one constant key and value."""

    kind: Literal["attention_bias"] = "attention_bias"
    neurons: str
    """Register file, or `package:NAME`."""
    bias: str
    """safetensors file with `key` and `value` [layers, channels] that `dsr-scale registers` writes."""


class NormClamp(Section):
    """Patch tokens of large norm are scaled down after every block."""

    kind: Literal["clamp"] = "clamp"
    max_over_median: float = Field(default=3.0, gt=1)
    """Largest norm left, in units of the image's median patch norm."""


OutlierTreatment = Annotated[
    NoTreatment | TestTimeRegisters | Zeroing | AttentionBias | NormClamp,
    Field(discriminator="kind"),
]


class VitImage(Section):
    """Final tokens of a vision transformer (RAE): affine-free last norm, special tokens dropped, whitened."""

    kind: Literal["vit"] = "vit"
    model: str
    """Hub name, local directory, or `package:NAME/PATH` for weights inside an installed package."""
    name: str | None = None
    """What the checkpoint is called in statistics and in the table of known encoders; None is `model`.
    Set it when `model` is a local copy."""
    revision: str | None = None
    """Commit of the hub repository; pin it for a run that must be repeatable. With `name`, the commit
    that a local copy is of."""
    statistics: str | None = None
    """safetensors file with `mean` and `variance` [C,H,W] of the latents; None skips whitening."""
    input_size: int | None = Field(default=None, gt=0)
    """Side the image is resized to for the encoder; needed for models `derive.py` does not know."""
    channels: int | None = Field(default=None, gt=0)
    """Token width; needed for models `derive.py` does not know."""
    patch: int | None = Field(default=None, gt=0)
    """Patch side of the encoder; needed for models `derive.py` does not know."""
    dtype: Dtype = "fp32"
    """Precision the encoder runs in."""
    outliers: OutlierTreatment = NoTreatment()
    """What is done about outlier tokens inside the encoder."""
    chunk_images: int = Field(default=16, gt=0)
    """Images in every forward pass; the last is filled up with black ones. Libraries choose kernels by
    size, so only equal sizes give an image equal latents whatever batch it came in."""

    @property
    def known_as(self) -> str:
        """`name`, or `model` where there is none."""
        return self.model if self.name is None else self.name


class VaeImage(Section):
    """Latents of a KL autoencoder, scaled as its config says; the mean of the posterior."""

    kind: Literal["vae"] = "vae"
    model: str
    """Hub name, local directory, or `package:NAME/PATH`."""
    revision: str | None = None
    """Commit of the hub repository."""
    channels: int = Field(default=4, gt=0)
    """Latent channels."""
    downsample: int = Field(default=8, gt=0)
    """Image side over latent side."""
    dtype: Dtype = "fp32"
    """Precision the encoder runs in."""
    chunk_images: int = Field(default=16, gt=0)
    """Images in every forward pass; the last is filled up with black ones, as for `vit`."""


class BytesText(Section):
    """UTF-8 bytes; the model learns its own embedding of them. Needs no weights."""

    kind: Literal["bytes"] = "bytes"
    max_length: int = Field(default=64, gt=0)
    """Bytes kept of a caption."""


class TransformersText(Section):
    """Hidden states of a frozen language model from the transformers library."""

    kind: Literal["transformers"] = "transformers"
    model: str
    """Hub name, local directory, or `package:NAME/PATH`."""
    revision: str | None = None
    """Commit of the hub repository."""
    max_length: int = Field(default=128, gt=0)
    """Tokens kept of a caption."""
    layer: int = -1
    """Which of the hidden states, counted as Python counts; -1 is the last, after its norm."""
    template: str = CAPTION_PLACEHOLDER
    """Text around the caption, which takes the place of `{caption}`."""
    channels: int = Field(gt=0)
    """Width of the hidden states; checked against the model when it is loaded."""
    dtype: Dtype = "fp32"
    """Precision the language model runs in."""
    cache_mib: int = Field(default=1024, ge=0)
    """Host memory of each process for tokens of captions, those used least recently put out first;
    repeated captions then cost nothing. 0 keeps the null caption only."""


class NoText(Section):
    """No captions: for class conditioning."""

    kind: Literal["none"] = "none"


class PixelsDecoder(Section):
    """The inverse of `pixels`."""

    kind: Literal["pixels"] = "pixels"


class RaeDecoder(Section):
    """diffusers' `AutoencoderRAE` decoder."""

    kind: Literal["rae"] = "rae"
    model: str
    """Hub name, local directory, or `package:NAME/PATH`."""
    revision: str | None = None
    """Commit of the hub repository."""


class VaeDecoder(Section):
    """diffusers' `AutoencoderKL` decoder."""

    kind: Literal["vae"] = "vae"
    model: str
    """Hub name, local directory, or `package:NAME/PATH`."""
    revision: str | None = None
    """Commit of the hub repository."""


class NoDecoder(Section):
    """Latents only: no sample grids."""

    kind: Literal["none"] = "none"


ImageEncoderConfig = Annotated[PixelsImage | VitImage | VaeImage, Field(discriminator="kind")]
TextEncoderConfig = Annotated[BytesText | TransformersText | NoText, Field(discriminator="kind")]
DecoderConfig = Annotated[
    PixelsDecoder | RaeDecoder | VaeDecoder | NoDecoder, Field(discriminator="kind")
]


class EncodersConfig(Section):
    """The three frozen networks around the diffusion transformer."""

    image: ImageEncoderConfig = PixelsImage()
    text: TextEncoderConfig = BytesText()
    decoder: DecoderConfig = PixelsDecoder()
    latent_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision that latents are rounded to, once, after whitening; wherever they come from."""
