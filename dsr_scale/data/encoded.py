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


class RowEncoder(Protocol):
    """Implementations are pickled to data workers and connect, or open files, when first used."""

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        """Encodes images at `target` (height, width). Raises `InputError` when that is impossible."""
        ...
