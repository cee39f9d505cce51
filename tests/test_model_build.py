"""Construction: published sizes, published initial values, determinism, decay groups, bad shapes."""

from __future__ import annotations

import math

import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape, hidden_width, padded_hidden_width
from dsr_scale.config.model import (
    ClassConditioning,
    CrossAttentionConditioning,
    HeadConfig,
    ModelConfig,
    QueryAdaLNConditioning,
)
from dsr_scale.config.presets import with_preset
from dsr_scale.model.build import build_model, build_on_meta, decay_groups
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.initialisation import initial_values
from dsr_scale.model.layers import SwiGLU


def preset_shape(name: str, registers: int = 0) -> ModelShape:
    model = with_preset(ModelConfig(preset=name))
    return ModelShape(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        head=model.head,
        patch=1,
        channels=768,
        grid=(16, 16),
        registers=registers,
        register_start=8,
        conditioning=ClassConditioning(num_classes=1000),
        text_kind="none",
        text_channels=0,
        text_length=0,
        qk_norm=False,
        attention="sdpa",
    )


def small_shape(**changes: object) -> ModelShape:
    fields = preset_shape("DiT-S").model_dump()
    fields |= {"width": 96, "depth": 2, "heads": 2, "register_start": 1, "registers": 4}
    fields |= {"channels": 16, "grid": (4, 4)}
    return ModelShape.model_validate(fields | changes)


def published_parameters(shape: ModelShape) -> int:
    """Parameters of the shape less the zero padding of its SwiGLUs."""
    model = build_on_meta(shape)
    padding = 0
    for module in model.modules():
        if isinstance(module, SwiGLU):
            width = module.w3.out_features
            padding += (padded_hidden_width(width) - hidden_width(width)) * (3 * width + 2)
    return sum(parameter.numel() for parameter in model.parameters()) - padding


@pytest.mark.parametrize(("name", "millions"), [("DiT-XL", 676), ("DiT-DH-XL", 839)])
def test_published_parameter_counts(name: str, millions: int) -> None:
    """Ours are 676.95 and 838.38 million; the papers round down and up, and fixed tables may count."""
    assert abs(published_parameters(preset_shape(name)) / 1e6 - millions) < 1


def test_published_register_parameters() -> None:
    """41 472 in DiT-XL, 115 200 with the DDT head (docs/method.md §2)."""
    for name, extra in (("DiT-XL", 41_472), ("DiT-DH-XL", 115_200)):
        with_registers = published_parameters(preset_shape(name, registers=36))
        assert with_registers - published_parameters(preset_shape(name)) == extra


