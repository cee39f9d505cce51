"""Language models read as encoders: which ones, what of a checkpoint is loaded, texts → hidden states.

Every family is named here with what differs about it, and others are refused: a model read in a way
it was not trained for gives numbers that look like features. Texts are padded on the right and the
padding is masked, so a text gives what the model gives for it alone (T5, BERT), or the causal mask
does the same (decoder-only models, CLIP). Two families need more:

- SigLIP's text tower (arXiv:2303.15343, and SigLIP2, arXiv:2502.14786) was trained on lower-case
  captions padded to all its positions, and attends to the padding. It is run so here, whatever
  `max_length` is; the features of the padding are then dropped as for every other model.
- Gemma 2 caps its attention logits (arXiv:2408.00118), which fused attention leaves out without a
  word. It is run with the library's plain attention, slower but what was trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import TransformersText
from dsr_scale.encoders.loading import load_transformer, loading_errors, require_equal
from dsr_scale.encoders.locate import Location, locate


class Family(NamedTuple):
    """What differs between language models of the transformers library."""

    model_class: str
    dropped_prefix: str | None = None
    """Regular expression of what stands before the weights' names in published checkpoints, where
    the library does not take it off itself."""
    reads_padding: bool = False
    """Trained on lower-case text padded to all positions, without a mask."""


GEMMA3_PREFIX = r"^((model|language_model)\.)+"
"""`model.` in text-only checkpoints, `language_model.model.` or `model.language_model.` with vision."""

FAMILIES: dict[str, Family] = {
    "bert": Family("BertModel"),
    "clip": Family("CLIPTextModel"),
    "clip_text_model": Family("CLIPTextModel"),
    "gemma2": Family("Gemma2Model"),
    "gemma3": Family("Gemma3TextModel", dropped_prefix=GEMMA3_PREFIX),
    "gemma3_text": Family("Gemma3TextModel", dropped_prefix=GEMMA3_PREFIX),
    "llama": Family("LlamaModel"),
    "mt5": Family("MT5EncoderModel"),
    "qwen2": Family("Qwen2Model"),
    "qwen3": Family("Qwen3Model"),
    "siglip": Family("SiglipTextModel", reads_padding=True),
    "siglip2": Family("Siglip2TextModel", reads_padding=True),
    "siglip2_text_model": Family("Siglip2TextModel", reads_padding=True),
    "siglip_text_model": Family("SiglipTextModel", reads_padding=True),
    "t5": Family("T5EncoderModel"),
    "umt5": Family("UMT5EncoderModel"),
}
"""By `model_type` of the checkpoint's config. Qwen 2.5 calls itself qwen2; `siglip` is SigLIP, and
SigLIP2 of fixed resolution, `siglip2` its variant for any aspect ratio."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model with its tokenizer, read at one layer."""

    network: Any
    tokenizer: Any
    layer: int | None
    """Index among the embeddings' and blocks' outputs; None for the last one, after its norm."""
    max_length: int
    """L, the tokens kept of a text."""
    padded_length: int
    """Tokens of every forward pass."""
    reads_padding: bool

    @torch.no_grad()
    def hidden_states(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """N texts → features [N,L,C] on the device, zero in the padding, and token counts [N] on the host."""
        tokens, lengths = self._tokenise(texts)
        arguments: dict[str, Any] = {"input_ids": tokens.to(device)}
        if not self.reads_padding:
            # A row without any token would divide by zero in the softmax; it is zeroed below.
            attended = prefix_mask(lengths.clamp(min=1), self.padded_length)
            arguments["attention_mask"] = attended.long().to(device)
        output = self.network(**arguments, output_hidden_states=self.layer is not None)
        hidden = (
            output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        )
        mask = prefix_mask(lengths.to(device), self.max_length)
        return hidden[:, : self.max_length].masked_fill(~mask[:, :, None], 0), lengths

    def _tokenise(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids [N, padded length] and token counts [N], both on the host."""
        if self.reads_padding:
            # The tokenizer files of SigLIP2 name Gemma's tokenizer, which keeps capitals.
            texts = [text.lower() for text in texts]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
        # Where padding is masked any token serves; decoder-only models often have none for it.
        padding = self.tokenizer.pad_token_id or 0
        ids = pad_sequence(rows, batch_first=True, padding_value=padding)
        ids = functional.pad(ids, (0, self.padded_length - ids.shape[1]), value=padding)
        return ids, torch.tensor([len(row) for row in rows])


def prefix_mask(lengths: Tensor, length: int) -> Tensor:
    """Token counts [N] → bool [N, length], True for the first tokens of each row."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def load_language_model(config: TransformersText, *, device: torch.device) -> LanguageModel:
    """The text part of the checkpoint that `config` names, frozen, on the device.

    Raises InputError when it cannot be loaded, is of no known family, or has another width, fewer
    layers or fewer positions than `config` says.
    """
    location = locate(config.model, config.revision)
    family = _family(location)
    model_class, text_config = _class_and_config(family, location)
    layer = _checked_layer(config, text_config, location)
    tokenizer = _load_tokenizer(location, family)
    options: dict[str, Any] = {}
    if family.dropped_prefix:
        options["key_mapping"] = {family.dropped_prefix: ""}
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"
    network = load_transformer(
        model_class, location, dtype=config.dtype, device=device, config=text_config, **options
    )
    return LanguageModel(
        network=network,
        tokenizer=tokenizer,
        layer=layer,
        max_length=config.max_length,
        padded_length=(
            text_config.max_position_embeddings if family.reads_padding else config.max_length
        ),
        reads_padding=family.reads_padding,
    )


def _family(location: Location) -> Family:
    """By the checkpoint's own config: the library cannot find the class of a lone SigLIP text tower."""
    declare_torchvision_operators()
    from transformers.utils.hub import cached_file

    with loading_errors(location):
        file = cached_file(location.source, "config.json", revision=location.revision)
        model_type = json.loads(Path(str(file)).read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            found=f"{location.source} of type {model_type}",
            required=f"a language model of type {', '.join(FAMILIES)}",
            remedy="choose a checkpoint of one of these families for encoders.text.model",
        )
    return FAMILIES[model_type]


def _class_and_config(family: Family, location: Location) -> tuple[Any, Any]:
    """A class that reads text, and its config, which the library cuts out of that of two towers."""
    import transformers

    model_class = getattr(transformers, family.model_class)
    with loading_errors(location):
        config = model_class.config_class.from_pretrained(
            location.source, revision=location.revision
        )
    return model_class, config


def _checked_layer(config: TransformersText, text_config: Any, location: Location) -> int | None:
    """Index among the embeddings' and blocks' outputs; None for the last one, after its norm."""
    require_equal("encoders.text.channels", config.channels, text_config.hidden_size, location)
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise InputError(
            found=f"encoders.text.max_length = {config.max_length}",
            required=f"at most {longest}, the positions that {location.source} has",
            remedy=f"set encoders.text.max_length to {longest} or less",
        )
    depth = text_config.num_hidden_layers
    if not -depth - 1 <= config.layer <= depth:
        raise InputError(
            found=f"encoders.text.layer = {config.layer}",
            required=f"-{depth + 1} to {depth}: the embeddings and {depth} layers",
            remedy="set encoders.text.layer within this range; -1 is the last",
        )
    layer = config.layer % (depth + 1)
    return None if layer == depth else layer


def _load_tokenizer(location: Location, family: Family) -> Any:
    from transformers import AutoTokenizer

    with loading_errors(location):
        tokenizer = AutoTokenizer.from_pretrained(
            location.source, revision=location.revision, truncation_side="right"
        )
    if family.reads_padding and tokenizer.pad_token_id is None:
        raise InputError(
            found=f"{location.source} with a tokenizer without padding token",
            required="the padding that this model was trained to read",
            remedy="download the tokenizer files of this model again",
        )
    return tokenizer
