"""Remedies for outliers beside registers: their attention in explicit float64, and what they must not change."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_config_costs import BYTES, HEAD, NONE, TEXT, condition_of, run_of
from test_config_memory import saved_bytes
from test_model_conditioning import stand_in_for_flash_attn
from test_model_registers import KINDS, inputs, make_condition, make_shape, open_gates
from tiny_bundles import write_tiny_bundle
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsr_scale.base.errors import InputError
from dsr_scale.config.checks import check_run
from dsr_scale.config.costs import forward_flops, parameters, total
from dsr_scale.config.derive import ModelShape, hidden_width, model_shape
from dsr_scale.config.load import load_run
from dsr_scale.config.memory import activation_bytes
from dsr_scale.config.model import AttentionVariant, HeadConfig
from dsr_scale.config.rank_parameters import rank_share
from dsr_scale.config.run import RunConfig
from dsr_scale.config.shape_checks import check_shape
from dsr_scale.config.stages import block_costs, num_blocks
from dsr_scale.export.bundle import read_description, read_model, write_bundle
from dsr_scale.model import layers
from dsr_scale.model.build import build_model, decay_groups
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import Attention
from dsr_scale.model.layout import Rows
from dsr_scale.model.positions import rope

ABLATIONS = Path(__file__).parents[1] / "configs" / "ablation"
VARIANTS: list[AttentionVariant] = ["plain", "bias", "off_by_one", "gated"]
WIDTH, HEADS, GRID = 24, 3, (2, 3)
HEAD_DIM = WIDTH // HEADS


def explicit(
    layer: Attention, x: Tensor, turns: tuple[Tensor, Tensor] | None, seen: Tensor
) -> Tensor:
    """Attention row by row from its definition, for x [B,N,D] and which pairs are seen [B,N,N]."""
    q, k, v = (x @ layer.qkv.weight.mT + layer.qkv.bias).split(WIDTH, dim=-1)
    out = torch.zeros_like(x)
    for image in range(len(x)):
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            queries, keys = (_turned(a[image, :, part], turns) for a in (q, k))
            for row in range(x.shape[1]):
                weights = (keys @ queries[row] / math.sqrt(HEAD_DIM)).exp() * seen[image, row]
                denominator, numerator = weights.sum(), weights @ v[image, :, part]
                match layer.variant:
                    case "bias":
                        weight = (layer.sink.key[head] @ queries[row] / math.sqrt(HEAD_DIM)).exp()
                        denominator = denominator + weight
                        numerator = numerator + weight * layer.sink.value[head]
                    case "off_by_one":
                        denominator = denominator + 1
                    case _:
                        pass
                result = numerator / denominator
                if layer.variant == "gated":
                    logit = layer.gate.weight[head] @ x[image, row] + layer.gate.bias[head]
                    result = result / (1 + (-logit).exp())
                out[image, row, part] = result
    return out @ layer.proj.weight.mT + layer.proj.bias


def _turned(rows: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
    """RoPE as multiplication of complex numbers."""
    if turns is None:
        return rows
    pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(turns[0], turns[1])).flatten(-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(variant: AttentionVariant, hidden: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Attention(WIDTH, HEADS, variant=variant, hidden=hidden).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    rows = Rows(registers=4, text=2, image=GRID[0] * GRID[1])
    x = torch.randn(2, rows.total, WIDTH, generator=generator, dtype=torch.float64)
    keys = torch.ones(2, rows.total, dtype=torch.bool)
    if masked:
        keys[1, 5] = False
    seen = keys[:, None, :].expand(-1, rows.total, -1).clone()
    seen[:, hidden:, :hidden] = False
    mask = keys[:, None, None] if masked else None
    expected = explicit(layer, x, None, seen)
    torch.testing.assert_close(layer(x, None, None, mask), expected, atol=1e-12, rtol=1e-10)
    # RoPE computes in float32, whatever it turns.
    turns = rope(rows, GRID, HEAD_DIM, x.device)
    exact = explicit(layer, x, (turns[0].double(), turns[1].double()), seen)
    torch.testing.assert_close(layer(x, *turns, mask), exact, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(exact, expected, atol=1e-3)


def shape_with(
    shape: ModelShape, variant: AttentionVariant = "plain", *, masked: bool = False
) -> ModelShape:
    return shape.model_copy(update={"attention_variant": variant, "registers_masked": masked})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("variant", ["plain", "bias"])
def test_masked_registers_compute_the_baseline(
    kind: Any, with_head: bool, variant: AttentionVariant
) -> None:
    """The baseline has the same weights, since these depend on names and not on the registers."""
    head = HeadConfig(width=48, depth=2, heads=4) if with_head else None
    shape = shape_with(make_shape(kind, head, registers=4), variant, masked=True)
    baseline = shape_with(make_shape(kind, head, registers=0), variant)
    condition = make_condition(shape)
    model = build_model(shape, seed=0)
    open_gates(model)
    state = {n: t for n, t in model.state_dict().items() if "register_tokens" not in n}
    other = build_model(baseline, seed=0)
    other.load_state_dict(state)
    latents, timesteps = inputs()
    ours = model(latents, timesteps, condition)
    torch.testing.assert_close(ours, other(latents, timesteps, condition), atol=1e-5, rtol=1e-5)
    unmasked = build_model(shape_with(shape, variant), seed=0)
    unmasked.load_state_dict(model.state_dict())
    assert not torch.allclose(ours, unmasked(latents, timesteps, condition), atol=1e-3)
    ours.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "register_tokens" in name:
            assert parameter.grad is not None and not parameter.grad.any()


def test_a_variant_leaves_all_other_initial_values_and_its_bias_starts_as_published() -> None:
    plain = build_model(make_shape(KINDS[1], HeadConfig(width=48, depth=2, heads=4), 4), seed=3)
    expected = plain.state_dict()
    added = {}
    for variant in VARIANTS[1:]:
        shape = shape_with(plain.shape, variant)
        model = build_model(shape, seed=3)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        added[variant] = {name: state[name] for name in state.keys() - expected.keys()}
        decays = {name for name, _ in decay_groups(model)[0]}
        for name in added[variant]:
            assert (name in decays) == name.endswith("gate.weight")
    assert not added["off_by_one"]
    assert added["bias"].keys() == {
        f"blocks.{block}.attn.sink.{part}" for block in range(5) for part in ("key", "value")
    }
    drawn = torch.cat([value.flatten() for value in added["bias"].values()])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(drawn.mean().item()) < 0.003
    assert added["gated"]["blocks.4.attn.gate.weight"].shape == (4, 48)


COSTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"width": 56, "conditioning": {"kind": "class", "num_classes": 7}}, NONE),
    ({"width": 56, "head": HEAD, "conditioning": {"kind": "in_context"}}, BYTES),
    ({"width": 56, "head": HEAD, "qk_norm": True}, TEXT),
]
CHANGES: list[dict[str, Any]] = [
    *({"attention_variant": variant} for variant in VARIANTS[1:]),
    {"registers": {"count": 4, "masked": True}},
    {"registers": {"count": 4, "masked": True, "start": 0}, "attention_variant": "bias"},
]


@pytest.mark.parametrize("model_and_text", COSTED, ids=lambda pair: pair[1]["kind"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_costs_are_those_of_the_built_model(
    model_and_text: Any, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, text = model_and_text
    shape = model_shape(run_of({**values, **change}, text))
    held = sum(p.numel() for p in build_model(shape, seed=0).parameters())
    assert total(parameters(shape)).stored == held
    assert rank_share(shape, [range(num_blocks(shape))]).on_rank(1) == held

    monkeypatch.setattr(layers, "padded_hidden_width", hidden_width)
    model = DiT(shape).requires_grad_(False)
    latents = torch.randn(1, shape.channels, *shape.grid)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.full((1,), 0.5), condition_of(shape))
    flops = forward_flops(shape)
    assert sum(flops.values()) == counter.get_total_flops()
    plain = shape.model_copy(update={"attention_variant": "plain", "registers_masked": False})
    assert sum(block_costs(shape)) - sum(block_costs(plain)) == sum(flops.values()) - sum(
        forward_flops(plain).values()
    )


@pytest.mark.parametrize("change", CHANGES[:4], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_nearly_what_autograd_keeps(change: dict[str, Any], precision: str) -> None:
    """Of the blocks, the difference between two depths; the variant itself is not counted."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    values = {"width": 192, "conditioning": {"kind": "class"}, **change}
    registers = {"start": 1, **change.get("registers", {})}
    runs = [
        run_of({**values, "depth": depth, "registers": registers}, NONE, precision=precision)
        for depth in (2, 5)
    ]
    shapes = [model_shape(run) for run in runs]
    estimated = [activation_bytes(run, shape) for run, shape in zip(runs, shapes, strict=True)]
    measured = [saved_bytes(shape, dtype) for shape in shapes]
    ratio = (estimated[1] - estimated[0]) / (measured[1] - measured[0])
    assert ratio == pytest.approx(1, rel=0.08)


