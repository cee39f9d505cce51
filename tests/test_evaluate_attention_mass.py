"""Attention mass against explicit softmax in float64, and against what the networks themselves attend to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision_transformers import FAMILIES, RESOLUTION, random_images, save_vit, vit_config
from torch import Tensor

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.model import (
    AttentionVariant,
    ClassConditioning,
    ConditioningConfig,
    CrossAttentionConditioning,
    HeadConfig,
    InContextConditioning,
)
from dsr_scale.encoders.vit import VitEncoder
from dsr_scale.evaluate import attention_mass
from dsr_scale.evaluate.attention_mass import (
    AttentionReading,
    attention_of,
    cross_attention_measures,
    observed_dit,
    observed_vit,
    probabilities,
    received,
    self_attention_measures,
)
from dsr_scale.evaluate.outlier_statistics import NO_ROWS, TokenRows
from dsr_scale.model.block import Block
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT

TOKENS, REGISTERS = 24, 3
ROWS = TokenRows(
    slice(0, REGISTERS), slice(REGISTERS, REGISTERS + TOKENS), text=NO_ROWS, special=NO_ROWS
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax_in_float64(q: Tensor, k: Tensor, seen: Tensor) -> np.ndarray:
    """One query [d] against keys [M,d] of which some are seen: [M]."""
    logits = np.array([float(q.double() @ key.double()) / math.sqrt(len(q)) for key in k])
    weights = np.where(seen.numpy(), np.exp(logits - logits.max()), 0)
    return weights / weights.sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extra", [0, 1])
def test_attention_mass_is_that_of_an_explicit_softmax(
    masked: bool, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registers, `masked` from the rest or not, text, image, and an `extra` key that all rows see."""
    images, heads, width = 3, 2, 4
    rows = TokenRows(slice(0, 3), slice(8, 8 + TOKENS), slice(3, 8), NO_ROWS)
    count = 8 + TOKENS
    q = noise(images, heads, count, width) * 2
    k = noise(images, heads, count + extra, width, seed=1) * 2
    given = torch.ones(images, count + extra, dtype=torch.bool)
    given[1, 5:8] = False  # a caption of two tokens
    seen = given.clone()
    seen[:, :3] = not masked
    entering = noise(images, count, seed=2).abs() + 1
    entering[:, 8 + 11] = 50
    reading = AttentionReading("blocks.0", entering, q, k, given[:, None, None], 3 * masked)
    monkeypatch.setattr(attention_mass, "_PROBABILITIES_AT_ONCE", 2 * heads * TOKENS * count)
    mass, entropy = received(reading, rows.image)
    values = self_attention_measures(reading, mass, entropy, rows)
    for image in range(images):
        rows_of_p = np.array(
            [
                softmax_in_float64(q[image, head, row], k[image, head], seen[image])
                for head in range(heads)
                for row in range(8, count)
            ]
        )
        received_by = rows_of_p.mean(axis=0)
        visible = int(seen[image].sum())
        groups = {
            "registers": [] if masked else [0, 1, 2],
            "extra_key": list(range(count, count + extra)),
            "text": [row for row in range(3, 8) if seen[image, row]],
            "top_norm": [19],
            "rest": [row for row in range(8, count) if row != 19],
        }
        for group, members in groups.items():
            if not members:
                assert values[f"attention_{group}"][image].isnan()
                continue
            total = received_by[members].sum()
            assert values[f"attention_{group}"][image] == pytest.approx(total, rel=1e-4)
            per_token = total / len(members) * visible
            measured = values[f"attention_{group}_per_token"][image]
            assert measured == pytest.approx(per_token, rel=1e-4)
        terms = [-p * math.log(p) for p in rows_of_p.ravel() if p > 0]
        expected = sum(terms) / len(rows_of_p) / math.log(visible)
        assert values["attention_entropy"][image] == pytest.approx(expected, rel=1e-4)
        assert values["attention_special"][image].isnan()
        # A register sees registers whether they are masked from others or not.
        for row, keys in ((2, given), (10, seen)):
            of_row = np.mean(
                [
                    softmax_in_float64(q[image, h, row], k[image, h], keys[image])
                    for h in range(heads)
                ],
                axis=0,
            )
            mapped = attention_of(reading, torch.tensor([[row]] * images))[image, 0]
            np.testing.assert_allclose(mapped.numpy(), of_row, rtol=1e-4, atol=1e-7)


