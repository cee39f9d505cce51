"""Captions as UTF-8 bytes, for a model that learns its own embedding of them. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dsr_scale.config.derive import BYTE_VOCABULARY
from dsr_scale.encoders.contract import TextTokens

PADDING_ID = BYTE_VOCABULARY - 1


class BytesEncoder:
    """Byte ids 0…255, padded with 256."""

    def __init__(self, max_length: int, device: torch.device) -> None:
        self.max_length = max_length
        self.device = device

    @property
    def network(self) -> nn.Module | None:
        """There are no weights."""
        return None

    @property
    def files_digest(self) -> str | None:
        """Nothing is read from files."""
        return None

    def encode(self, captions: Sequence[str]) -> TextTokens:
        """B captions → ids int64 [B,L] and mask [B,L], cut to whole characters within L bytes."""
        tokens = torch.full((len(captions), self.max_length), PADDING_ID, dtype=torch.int64)
        for row, caption in zip(tokens, captions, strict=True):
            kept = cut_utf8(caption, self.max_length)
            row[: len(kept)] = torch.tensor(list(kept), dtype=torch.int64)
        tokens = tokens.to(self.device)
        return TextTokens(tokens, tokens != PADDING_ID)


def cut_utf8(caption: str, max_bytes: int) -> bytes:
    """The longest prefix of whole characters within `max_bytes`; lone surrogates become `?`."""
    return caption.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore").encode()
