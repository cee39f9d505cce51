"""Parameter and FLOP counts against the real model and the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsr_scale.config.costs import forward_flops, parameters, total, training_flops
from dsr_scale.config.derive import ModelShape, hidden_width, model_shape, padded_hidden_width
from dsr_scale.config.run import RunConfig
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import SwiGLU

TEXT = {"kind": "transformers", "model": "x", "channels": 40, "max_length": 12}
BYTES = {"kind": "bytes", "max_length": 9}
NONE = {"kind": "none"}


def run_of(model: dict[str, Any], text: dict[str, Any], **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "directory": "d",
            "data": {"shards": "s", "resolution": 32},
            "encoders": {"image": {"kind": "pixels", "patch": 4}, "text": text},
            "model": {"depth": 4, "heads": 2, **model},
            "training": training,
        }
    )


HEAD = {"width": 80, "depth": 2, "heads": 4}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class": ({"width": 56, "conditioning": {"kind": "class", "num_classes": 7}}, NONE),
    "class, patch 2, no registers": (
        {
            "width": 56,
            "patch": 2,
            "registers": {"count": 0},
            "conditioning": {"kind": "class", "num_classes": 7},
        },
        NONE,
    ),
    "class, head": (
        {"width": 56, "head": HEAD, "conditioning": {"kind": "class", "num_classes": 7}},
        NONE,
    ),
    "class, head of the same width": (
        {"width": 80, "head": HEAD, "conditioning": {"kind": "class", "num_classes": 7}},
        NONE,
    ),
    "cross, features": ({"width": 56, "qk_norm": True}, TEXT),
    "cross, bytes, early registers": (
        {"width": 64, "registers": {"count": 9, "start": 0}},
        BYTES,
    ),
    "in context, features": ({"width": 56, "conditioning": {"kind": "in_context"}}, TEXT),
    "in context, bytes, head": (
        {"width": 56, "head": HEAD, "conditioning": {"kind": "in_context"}},
        BYTES,
    ),
    "queries, features": (
        {"width": 56, "conditioning": {"kind": "query_adaln", "connector_depth": 3}},
        TEXT,
    ),
    "queries, bytes, head": (
        {"width": 56, "head": HEAD, "qk_norm": True, "conditioning": {"kind": "query_adaln"}},
        BYTES,
    ),
}


def condition_of(shape: ModelShape) -> Condition:
    null = torch.zeros(1, dtype=torch.bool)
    if shape.text_kind == "none":
        return Condition(null, labels=torch.zeros(1, dtype=torch.long))
    if shape.text_kind == "bytes":
        return Condition(null, tokens=torch.ones(1, shape.text_length, dtype=torch.long))
    return Condition(null, tokens=torch.randn(1, shape.text_length, shape.text_channels))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    shape = model_shape(run_of(*SHAPES[name]))
    model = build_model(shape, seed=0)
    counted = parameters(shape)
    assert total(counted).stored == sum(p.numel() for p in model.parameters())

    padding = 0
    for module in model.modules():
        if isinstance(module, SwiGLU):
            width = module.w3.out_features
            spare = module.w3.in_features - int(2 / 3 * 4 * width)
            padding += spare * (width + 2 * (width + 1))
    assert padding > 0
    assert total(counted).stored - total(counted).published == padding

    body_adaln = tuple(f"blocks.{index}.adaLN_modulation." for index in range(shape.depth))
    adaln = sum(p.numel() for name, p in model.named_parameters() if name.startswith(body_adaln))
    assert counted["AdaLN"].stored == adaln
    final = sum(p.numel() for p in model.final_layer.parameters())
    assert counted["final"].stored == final


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the matrix products of a real forward; the padding is taken out of the model."""
    from dsr_scale.model import layers

    monkeypatch.setattr(layers, "padded_hidden_width", hidden_width)
    shape = model_shape(run_of(*SHAPES[name]))
    model = DiT(shape).requires_grad_(False)
    latents = torch.randn(1, shape.channels, *shape.grid)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.full((1,), 0.5), condition_of(shape))
    assert sum(forward_flops(shape).values()) == counter.get_total_flops()
    assert training_flops(shape) == 3 * counter.get_total_flops()


def published(preset: str, registers: int, channels: int = 768) -> ModelShape:
    """Class-conditional ImageNet-256: 16×16 tokens."""
    known = {768: "google/siglip2-base-patch16-256", 1152: "google/siglip2-so400m-patch16-256"}
    run = RunConfig.model_validate(
        {
            "name": "t",
            "directory": "d",
            "data": {"shards": "s"},
            "encoders": {
                "image": {"kind": "vit", "model": known[channels]},
                "text": NONE,
                "decoder": NONE,
            },
            "model": {
                "preset": preset,
                "registers": {"count": registers},
                "conditioning": {"kind": "class"},
            },
        }
    )
    return model_shape(run)


@pytest.mark.parametrize(
    ("preset", "without", "with_registers"),
    [("DiT-S", "12.4", "13.7"), ("DiT-B", "46.6", "51.2"), ("DiT-XL", "238.1", "262.9")],
)
def test_published_gflops(preset: str, without: str, with_registers: str) -> None:
    for registers, printed in ((0, without), (36, with_registers)):
        flops = sum(forward_flops(published(preset, registers)).values())
        assert f"{flops / 1e9:.1f}" == printed


def test_published_gflops_and_parameters_of_the_head_variant() -> None:
    flops = sum(forward_flops(published("DiT-DH-XL", 0)).values())
    assert f"{flops / 1e9:.1f}" == "323.2"
    assert f"{total(parameters(published('DiT-DH-XL', 0))).published / 1e6:.0f}" == "838"
    assert f"{total(parameters(published('DiT-XL', 0))).published / 1e6:.0f}" == "677"


def test_registers_cost_their_rows_only() -> None:
    """36 tokens and nothing else; 36·1152 + 36·2048 with the head (docs/method.md §2)."""
    for preset, extra in (("DiT-XL", 41_472), ("DiT-DH-XL", 115_200)):
        with_them, without = (total(parameters(published(preset, k))) for k in (36, 0))
        assert with_them.stored - without.stored == extra


@pytest.mark.parametrize("width", [384, 768, 1152, 1280, 2048, 4096])
def test_hidden_widths(width: int) -> None:
    published_width = {1280: 3413, 2048: 5461, 4096: 10922}.get(width, width * 8 // 3)
    assert hidden_width(width) == published_width
    padded = padded_hidden_width(width)
    assert padded % 128 == 0
    assert 0 <= padded - published_width < 128
