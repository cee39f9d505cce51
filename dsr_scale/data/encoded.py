"""Rows that are encoded before they reach the training process, by whoever can.

The stream decides which samples, views and captions; a `RowEncoder` turns them into latents and
caption tokens: by asking a server, or by looking them up. It lives in the data workers, so that
waiting and receiving never hold up the training process, and several micro-batches are under way at
once. A row that cannot be decoded is reported, not raised: the stream puts another sample in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.data.transforms import View


class Row(NamedTuple):
    """One sample as it is to be encoded."""

    sample_id: int
    image: bytes | np.ndarray
    """The stored file, or pixels uint8 [3,H,W] to which `view` was applied already."""
    view: View
    caption: str


@dataclass(frozen=True)
class Encoded:
    """Latents and caption tokens of B rows."""

    latents: torch.Tensor
    """[B,C,h,w] in `encoders.latent_dtype`, on the host; rows of `failures` are zero."""
    tokens: torch.Tensor | None
    """Features [B,L,C] or byte ids [B,L]; None without text."""
    mask: torch.Tensor | None
    """bool [B,L], True for real tokens."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Row → why its image could not be decoded."""

    def replaced(self, rows: Sequence[int], other: Encoded) -> Encoded:
        """These, with `rows` taken from `other`; failures are those of the others."""
        latents = self.latents.clone()
        latents[list(rows)] = other.latents
        tokens, mask = self.tokens, self.mask
        if tokens is not None and mask is not None:
            assert other.tokens is not None and other.mask is not None
            tokens, mask = tokens.clone(), mask.clone()
            tokens[list(rows)] = other.tokens
            mask[list(rows)] = other.mask
        return Encoded(latents, tokens, mask)


class RowEncoder(Protocol):
    """Implementations are pickled to data workers and connect, or open files, when first used."""

    @property
    def wants_pixels(self) -> bool:
        """Rows are to hold pixels, not files."""
        ...

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        """Encodes images at `target` (height, width).

        Raises `EncodersLost` when nobody answers, and another `InputError` when it is impossible.
        """
        ...


class EncodersLost(InputError):
    """Nobody encodes any more, through no fault of the data: save, and end."""

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        return _rebuild_lost, (self.found, self.required, self.remedy)


def _rebuild_lost(found: str, required: str, remedy: str) -> EncodersLost:
    return EncodersLost(found=found, required=required, remedy=remedy)
