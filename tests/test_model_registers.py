"""Diffusion registers: absent they change nothing, permuted they change nothing, and they learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsr_scale.config.derive import ModelShape, hidden_width, padded_hidden_width
from dsr_scale.config.model import (
    ClassConditioning,
    ConditioningConfig,
    CrossAttentionConditioning,
    HeadConfig,
    InContextConditioning,
    QueryAdaLNConditioning,
)
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import SwiGLU
from dsr_scale.model.layout import Rows, TokenLayout
from dsr_scale.model.positions import register_grid, rope, sincos_2d

HEADS = [None, HeadConfig(width=48, depth=2, heads=4)]
KINDS: list[ConditioningConfig] = [
    ClassConditioning(num_classes=5),
    CrossAttentionConditioning(),
    InContextConditioning(),
    QueryAdaLNConditioning(connector_depth=1),
]


def make_shape(
    conditioning: ConditioningConfig, head: HeadConfig | None, registers: int, start: int = 1
) -> ModelShape:
    text = conditioning.kind != "class"
    return ModelShape(
        width=32,
        depth=3,
        heads=2,
        head=head,
        patch=1,
        channels=4,
        grid=(4, 4),
        registers=registers,
        register_start=start,
        conditioning=conditioning,
        text_kind="features" if text else "none",
        text_channels=6 if text else 0,
        text_length=5 if text else 0,
        qk_norm=False,
        attention="sdpa",
    )


def make_condition(shape: ModelShape) -> Condition:
    null = torch.tensor([False, True])
    if shape.text_kind == "none":
        return Condition(null=null, labels=torch.tensor([1, 3]))
    generator = torch.Generator().manual_seed(7)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    return Condition(null=null, tokens=torch.randn(2, 5, 6, generator=generator), mask=mask)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([0.2, 0.9])


def open_gates(model: DiT) -> None:
    """Gives every zero-initialised layer random weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                scale = 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, SwiGLU):  # its biases start at zero, its padding must stay there
                width = module.w3.out_features
                hidden, padded = hidden_width(width), padded_hidden_width(width)
                module.w12.bias[hidden:padded] = 0
                module.w12.bias[padded + hidden :] = 0