def test_a_planted_sink_has_all_the_attention() -> None:
    q = torch.ones(2, 1, REGISTERS + TOKENS, 8)
    k = noise(2, 1, REGISTERS + TOKENS, 8) * 0.01
    k[:, :, 1] = 9
    entering = torch.ones(2, REGISTERS + TOKENS)
    reading = AttentionReading("blocks.0", entering, q, k, None)
    values = self_attention_measures(reading, *received(reading, ROWS.image), ROWS)
    assert values["attention_registers"].min() > 0.999
    registers = values["attention_registers_per_token"]
    assert registers.tolist() == pytest.approx([(REGISTERS + TOKENS) / REGISTERS] * 2, rel=1e-3)
    assert values["attention_entropy"].max() < 1e-3


def make_shape(
    conditioning: ConditioningConfig,
    head: bool,
    qk_norm: bool,
    variant: AttentionVariant,
    masked: bool,
) -> ModelShape:
    text = conditioning.kind != "class"
    return ModelShape(
        width=32,
        depth=3,
        heads=2,
        head=HeadConfig(width=48, depth=1, heads=3) if head else None,
        patch=1,
        channels=4,
        grid=(4, 4),
        registers=4,
        register_start=1,
        conditioning=conditioning,
        text_kind="features" if text else "none",
        text_channels=6 if text else 0,
        text_length=5 if text else 0,
        qk_norm=qk_norm,
        attention="sdpa",
        attention_variant=variant,
        registers_masked=masked,
    )