def test_state_dict_names_are_the_published_ones() -> None:
    plain = set(build_on_meta(preset_shape("DiT-XL", 36)).state_dict())
    block = {
        "norm1.weight",
        "norm2.weight",
        *(
            f"{m}.{p}"
            for m in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
            for p in ("weight", "bias")
        ),
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    }
    around = {
        "t_embedder.W",
        *(f"t_embedder.mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
        "y_embedder.embedding_table.weight",
        "final_layer.norm_final.weight",
        *(
            f"final_layer.{m}.{p}"
            for m in ("linear", "adaLN_modulation.1")
            for p in ("weight", "bias")
        ),
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
    }
    expected = {f"blocks.{i}.{name}" for i in range(28) for name in block}
    assert plain == expected | around | {"register_tokens"}
    wide = set(build_on_meta(preset_shape("DiT-DH-XL", 36)).state_dict())
    expected |= {f"blocks.{i}.{name}" for i in (28, 29) for name in block}
    assert wide == expected | around | {
        "enc_register_tokens",
        "dec_register_tokens",
        *(f"{m}.{p}" for m in ("s_embedder.proj", "s_projector") for p in ("weight", "bias")),
    }


def test_a_seed_fixes_every_value_and_disturbs_no_global_state() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_model(small_shape(), seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = build_model(small_shape(), seed=4).state_dict()
    other = build_model(small_shape(), seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.unique().numel() > 2]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())


def test_values_drawn_one_by_one_equal_the_built_model() -> None:
    """What sharded construction relies on: any tensor, alone, from the meta model."""
    shape = small_shape()
    state = build_model(shape, seed=4).state_dict()
    draws = dict(initial_values(build_on_meta(shape), 4))
    assert set(draws) == set(state)
    for name in reversed(list(draws)):
        assert torch.equal(draws[name](), state[name])


def is_uniform(tensor: torch.Tensor, bound: float) -> bool:
    std = bound / math.sqrt(3)
    near_bound = 0.97 * bound < tensor.abs().max().item() <= bound
    return near_bound and abs(tensor.std().item() / std - 1) < 0.05


def is_normal(tensor: torch.Tensor, std: float) -> bool:
    close = abs(tensor.std().item() / std - 1) < 0.1
    return close and tensor.abs().max().item() > 2.5 * std


@pytest.mark.parametrize("head", [None, HeadConfig(width=160, depth=1, heads=4)])
def test_initial_values_are_the_published_ones(head: HeadConfig | None) -> None:
    model = build_model(small_shape(head=head, registers=36), seed=0)
    weight = model.get_parameter
    hidden, padded = hidden_width(96), padded_hidden_width(96)
    qkv = weight("blocks.0.attn.qkv.weight")
    w12 = weight("blocks.0.mlp.w12.weight")
    logical = torch.cat([w12[:hidden], w12[padded : padded + hidden]])
    assert w12.count_nonzero() == logical.numel()
    w3 = weight("blocks.0.mlp.w3.weight")[:, :hidden]
    if head is None:
        assert is_uniform(qkv, math.sqrt(6 / (96 + 288)))
        assert is_uniform(logical, math.sqrt(6 / (96 + 2 * hidden)))
        assert is_uniform(w3, math.sqrt(6 / (96 + hidden)))
        for name in ("blocks.0.attn.qkv", "blocks.0.mlp.w12", "t_embedder.mlp.0"):
            assert not weight(f"{name}.bias").any()
        registers = ["register_tokens"]
    else:
        assert is_uniform(qkv, 1 / math.sqrt(96))
        assert is_uniform(logical, 1 / math.sqrt(96))
        assert is_uniform(w3, 1 / math.sqrt(hidden))
        assert is_uniform(weight("blocks.0.attn.qkv.bias"), 1 / math.sqrt(96))
        assert is_uniform(weight("s_projector.weight"), 1 / math.sqrt(96))
        assert is_uniform(weight("s_embedder.proj.weight"), math.sqrt(6 / (96 + 16)))
        registers = ["enc_register_tokens", "dec_register_tokens"]
    patch_width = 96 if head is None else 160
    assert is_uniform(weight("x_embedder.proj.weight"), math.sqrt(6 / (patch_width + 16)))
    assert not weight("x_embedder.proj.bias").any()
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert is_normal(weight(f"{name}.weight"), 0.02)
    assert is_normal(model.get_buffer("t_embedder.W"), 1.0)
    assert all(is_normal(weight(name), 1.0) for name in registers)
    modulations = [f"blocks.{i}.adaLN_modulation.1" for i in range(len(model.blocks))]
    for name in [*modulations, "final_layer.adaLN_modulation.1", "final_layer.linear"]:
        assert not weight(f"{name}.weight").any() and not weight(f"{name}.bias").any()
    for name in ("blocks.0.norm1", "final_layer.norm_final"):
        assert weight(f"{name}.weight").eq(1).all()


def test_query_initial_values() -> None:
    shape = small_shape(
        conditioning=QueryAdaLNConditioning(), text_kind="features", text_channels=8, text_length=4
    )
    model = build_model(shape, seed=0)
    assert is_normal(model.get_parameter("y_embedder.queries"), 1 / math.sqrt(96))


@pytest.mark.parametrize("text_kind", ["bytes", "features"])
def test_matrices_decay_and_nothing_else(text_kind: str) -> None:
    shape = small_shape(
        conditioning=QueryAdaLNConditioning(),
        text_kind=text_kind,
        text_channels=8 if text_kind == "features" else 0,
        text_length=4,
        head=HeadConfig(width=160, depth=1, heads=4),
        qk_norm=True,
    )
    model = build_model(shape, seed=0)
    decay, spared = decay_groups(model)
    assert len(decay) + len(spared) == len(list(model.parameters()))
    matrices = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert {name for name, _ in decay} == matrices


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"width": 90}, "model.width"),
        ({"head": HeadConfig(width=100, depth=1, heads=16)}, "model.head.width"),
        ({"patch": 3}, "model.patch"),
        ({"register_start": 2}, "model.registers.start"),
        ({"conditioning": CrossAttentionConditioning()}, "encoders.text"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        build_model(small_shape(**changes), seed=0)


def test_latents_that_do_not_fit_are_refused() -> None:
    model = build_model(small_shape(patch=2), seed=0)
    condition = Condition(null=torch.tensor([True]))
    with pytest.raises(InputError, match=r"model\.patch"):
        model(torch.zeros(1, 16, 4, 3), torch.tensor([0.5]), condition)