def run_probed(model: DiT, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the tokens that left each block."""
    states: dict[str, Tensor] = {}

    def probe(name: str, tokens: Tensor, layout: TokenLayout) -> None:
        states[name] = tokens

    return model(*inputs(), condition, probe=probe), states


@pytest.mark.parametrize("head", HEADS, ids=["dit", "dh"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_other_parameters_do_not_depend_on_the_number_of_registers(
    kind: ConditioningConfig, head: HeadConfig | None
) -> None:
    without = build_model(make_shape(kind, head, 0), seed=11).state_dict()
    with_registers = build_model(make_shape(kind, head, 6), seed=11).state_dict()
    extra = set(with_registers) - set(without)
    assert extra and all(name.endswith("register_tokens") for name in extra)
    for name, tensor in without.items():
        assert torch.equal(tensor, with_registers[name]), name


@pytest.mark.parametrize("head", HEADS, ids=["dit", "dh"])
def test_before_their_start_registers_leave_every_bit_as_it_was(head: HeadConfig | None) -> None:
    """Blocks below the start are bit-identical; K = 0 is so to the end, whatever its start."""
    kind = KINDS[0]
    seen: dict[int, dict[str, Tensor]] = {}
    outputs = []
    for registers, start in ((0, 0), (0, 2), (6, 2)):
        shape = make_shape(kind, head, registers, start)
        model = build_model(shape, seed=11)
        open_gates(model)
        with torch.no_grad():
            output, seen[registers] = run_probed(model, make_condition(shape))
        outputs.append(output)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    for name in ("blocks.0", "blocks.1"):
        assert torch.equal(seen[0][name], seen[6][name])
    assert seen[6]["blocks.2"].shape[1] == 16 + 6


@pytest.mark.parametrize("head", HEADS, ids=["dit", "dh"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_permuting_registers_with_their_positions_leaves_the_image_alone(
    kind: ConditioningConfig, head: HeadConfig | None
) -> None:
    shape = make_shape(kind, head, 6)
    model = build_model(shape, seed=1)
    open_gates(model)
    condition = make_condition(shape)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    with torch.no_grad():
        before = model(*inputs(), condition)
        for name, parameter in model.named_parameters():
            if name.endswith("register_tokens"):
                place = sincos_2d(register_grid(6), parameter.shape[2], parameter.device)
                parameter.copy_((parameter + place)[:, order] - place)
        after = model(*inputs(), condition)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        if head is not None:
            # Encoder and decoder registers are paired: a permutation of one set alone is felt.
            dec = model.dec_register_tokens
            place = sincos_2d(register_grid(6), dec.shape[2], dec.device)
            dec.copy_((dec + place)[:, order] - place)
            assert (model(*inputs(), condition) - before).abs().max() > 1e-4


@pytest.mark.parametrize("head", HEADS, ids=["dit", "dh"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_parameter_learns_once_the_gates_are_open_and_padding_never(
    kind: ConditioningConfig, head: HeadConfig | None
) -> None:
    shape = make_shape(kind, head, 6)
    model = build_model(shape, seed=1)
    open_gates(model)
    model(*inputs(), make_condition(shape)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        if name.endswith("register_tokens"):
            assert (parameter.grad.norm(dim=-1) > 0).all()
    for module in model.modules():
        if isinstance(module, SwiGLU):
            width = module.w3.out_features
            hidden, padded = hidden_width(width), padded_hidden_width(width)
            for tensor in (module.w12.weight, module.w12.bias):
                assert tensor.grad is not None
                for start in (hidden, padded + hidden):
                    stop = start + padded - hidden
                    assert not tensor[start:stop].any() and not tensor.grad[start:stop].any()
            assert module.w3.weight.grad is not None
            assert not module.w3.weight[:, hidden:].any()
            assert not module.w3.weight.grad[:, hidden:].any()


@pytest.mark.parametrize(("count", "grid"), [(36, (6, 6)), (4, (2, 2)), (6, (2, 3)), (7, (1, 7))])
def test_registers_stand_on_the_most_square_grid(count: int, grid: tuple[int, int]) -> None:
    assert register_grid(count) == grid
    assert len(sincos_2d(grid, 16, torch.device("cpu"))) == count


def test_rope_turns_image_rows_only_and_survives_inference_mode() -> None:
    rows = Rows(registers=5, text=3, image=12)
    with torch.inference_mode():
        cos, sin = rope(rows, (3, 4), 8, torch.device("cpu"))
    assert not cos.is_inference() and not sin.is_inference()
    assert (cos[:8] == 1).all() and (sin[:8] == 0).all()
    alone, _ = rope(Rows(0, 0, 12), (3, 4), 8, torch.device("cpu"))
    assert torch.equal(cos[8:], alone)


@pytest.mark.parametrize("head", HEADS, ids=["dit", "dh"])
def test_layout_tells_the_rows_that_probes_see(head: HeadConfig | None) -> None:
    shape = make_shape(InContextConditioning(), head, 6)
    model = build_model(shape, seed=0)
    seen: list[tuple[str, int, Rows]] = []

    def probe(name: str, tokens: Tensor, layout: TokenLayout) -> None:
        seen.append((name, tokens.shape[1], layout.at(name)))

    model(*inputs(), make_condition(shape), probe=probe)
    expected = [Rows(0, 5, 16), Rows(6, 5, 16), Rows(6, 5, 16)]
    expected += [] if head is None else [Rows(6, 0, 16)] * 2
    assert [rows for _, _, rows in seen] == expected
    assert [length for _, length, _ in seen] == [rows.total for rows in expected]
