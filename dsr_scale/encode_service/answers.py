"""The form of an answer, which follows from the run file: a client need not believe what an answer says of itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsr_scale.config.derive import latent_channels, latent_grid
from dsr_scale.config.encoders import BytesText, TransformersText
from dsr_scale.config.run import AnyRun
from dsr_scale.encoders.loading import TORCH_DTYPES

_HEADER_BYTES = 1 << 20
"""Room for the header of an answer,"""
_HEADER_BYTES_PER_ROW = 1 << 10
"""and for the reason why a row's image could not be decoded."""


@dataclass(frozen=True)
class ExpectedTokens:
    """Of captions."""

    length: int
    """L, padding included."""
    channels: int | None
    """Of features; None for byte ids."""
    dtype: torch.dtype
    """As they travel: int16 for ids."""


@dataclass(frozen=True)
class Expected:
    """What a request's answer must be, row by row."""

    latents: tuple[int, int, int]
    """(C, h, w)"""
    latent_dtype: torch.dtype
    tokens: ExpectedTokens | None

    def most_bytes(self, rows: int) -> int:
        """Size that no answer to `rows` rows exceeds."""
        channels, height, width = self.latents
        row = channels * height * width * self.latent_dtype.itemsize + _HEADER_BYTES_PER_ROW
        if self.tokens is not None:
            row += self.tokens.length * (self.tokens.channels or 1) * self.tokens.dtype.itemsize
        return _HEADER_BYTES + rows * row


def expected_answer(run: AnyRun, target: tuple[int, int]) -> Expected:
    """For images at `target` (height, width). Raises InputError for sides that the encoder cannot take."""
    encoders, text = run.encoders, run.encoders.text
    tokens = None
    if isinstance(text, BytesText):
        tokens = ExpectedTokens(text.max_length, None, torch.int16)
    elif isinstance(text, TransformersText):
        tokens = ExpectedTokens(text.max_length, text.channels, TORCH_DTYPES[text.dtype])
    return Expected(
        (latent_channels(encoders), *latent_grid(encoders, *target, run.data.resolution)),
        TORCH_DTYPES[encoders.latent_dtype],
        tokens,
    )