def random_dit(shape: ModelShape) -> tuple[DiT, tuple[Tensor, Tensor, Condition]]:
    """A network with no weight zero, and inputs of two samples."""
    model = build_model(shape, seed=0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    null = torch.zeros(2, dtype=torch.bool)
    condition = Condition(null=null, labels=torch.tensor([1, 2]))
    if shape.text_kind != "none":
        mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
        condition = Condition(null=null, tokens=noise(2, 5, 6), mask=mask)
    return model, (noise(2, 4, 4, 4), torch.tensor([0.3, 0.8]), condition)


@pytest.mark.parametrize(
    ("conditioning", "head", "qk_norm", "variant", "masked"),
    [
        (ClassConditioning(num_classes=5), True, True, "plain", False),
        (CrossAttentionConditioning(), False, False, "plain", True),
        (InContextConditioning(), True, False, "plain", False),
        (InContextConditioning(), True, True, "bias", True),
        (ClassConditioning(num_classes=5), False, False, "bias", False),
        (InContextConditioning(), True, False, "off_by_one", False),
        (ClassConditioning(num_classes=5), True, False, "off_by_one", True),
        (CrossAttentionConditioning(), True, True, "gated", True),
    ],
)
@torch.inference_mode()
def test_probabilities_read_off_a_network_give_its_own_attention(
    conditioning: ConditioningConfig,
    head: bool,
    qk_norm: bool,
    variant: AttentionVariant,
    masked: bool,
) -> None:
    model, inputs = random_dit(make_shape(conditioning, head, qk_norm, variant, masked))
    outputs: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    entered: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    for index in range(model.total_blocks):
        name, block = model.block_name(index), model.blocks[str(index)]
        assert isinstance(block, Block)

        def keep_entering(name: str) -> Any:
            return lambda _module, inputs: entered.update({name: inputs[0]})

        def keep(kind: str, into: dict[str, Tensor], name: str = name) -> Any:
            return lambda _module, _inputs, output: into.update({f"{name} {kind}": output})

        block.attn.register_forward_hook(keep("self", outputs))
        block.attn.qkv.register_forward_hook(keep("self", values))
        block.register_forward_pre_hook(keep_entering(name))
        if variant == "gated":
            block.attn.gate.register_forward_hook(keep("self", gates))
        if block.has_cross:
            block.cross.register_forward_hook(keep("cross", outputs))
            block.cross.kv.register_forward_hook(keep("cross", values))
    readings: dict[str, AttentionReading] = {}
    expected = model(*inputs)
    with observed_dit(
        model,
        lambda reading: readings.update({f"{reading.block} self": reading}),
        lambda reading: readings.update({f"{reading.block} cross": reading}),
    ):
        assert torch.equal(model(*inputs), expected)
    assert readings.keys() == outputs.keys()
    for name, reading in readings.items():
        is_self = name.endswith("self")
        index = list(map(model.block_name, range(model.total_blocks))).index(reading.block)
        block = model.blocks[str(index)]
        assert isinstance(block, Block)
        module = block.attn if is_self else block.cross
        v = values[name].chunk(3 if is_self else 2, dim=-1)[-1]
        v = v.unflatten(-1, (reading.q.shape[1], -1)).transpose(1, 2)
        if is_self and variant == "bias":
            v = torch.cat([v, block.attn.sink.value[None, :, None].expand(2, -1, -1, -1)], dim=2)
        elif is_self and variant == "off_by_one":
            v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
        assert reading.k.shape == v.shape
        seen = torch.stack([reading.visible_to(row) for row in range(reading.q.shape[2])], dim=1)
        attended = probabilities(reading.q, reading.k, seen[:, None]) @ v
        if is_self and variant == "gated":
            attended *= gates[name].sigmoid().transpose(1, 2)[..., None]
        again = module.proj(attended.transpose(1, 2).flatten(-2))
        scale = outputs[name].abs().max()
        torch.testing.assert_close(again / scale, outputs[name] / scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(reading.entering, entered[reading.block].norm(dim=-1))


def test_cross_attention_has_a_text_mass_of_its_own() -> None:
    q, k = noise(2, 2, 6, 4), noise(2, 2, 5, 4, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    reading = AttentionReading("blocks.0", torch.ones(2, 6), q, k, mask[:, None, None])
    values = cross_attention_measures(reading, slice(2, 6))
    for image in range(2):
        rows = [
            softmax_in_float64(q[image, head, row], k[image, head], mask[image])
            for head in range(2)
            for row in range(2, 6)
        ]
        mass = np.mean(rows, axis=0)
        assert values["cross_text_top"][image] == pytest.approx(mass.max(), rel=1e-5)
        assert values["cross_text_per_token"][image] == pytest.approx(1 / int(mask[image].sum()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_probabilities_of_vision_transformers_are_the_librarys(family: str, tmp_path: Path) -> None:
    save_vit(tmp_path, family)
    encoder = VitEncoder(vit_config(tmp_path), resolution=RESOLUTION, device=torch.device("cpu"))
    readings: list[AttentionReading] = []
    with observed_vit(encoder, readings.append):
        tokens = encoder.tokens(random_images(2))
    theirs: list[Tensor] = []
    entering: list[Tensor] = []
    encoder.model.set_attn_implementation("eager")
    for block, key in zip(encoder.structure.blocks, encoder.structure.keys, strict=True):
        attention = next(module for module in block.modules() if key in module.children())
        attention.register_forward_hook(lambda *arguments: theirs.append(arguments[-1][1]))
        block.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    torch.testing.assert_close(encoder.tokens(random_images(2)), tokens, rtol=1e-4, atol=1e-4)
    assert [reading.block for reading in readings] == [f"blocks.{i}" for i in range(len(theirs))]
    for reading, expected, before in zip(readings, theirs, entering, strict=True):
        p = probabilities(reading.q, reading.k, reading.mask)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reading.entering, before.norm(dim=-1))
