"""Caption tokens from a frozen language model: encoder-only, or decoder-only read as an encoder.

Captions are padded on the right to one fixed length, and run in chunks of one fixed number of them:
libraries choose kernels by size, and only equal sizes give equal bits. So what a caption gives does
not depend on its neighbours, nor on which of them were cached (after a resume none is). The price is
up to `CHUNK_CAPTIONS` − 1 empty captions per call. Results are kept in host memory without their
padding, least recently used first out: a caption seen again costs a copy instead of a forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import CAPTION_PLACEHOLDER, TransformersText
from dsr_scale.encoders.contract import TextTokens
from dsr_scale.encoders.loading import (
    TORCH_DTYPES,
    load_transformer,
    loading_errors,
    require_equal,
)
from dsr_scale.encoders.locate import Location, locate

CHUNK_CAPTIONS = 16
"""Captions in every forward pass: enough to fill a GPU, few enough that one prompt is cheap."""


class TransformersEncoder:
    """Hidden states [B,L,C] of one layer, in the configured dtype, zero in the padding."""

    def __init__(self, config: TransformersText, *, device: torch.device) -> None:
        self.config = config
        self.device = device
        location = locate(config.model, config.revision)
        model_config = _text_config(location)
        self.layer = _checked_layer(config, model_config, location)
        self.tokenizer = _load_tokenizer(location)
        self.model = load_transformer(
            _model_class(model_config),
            location,
            dtype=config.dtype,
            device=device,
            config=model_config,
        )
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights."""
        return self.model

    def encode(self, captions: Sequence[str]) -> TextTokens:
        """B captions → features [B,L,C] and mask [B,L]; each distinct new caption is run once."""
        distinct = list(dict.fromkeys(captions))
        known = [caption for caption in distinct if caption in self._cache]
        new = [caption for caption in distinct if caption not in self._cache]
        parts = [self._stored(known)] if known else []
        if new:
            features, lengths = self._run(new)
            parts.append((features, lengths))
            self._store(new, features, lengths)
        row_of = {caption: row for row, caption in enumerate([*known, *new])}
        rows = torch.tensor([row_of[caption] for caption in captions], dtype=torch.int64)
        length = torch.cat([part[1] for part in parts])[rows].to(self.device)
        tokens = torch.cat([part[0] for part in parts])[rows.to(self.device)]
        return TextTokens(tokens, _prefix_mask(length, self.config.max_length))

    def _run(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features [N,L,C] on the device and token counts [N] on the host."""
        padded = [*captions, *[""] * (-len(captions) % CHUNK_CAPTIONS)]
        starts = range(0, len(padded), CHUNK_CAPTIONS)
        chunks = [self._run_chunk(padded[start : start + CHUNK_CAPTIONS]) for start in starts]
        features, lengths = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return features[: len(captions)], lengths[: len(captions)]

    @torch.no_grad()
    def _run_chunk(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        texts = [self.config.template.replace(CAPTION_PLACEHOLDER, caption) for caption in captions]
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.config.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        lengths = batch["attention_mask"].sum(dim=1)
        attention = batch["attention_mask"].clone()
        # A row without any token would divide by zero in the softmax; it is zeroed below.
        attention[:, 0] = 1
        output = self.model(
            input_ids=batch["input_ids"].to(self.device),
            attention_mask=attention.to(self.device),
            output_hidden_states=self.layer is not None,
        )
        hidden = (
            output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        )
        mask = _prefix_mask(lengths.to(self.device), self.config.max_length)
        return hidden.masked_fill(~mask[:, :, None], 0), lengths

    def _stored(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self._cache[caption] for caption in captions]
        for caption in captions:
            self._cache.move_to_end(caption)
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

    def _store(self, captions: list[str], features: Tensor, lengths: Tensor) -> None:
        if not self.config.cache_captions:
            return
        host = features.cpu()
        for caption, row, length in zip(captions, host, lengths.tolist(), strict=True):
            self._cache[caption] = row[:length].clone()
        while len(self._cache) > self.config.cache_captions:
            self._cache.popitem(last=False)


def _prefix_mask(lengths: Tensor, max_length: int) -> Tensor:
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def _text_config(location: Location) -> Any:
    """The text part of the checkpoint's config. Raises InputError for other multi-modal models."""
    declare_torchvision_operators()
    from transformers import AutoConfig

    with loading_errors(location):
        config = AutoConfig.from_pretrained(location.source, revision=location.revision)
    if config.model_type == "clip":
        return config.text_config
    if hasattr(config, "vision_config") or not hasattr(config, "hidden_size"):
        raise InputError(
            found=f"{location.source} of type {config.model_type}",
            required="a text model, or CLIP",
            remedy="choose the text-only checkpoint of this model",
        )
    return config


def _checked_layer(config: TransformersText, model_config: Any, location: Location) -> int | None:
    """Index among the embeddings' and blocks' outputs; None for the last one, after its norm."""
    require_equal("encoders.text.channels", config.channels, model_config.hidden_size, location)
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise InputError(
            found=f"encoders.text.max_length = {config.max_length}",
            required=f"at most {longest}, the positions that {location.source} has",
            remedy=f"set encoders.text.max_length to {longest} or less",
        )
    depth = model_config.num_hidden_layers
    if not -depth - 1 <= config.layer <= depth:
        raise InputError(
            found=f"encoders.text.layer = {config.layer}",
            required=f"-{depth + 1} to {depth}: the embeddings and {depth} layers",
            remedy="set encoders.text.layer within this range; -1 is the last",
        )
    layer = config.layer % (depth + 1)
    return None if layer == depth else layer


def _model_class(model_config: Any) -> Any:
    """The encoder alone for T5 and its like, CLIP's text tower, otherwise the whole model."""
    import transformers

    if type(model_config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _load_tokenizer(location: Location) -> Any:
    from transformers import AutoTokenizer

    with loading_errors(location):
        tokenizer = AutoTokenizer.from_pretrained(
            location.source,
            revision=location.revision,
            padding_side="right",
            truncation_side="right",
        )
    if tokenizer.pad_token is None:
        # Padding is masked, so any token serves; decoder-only models often have no other.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
