"""Text and class conditions: padding is invisible, null ignores text, grids interpolate."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.model import (
    ClassConditioning,
    ConditioningConfig,
    CrossAttentionConditioning,
    HeadConfig,
    InContextConditioning,
    QueryAdaLNConditioning,
)
from dsr_scale.model import layers
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition, QueryEmbedder, concatenate
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import SwiGLU, require_flash

TextKind = Literal["bytes", "features"]
TEXT_KINDS: list[ConditioningConfig] = [
    CrossAttentionConditioning(),
    InContextConditioning(),
    QueryAdaLNConditioning(connector_depth=2),
]
CASES = [
    (kind, text, head)
    for kind in TEXT_KINDS
    for text in ("features", "bytes")
    for head in (None, HeadConfig(width=48, depth=1, heads=4))
]


def make_model(
    kind: ConditioningConfig, text: Literal["none", "bytes", "features"], head: HeadConfig | None
) -> DiT:
    """A small model with registers and with every zero-initialised layer opened."""
    shape = ModelShape(
        width=32,
        depth=3,
        heads=2,
        head=head,
        patch=1,
        channels=4,
        grid=(4, 4),
        registers=4,
        register_start=1,
        conditioning=kind,
        text_kind=text,
        text_channels=6 if text == "features" else 0,
        text_length=5,
        qk_norm=False,
        attention="sdpa",
    )
    model = build_model(shape, seed=0)
    generator = torch.Generator().manual_seed(5)
    padding = {id(p) for m in model.modules() if isinstance(m, SwiGLU) for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() and id(parameter) not in padding:
                scale = 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def captions(text: TextKind, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if text == "bytes":
        return torch.randint(0, 256, (2, length), generator=generator)
    return torch.randn(2, length, 6, generator=generator)


def run(model: DiT, condition: Condition, size: tuple[int, int] = (4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(len(condition.null), 4, *size, generator=generator)
    with torch.no_grad():
        return model(latents, torch.linspace(0.2, 0.9, len(condition.null)), condition)


def padded(tokens: Tensor, to: int, garbage: Tensor) -> tuple[Tensor, Tensor]:
    extra = to - tokens.shape[1]
    mask = torch.arange(to).expand(len(tokens), to) < tokens.shape[1]
    return torch.cat([tokens, garbage[:, :extra]], dim=1), mask


@pytest.mark.parametrize(("kind", "text", "head"), CASES)
def test_padding_is_invisible(
    kind: ConditioningConfig, text: TextKind, head: HeadConfig | None
) -> None:
    model = make_model(kind, text, head)
    null = torch.tensor([False, False])
    words = captions(text, 5, seed=1)
    plain = run(model, Condition(null=null, tokens=words))
    for seed, length in ((2, 6), (3, 9)):
        garbage = captions(text, 8, seed)
        if text == "features":
            garbage = garbage * 1e4
            garbage[0, 0, 0] = float("nan")
        tokens, mask = padded(words, length, garbage)
        torch.testing.assert_close(
            run(model, Condition(null=null, tokens=tokens, mask=mask)), plain, atol=2e-5, rtol=1e-4
        )
    other = run(model, Condition(null=null, tokens=captions(text, 5, seed=4)))
    assert (other - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "text", "head"), CASES)
def test_null_ignores_the_text(
    kind: ConditioningConfig, text: TextKind, head: HeadConfig | None
) -> None:
    model = make_model(kind, text, head)
    null = torch.tensor([True, True])
    first = run(model, Condition(null=null, tokens=captions(text, 5, seed=1)))
    second = run(model, Condition(null=null, tokens=captions(text, 5, seed=2)))
    assert torch.equal(first, second)
    without_text = run(model, Condition(null=null))
    torch.testing.assert_close(without_text, first, atol=2e-5, rtol=1e-4)
    empty = Condition(
        null=~null,
        tokens=captions(text, 5, seed=3),
        mask=torch.zeros(2, 5, dtype=torch.bool),
    )
    torch.testing.assert_close(run(model, empty), first, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "text", "head"), CASES)
def test_both_branches_in_one_batch_equal_two_calls(
    kind: ConditioningConfig, text: TextKind, head: HeadConfig | None
) -> None:
    model = make_model(kind, text, head)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    condition = Condition(
        null=torch.tensor([False, False]), tokens=captions(text, 5, seed=1), mask=mask
    )
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.4, 0.4])
    with torch.no_grad():
        joint = model(
            latents.repeat(2, 1, 1, 1), t.repeat(2), concatenate(condition, condition.as_null())
        )
        apart = torch.cat([model(latents, t, condition), model(latents, t, condition.as_null())])
    torch.testing.assert_close(joint, apart, atol=2e-5, rtol=1e-4)
    assert (apart[:2] - apart[2:]).abs().max() > 1e-3


def test_class_null_is_the_last_row() -> None:
    model = make_model(ClassConditioning(num_classes=5), "none", None)
    labels = torch.tensor([1, 4])
    condition = Condition(null=torch.tensor([False, False]), labels=labels)
    null = run(model, condition.as_null())
    assert torch.equal(null, run(model, Condition(null=torch.tensor([True, True]))))
    by_hand = replace(condition, labels=torch.tensor([5, 5]))
    assert torch.equal(null, run(model, by_hand))
    assert not torch.equal(null, run(model, condition))


def test_cross_attention_starts_as_the_identity() -> None:
    """At initialisation the text reaches a model with open AdaLN through the pooled vector alone."""
    model = make_model(CrossAttentionConditioning(), "features", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".cross.proj." in name or name == "y_embedder.pooled_mlp.2.weight":
                parameter.zero_()
    null = torch.tensor([False, False])
    first = run(model, Condition(null=null, tokens=captions("features", 5, seed=1)))
    second = run(model, Condition(null=null, tokens=captions("features", 5, seed=2)))
    assert torch.equal(first, second)
    fresh = build_model(model.shape, seed=0)
    assert not any(fresh.get_parameter(f"blocks.{i}.cross.proj.weight").any() for i in range(3))


def test_query_condition_is_per_token_with_the_mean_for_registers() -> None:
    model = make_model(QueryAdaLNConditioning(connector_depth=1), "features", None)
    condition = Condition(null=torch.tensor([False, True]), tokens=captions("features", 5, seed=1))
    layout = model.layout(4, 4, condition)
    with torch.no_grad():
        signal = model.signal(torch.tensor([0.3, 0.3]), condition, layout)
        y = model.y_embedder(condition, (4, 4)).vector
    t_emb = signal.t_emb
    torch.testing.assert_close(signal.c[:, 4:], t_emb + y)
    for register in range(4):
        torch.testing.assert_close(signal.c[:, register], t_emb[:, 0] + y.mean(1))
    assert (y[0].std(dim=0) > 1e-3).all()
    torch.testing.assert_close(y[1], model.get_parameter("y_embedder.null_token")[0].expand(16, -1))


def test_queries_are_interpolated_bicubically_to_other_grids() -> None:
    model = make_model(QueryAdaLNConditioning(connector_depth=1), "features", None)
    embedder = model.y_embedder
    assert isinstance(embedder, QueryEmbedder)
    assert embedder.queries_for((4, 4)) is embedder.queries
    # Bicubic interpolation reproduces a plane away from the borders, row-major order included.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        embedder.queries[0, :, 0] = (10 * rows + columns).flatten()
    wide = embedder.queries_for((4, 8))[0, :, 0].detach().reshape(4, 8)
    image = functional.interpolate(
        (10 * rows + columns)[None, None], (4, 8), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(wide, image[0, 0])
    assert torch.allclose(wide[3] - wide[0], torch.tensor(30.0))
    condition = Condition(null=torch.tensor([False]), tokens=captions("features", 5, 1)[:1])
    assert run(model, condition, size=(2, 8)).isfinite().all()


@pytest.mark.parametrize("kind", TEXT_KINDS, ids=lambda kind: kind.kind)
def test_word_order_matters_to_bytes(kind: ConditioningConfig) -> None:
    model = make_model(kind, "bytes", None)
    tokens = captions("bytes", 5, seed=1)
    null = torch.tensor([False, False])
    forward = run(model, Condition(null=null, tokens=tokens))
    backward = run(model, Condition(null=null, tokens=tokens.flip(1)))
    assert (forward - backward).abs().max() > 1e-3


def test_blocks_compile_whole_and_agree() -> None:
    """Every block traces without a graph break, so that regional compilation is possible."""
    model = make_model(
        CrossAttentionConditioning(), "features", HeadConfig(width=48, depth=1, heads=4)
    )
    condition = Condition(null=torch.tensor([False, True]), tokens=captions("features", 5, 1))
    plain = run(model, condition)
    for block in model.blocks.values():
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model, condition), plain)


def test_condition_moves_only_features_to_the_dtype() -> None:
    condition = Condition(
        null=torch.tensor([False]),
        labels=torch.tensor([3]),
        tokens=torch.randn(1, 2, 3),
        mask=torch.ones(1, 2, dtype=torch.bool),
    ).to("cpu", torch.bfloat16)
    assert condition.tokens is not None and condition.tokens.dtype == torch.bfloat16
    assert condition.labels is not None and condition.labels.dtype == torch.int64
    assert condition.mask is not None and condition.mask.dtype == torch.bool
    assert condition.null.dtype == torch.bool


def stand_in_for_flash_attn() -> ModuleType:
    """A package with flash-attn's function and layout [B,N,h,d], for a machine without a GPU."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # pyright: ignore[reportAttributeAccessIssue]
    return package


