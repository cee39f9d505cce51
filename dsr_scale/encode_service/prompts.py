"""Captions alone, by the service: prompts of sample grids, so that a trainer holds no text encoder.

Servers take images with captions; prompts ride on blank ones. There are few and they stay the same, so
each is asked for once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service.client import ServiceClient
from dsr_scale.encoders.contract import TextTokens

PROMPTS_AT_ONCE = 16


class ServiceText:
    """A `TextEncoder` whose network is elsewhere."""

    def __init__(self, client: ServiceClient, device: torch.device) -> None:
        self._client = client
        self._device = device
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def network(self) -> nn.Module | None:
        """There are no weights here."""
        return None

    @property
    def files_digest(self) -> str | None:
        """Nothing is read here; servers tell in their contract."""
        return None

    def encode(self, captions: Sequence[str]) -> TextTokens:
        """B captions → tokens and mask on the device. Raises as `ServiceClient.encode`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        side = self._client.run.data.resolution
        blank = np.zeros((3, side, side), dtype=np.uint8)
        for start in range(0, len(new), PROMPTS_AT_ONCE):
            some = new[start : start + PROMPTS_AT_ONCE]
            encoded = self._client.encode([Row(-1, blank, CENTRE, c) for c in some], (side, side))
            assert encoded.tokens is not None and encoded.mask is not None
            self._known |= dict(
                zip(some, zip(encoded.tokens, encoded.mask, strict=True), strict=True)
            )
        tokens, masks = zip(*(self._known[caption] for caption in captions), strict=True)
        return TextTokens(torch.stack(tokens).to(self._device), torch.stack(masks).to(self._device))