def captions_shape(variant: AttentionVariant) -> ModelShape:
    return shape_with(make_shape(KINDS[1], None, registers=4), variant, masked=True)


@pytest.mark.parametrize(
    ("variant", "attention"),
    [("bias", "sdpa"), ("off_by_one", "sdpa"), ("gated", "sdpa"), ("bias", "flash")],
)
def test_blocks_compile_whole_and_agree(
    variant: AttentionVariant, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn takes no mask, and is given none."""
    torch._dynamo.reset()  # graphs of other tests count towards its limit
    shape = captions_shape(variant)
    condition, (latents, timesteps) = make_condition(shape), inputs()
    model = build_model(shape, seed=0)
    open_gates(model)
    expected = model(latents, timesteps, condition)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in_for_flash_attn())
    monkeypatch.setattr(layers, "require_flash", lambda device: None)  # the device is a CPU
    compiled = build_model(shape.model_copy(update={"attention": attention}), seed=0)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks.values():
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(latents, timesteps, condition), expected)


@pytest.mark.parametrize("variant", ["bias", "gated"])
def test_an_exported_network_computes_the_same(variant: AttentionVariant, tmp_path: Path) -> None:
    plain = write_tiny_bundle(tmp_path / "plain", classes=True)
    description = read_description(plain)
    shape = shape_with(description.shape, variant, masked=True)
    model = build_model(shape, seed=0).eval()
    open_gates(model)
    described = description.model_copy(update={"shape": shape})
    write_bundle(tmp_path / "out", model, described, description.encoders)
    read = read_model(tmp_path / "out", read_description(tmp_path / "out"), torch.device("cpu"))
    latents = torch.randn(2, shape.channels, *shape.grid)
    timesteps = torch.tensor([0.2, 0.9])
    condition = Condition(null=torch.tensor([False, True]), labels=torch.tensor([1, 3]))
    assert torch.equal(read(latents, timesteps, condition), model(latents, timesteps, condition))


def test_what_cannot_work_is_refused_before_anything_is_built() -> None:
    nothing_to_mask = {"width": 56, "registers": {"count": 0, "masked": True}}
    with pytest.raises(InputError, match="registers to hide"):
        check_run(run_of(nothing_to_mask, TEXT))
    shape = shape_with(make_shape(KINDS[0], None, registers=0), masked=True)
    with pytest.raises(InputError, match="registers to hide"):
        check_shape(shape)
    with pytest.raises(InputError, match="attention that takes a mask"):
        check_run(
            run_of(
                {
                    "width": 56,
                    "attention": "flash",
                    "attention_variant": "bias",
                    "conditioning": {"kind": "in_context"},
                },
                TEXT,
            )
        )


def ablation(name: str) -> RunConfig:
    return load_run(ABLATIONS / f"{name}.yaml")


def test_the_deeper_baseline_has_the_flops_of_the_registers() -> None:
    """No other depth is nearer, here and at the size that the file speaks of."""

    def flops(run: RunConfig, **model: Any) -> int:
        changed = run.model_copy(update={"model": run.model.model_copy(update=model)})
        return sum(forward_flops(model_shape(changed)).values())

    registers, deeper = ablation("diffusion_registers"), ablation("deeper_baseline")
    wanted = flops(registers)
    assert flops(deeper) == pytest.approx(wanted, rel=0.02)
    found = {depth: abs(flops(deeper, depth=depth) - wanted) for depth in range(10, 18)}
    assert min(found, key=found.__getitem__) == deeper.model.depth
    xl = {"preset": "DiT-XL"}
    assert flops(deeper, depth=31, **xl) == pytest.approx(flops(registers, **xl), rel=0.02)


def test_each_ablation_changes_one_thing() -> None:
    baseline = dict(leaves(ablation("baseline").model_dump(mode="json")))
    changes: dict[str, dict[str, Any]] = {}
    for path in ABLATIONS.glob("*.yaml"):
        own = dict(leaves(load_run(path).model_dump(mode="json")))
        changes[path.stem] = {
            key: value
            for key, value in own.items()
            if key not in ("name", "directory") and baseline.get(key) != value
        }
        assert own["directory"] == f"runs/ablation/{path.stem}"
    image = changes["encoder_registers"]
    assert {key.rpartition(".")[0] for key in image} <= {
        "encoders.image",
        "encoders.image.outliers",
    }
    count, start = "model.registers.count", "model.registers.start"
    assert changes == {
        "baseline": {},
        "encoder_registers": image,
        "diffusion_registers": {count: 36},
        "both_registers": {count: 36, **image},
        "deeper_baseline": {"model.depth": 13},
        "registers_masked": {count: 36, "model.registers.masked": True},
        **{f"count_{k}": {count: k} for k in (4, 16, 64, 144)},
        **{f"start_{block}": {count: 36, start: block} for block in (0, 2, 7, 10)},
        "attention_bias": {"model.attention_variant": "bias"},
        "softmax_off_by_one": {"model.attention_variant": "off_by_one"},
        "gated_attention": {"model.attention_variant": "gated"},
        "loss_masking": {"diffusion.mask_token_norm": 100.0},
    }


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