def test_blocks_with_flash_attention_compile_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training compiles them: fullgraph, so nothing may be left to the interpreter."""
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in_for_flash_attn())
    monkeypatch.setattr(layers, "require_flash", lambda device: None)  # the device is a CPU
    plain = make_model(ClassConditioning(num_classes=3), "none", None)
    flash = DiT(plain.shape.model_copy(update={"attention": "flash"}))
    flash.load_state_dict(plain.state_dict())
    for block in flash.blocks.values():
        block.compile(fullgraph=True, backend="eager")
    condition = Condition(null=torch.tensor([False, True]), labels=torch.tensor([2, 0]))
    torch.testing.assert_close(run(flash, condition), run(plain, condition))


def test_flash_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CrossAttentionConditioning(), "features", None)
    shape = model.shape.model_copy(update={"attention": "flash"})
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash = build_model(shape, seed=0)
    with pytest.raises(InputError, match="cannot be imported"):
        run(flash, Condition(null=torch.tensor([True])))
    with pytest.raises(InputError, match="cannot be imported"):
        require_flash(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in_for_flash_attn())
    require_flash(torch.device("cuda"))
    flash = build_model(shape, seed=0)
    for call in (
        lambda: run(flash, Condition(null=torch.tensor([True]))),
        lambda: require_flash(torch.device("cpu")),
    ):
        with pytest.raises(InputError, match="on the device cpu"):
            call()
    in_context = model.shape.model_copy(
        update={"attention": "flash", "conditioning": InContextConditioning()}
    )
    with pytest.raises(InputError, match="mask"):
        build_model(in_context, seed=0)
