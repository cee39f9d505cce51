"""Caption tokens from a frozen language model: encoder-only, or decoder-only read as an encoder.

Captions are padded on the right to one fixed length, and run in chunks of one fixed number of them:
libraries choose kernels by size, and only equal sizes give equal bits. So what a caption gives does
not depend on its neighbours, nor on which of them were cached (after a resume none is). The price is
up to `CHUNK_CAPTIONS` − 1 empty captions per call. Results are kept in host memory
(`caption_cache.py`): a caption seen again costs a copy instead of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dsr_scale.config.encoders import CAPTION_PLACEHOLDER, TransformersText
from dsr_scale.encoders.caption_cache import NULL_CAPTION, CaptionCache
from dsr_scale.encoders.contract import TextTokens
from dsr_scale.encoders.identity import settings_digest, tokenizer_digest
from dsr_scale.encoders.loading import TORCH_DTYPES
from dsr_scale.encoders.text_models import load_language_model, prefix_mask

CHUNK_CAPTIONS = 16
"""Captions in every forward pass: enough to fill a GPU, few enough that one prompt is cheap."""


class TransformersEncoder:
    """Hidden states [B,L,C] of one layer, in the configured dtype, zero in the padding."""

    def __init__(self, config: TransformersText, *, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.language_model = load_language_model(config, device=device)
        self._cache = CaptionCache(config.cache_mib << 20)

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights."""
        return self.language_model.network

    @property
    def files_digest(self) -> str | None:
        """Of the network's config and the tokenizer."""
        model = self.language_model
        return settings_digest(
            {
                **model.network.config.to_diff_dict(),
                "tokenizer": tokenizer_digest(model.tokenizer),
            }
        )

    def encode(self, captions: Sequence[str]) -> TextTokens:
        """B captions → features [B,L,C] and mask [B,L]; each distinct new caption is run once."""
        distinct = list(dict.fromkeys(captions))
        known = [caption for caption in distinct if caption in self._cache]
        new = [caption for caption in distinct if caption not in self._cache]
        parts = [self._stored(known)] if known else []
        if new:
            features, lengths = self._run(new)
            parts.append((features, lengths))
            for caption, row, length in zip(new, features.cpu(), lengths.tolist(), strict=True):
                self._cache.put(caption, row[:length])
        row_of = {caption: row for row, caption in enumerate([*known, *new])}
        rows = torch.tensor([row_of[caption] for caption in captions], dtype=torch.int64)
        length = torch.cat([part[1] for part in parts])[rows].to(self.device)
        tokens = torch.cat([part[0] for part in parts])[rows.to(self.device)]
        return TextTokens(tokens, prefix_mask(length, self.config.max_length))

    def _run(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features [N,L,C] on the device and token counts [N] on the host."""
        padded = [*captions, *[NULL_CAPTION] * (-len(captions) % CHUNK_CAPTIONS)]
        texts = [self.config.template.replace(CAPTION_PLACEHOLDER, caption) for caption in padded]
        chunks = [
            self.language_model.hidden_states(texts[start : start + CHUNK_CAPTIONS], self.device)
            for start in range(0, len(texts), CHUNK_CAPTIONS)
        ]
        features, lengths = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return features[: len(captions)], lengths[: len(captions)]

    def _stored(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self._cache.get(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows])
        features = torch.zeros(
            len(rows),
            self.config.max_length,
            self.config.channels,
            dtype=TORCH_DTYPES[self.config.dtype],
        )
        padded = pad_sequence(rows, batch_first=True)
        features[:, : padded.shape[1]] = padded
        return features.to(self.device), lengths
