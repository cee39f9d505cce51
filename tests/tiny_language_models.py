"""Tiny random language models of every supported family, saved with a word tokenizer made here.

A checkpoint is saved as it is published: T5 with its decoder, decoder-only models with their head,
CLIP and SigLIP with both towers, Gemma 3 with its vision part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
import transformers  # noqa: E402

WIDTH, POSITIONS, DEPTH = 16, 40, 3
PAD, UNKNOWN, EOS = 0, 1, 2
WORDS = ["<pad>", "<unk>", "<eos>", ":", "an"]
WORDS += ["a", "blue", "bus", "cat", "dog", "in", "of", "on", "photo", "red", "sits", "the", "two"]
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
T5: dict[str, Any] = {"vocab_size": len(WORDS), "d_model": WIDTH, "d_kv": 8, "d_ff": 24}
T5 |= {"num_layers": DEPTH, "num_heads": 2, "decoder_start_token_id": PAD}
VISION: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION |= {"image_size": 8, "patch_size": 8, "intermediate_size": 8}
SLIDING_WINDOW = 4
"""Shorter than the captions, so that a wrong window shows."""


class Tiny(NamedTuple):
    """How a checkpoint is made, and what reads its text."""

    make: Callable[[], Any]
    text_part: Callable[[Any], Any]
    ends_with_eos: bool = True
    """Whether the tokenizer of this family puts an end token after a text."""


def _gemma3_text() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(
        **DECODER, sliding_window=SLIDING_WINDOW, layer_types=kinds, query_pre_attn_scalar=8
    )


def _gemma3() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=_gemma3_text(), vision_config=vision, mm_tokens_per_image=1
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gemma2() -> Any:
    # Queries are scaled up until the cap bites: left out, it would change the result.
    config = transformers.Gemma2Config(**DECODER, sliding_window=SLIDING_WINDOW)
    config.attn_logit_softcapping, config.query_pre_attn_scalar = 2.0, 1
    config._attn_implementation = "eager"
    return transformers.Gemma2ForCausalLM(config)


def _two_towers(name: str, vision: dict[str, Any] = VISION) -> Any:
    config = getattr(transformers, f"{name}Config")(text_config=SMALL, vision_config=vision)
    return getattr(transformers, f"{name}Model")(config)


def _text_tower(name: str) -> Any:
    config = getattr(transformers, f"{name}TextConfig")(**SMALL)
    return getattr(transformers, f"{name}TextModel")(config)


def _t5(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**T5)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _decoder_only(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**DECODER, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


TINY: dict[str, Tiny] = {
    "t5": Tiny(lambda: _t5("T5"), lambda model: model.encoder),
    "t5 encoder": Tiny(
        lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        lambda model: model.encoder,
    ),
    "mt5": Tiny(lambda: _t5("MT5"), lambda model: model.encoder),
    "umt5": Tiny(lambda: _t5("UMT5"), lambda model: model.encoder),
    "clip": Tiny(lambda: _two_towers("CLIP"), lambda model: model.text_model),
    "clip text": Tiny(lambda: _text_tower("CLIP"), lambda model: model),
    "siglip": Tiny(lambda: _two_towers("Siglip"), lambda model: model.text_model),
    "siglip text": Tiny(lambda: _text_tower("Siglip"), lambda model: model),
    "siglip2": Tiny(
        lambda: _two_towers("Siglip2", {**VISION, "num_patches": 4}),
        lambda model: model.text_model,
    ),
    "siglip2 text": Tiny(lambda: _text_tower("Siglip2"), lambda model: model),
    "gemma2": Tiny(_gemma2, lambda model: model.model, False),
    "gemma3": Tiny(_gemma3, lambda model: model.model.language_model, False),
    "gemma3 text": Tiny(
        lambda: transformers.Gemma3ForCausalLM(_gemma3_text()), lambda model: model.model, False
    ),
    "qwen2": Tiny(lambda: _decoder_only("Qwen2"), lambda model: model.model, False),
    "qwen3": Tiny(lambda: _decoder_only("Qwen3"), lambda model: model.model, False),
    "llama": Tiny(lambda: _decoder_only("Llama"), lambda model: model.model, False),
    "bert": Tiny(
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        lambda model: model.bert,
    ),
}


def save_tiny(directory: Path, name: str, pad_token: str | None = "<pad>") -> Any:
    """Writes model and tokenizer, and returns the model; its weights are the same every time."""
    torch.manual_seed(0)
    model = TINY[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    save_word_tokenizer(directory, ends_with_eos=TINY[name].ends_with_eos, pad_token=pad_token)
    return model


def save_word_tokenizer(
    directory: Path, *, ends_with_eos: bool, pad_token: str | None = "<pad>"
) -> None:
    """One token per word between spaces, capitals kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends_with_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", EOS)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)


def token_ids(text: str, name: str, length: int) -> list[int]:
    """What the tokenizer of that model gives for `text`, cut to `length`, counted by hand."""
    ids = [WORDS.index(word) if word in WORDS else UNKNOWN for word in text.split()]
    return [*ids[: length - 1], EOS] if TINY[name].ends_with_eos else ids[:length]


@torch.no_grad()
def hidden_by_hand(model: Any, name: str, text: str, layer: int, length: int) -> torch.Tensor:
    """[L',C] of one text alone, without mask; `layer` DEPTH is the last, normed.

    Without padding, but for SigLIP: its published use pads to all positions and has no mask.
    """
    ids = token_ids(text, name, length)
    count = len(ids)
    if name.startswith("siglip"):
        ids = [*ids, *[PAD] * (POSITIONS - count)]
    part = TINY[name].text_part(model)
    if layer == DEPTH:
        return part(input_ids=torch.tensor([ids])).last_hidden_state[0, :count]
    # Taken from the network itself, not from the library's list of hidden states.
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in _blocks(part)
    ]
    part(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert len(seen) == DEPTH
    return seen[layer][0, :count]


def _blocks(part: torch.nn.Module) -> torch.nn.ModuleList:
    (blocks,) = [
        module
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.split(".")[-1] in ("layers", "layer", "block")
        and len(module) == DEPTH
    ]
    return blocks
