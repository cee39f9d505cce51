"""Every supported language model against the library's called directly, one caption at a time.

Tiny random models of every family (`tiny_language_models.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import (
    DEPTH,
    POSITIONS,
    TINY,
    WIDTH,
    hidden_by_hand,
    save_tiny,
    save_word_tokenizer,
)

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import TransformersText
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.encoders.text_models import FAMILIES
from dsr_scale.encoders.text_transformers import TransformersEncoder

LENGTH = 12
CAPTIONS = ["a red cat", "two dog sits on the blue bus in the red photo of a bus", "dog", ""]


def _build(directory: Path, **changes: Any) -> TransformersEncoder:
    settings = {"max_length": LENGTH, "channels": WIDTH, **changes}
    encoder = build_text_encoder(TransformersText(model=str(directory), **settings), device="cpu")
    assert isinstance(encoder, TransformersEncoder)
    return encoder


def _assert_caption(
    tokens: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor, length: int = LENGTH
) -> None:
    count = len(expected)
    assert mask.tolist() == [True] * count + [False] * (length - count)
    torch.testing.assert_close(tokens[:count], expected, rtol=0, atol=2e-5)
    assert not tokens[count:].any()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every tiny model, by name: its directory, and itself."""
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, save_tiny(root / name, name)) for name in TINY}


def test_every_family_has_a_tiny_model(saved: dict[str, tuple[Path, Any]]) -> None:
    types = {
        json.loads((path / "config.json").read_text())["model_type"] for path, _ in saved.values()
    }
    assert types == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("configured", "layer"), [(-1, DEPTH), (DEPTH, DEPTH), (-2, DEPTH - 1), (1, 1), (0, 0)]
)
def test_features_are_those_of_the_model(
    saved: dict[str, tuple[Path, Any]], name: str, configured: int, layer: int
) -> None:
    path, model = saved[name]
    text = _build(path, layer=configured).encode(CAPTIONS)
    assert text.tokens.shape == (len(CAPTIONS), LENGTH, WIDTH)
    for row, caption in enumerate(CAPTIONS):
        if not caption and not TINY[name].ends_with_eos:
            assert not text.mask[row].any()
            assert not text.tokens[row].any()
            continue
        expected = hidden_by_hand(model, name, caption, layer, LENGTH)
        _assert_caption(text.tokens[row], text.mask[row], expected)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_caption_has_the_same_bits_alone_and_in_a_batch(
    saved: dict[str, tuple[Path, Any]], name: str, dtype: str
) -> None:
    encoder = _build(saved[name][0], dtype=dtype, cache_mib=0)
    together = encoder.encode(CAPTIONS)
    assert together.tokens.isfinite().all()
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.mask[0], together.mask[row])


@pytest.mark.parametrize("name", TINY)
def test_template_and_maximum_length(saved: dict[str, tuple[Path, Any]], name: str) -> None:
    path, model = saved[name]
    template = "a photo of : {caption} : red"
    for length in (5, 20):
        text = _build(path, template=template, max_length=length).encode(CAPTIONS)
        assert text.tokens.shape == (len(CAPTIONS), length, WIDTH)
        for row, caption in enumerate(CAPTIONS):
            filled = f"a photo of : {caption} : red"
            expected = hidden_by_hand(model, name, filled, DEPTH, length)
            _assert_caption(text.tokens[row], text.mask[row], expected, length)


def test_a_capped_model_is_not_run_with_fused_attention(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "gemma2")
    expected = hidden_by_hand(model, "gemma2", CAPTIONS[0], DEPTH, LENGTH)
    ours = _build(tmp_path).encode(CAPTIONS[:1]).tokens[0, : len(expected)]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    for block in model.model.layers:
        block.self_attn.attn_logit_softcapping = None
    without_cap = hidden_by_hand(model, "gemma2", CAPTIONS[0], DEPTH, LENGTH)
    # The cap matters here, so the comparison with the capped model can fail.
    assert (expected - without_cap).abs().max() > 0.01


@pytest.mark.parametrize("name", ["siglip", "siglip2 text"])
def test_siglip_reads_lower_case_and_its_padding(
    saved: dict[str, tuple[Path, Any]], name: str
) -> None:
    path, model = saved[name]
    features = _build(path).encode(["A Red CAT", "a red cat"]).tokens
    assert torch.equal(features[0], features[1])
    # What a caption gives does not depend on how much of it is kept for longer ones.
    longest = _build(path, max_length=POSITIONS).encode(["a red cat"])
    assert torch.equal(longest.tokens[0, :LENGTH], features[1])
    alone = TINY[name].text_part(model)(input_ids=torch.tensor([[5, 14, 8, 2]]))
    assert (alone.last_hidden_state[0] - features[1, :4]).abs().max() > 0.01
    with pytest.raises(InputError, match="max_length to 40 or less"):
        _build(path, max_length=POSITIONS + 1)


def test_siglip_without_its_padding_token_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "siglip", pad_token=None)
    with pytest.raises(InputError, match="tokenizer without padding token"):
        _build(tmp_path)


def test_the_text_part_of_gemma3_is_all_that_is_loaded(saved: dict[str, tuple[Path, Any]]) -> None:
    path, model = saved["gemma3"]
    network = _build(path).network
    assert network is not None
    loaded = {name: parameter.shape for name, parameter in network.named_parameters()}
    text_part = TINY["gemma3"].text_part(model)
    assert loaded == {name: parameter.shape for name, parameter in text_part.named_parameters()}


@pytest.mark.parametrize("model_type", ["bart", "qwen2_5_vl", "t5gemma", "dinov2", None])
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_word_tokenizer(tmp_path, ends_with_eos=True)
    with pytest.raises(InputError, match=f"(?s)of type {model_type}.*bert, clip, .*, umt5"):
        _build(tmp_path)
