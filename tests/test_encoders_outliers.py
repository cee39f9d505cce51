"""Outlier treatments against the plain forward of `plain_vision_forward.py`, their files and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_vision_forward import NAMES, PlainForward
from pydantic import TypeAdapter
from tiny_vision_transformers import (
    FAMILIES,
    HIDDEN,
    INPUT_SIZE,
    LAYERS,
    RESOLUTION,
    TOKENS,
    WIDTH,
    random_images,
    save_vit,
    vit_config,
)
from torch import Tensor
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import OutlierTreatment
from dsr_scale.encoders.attention_bias import load_attention_bias, save_attention_bias
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.outliers import (
    BiasTreatment,
    ClampTreatment,
    RegisterTreatment,
    Treatment,
    ZeroingTreatment,
    record_attention_bias,
    treated,
    treatment_identity,
)
from dsr_scale.encoders.register_file import RegisterFile, save_register_file
from dsr_scale.encoders.vit import VitEncoder

NEURONS = {0: (5, 11, 30), 2: (7, 1)}


def _bias() -> BiasTreatment:
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, LAYERS, WIDTH, generator=generator)
    return BiasTreatment(NEURONS, key, value)


TREATMENTS: dict[str, Treatment] = {
    "registers, shared": RegisterTreatment(NEURONS),
    "registers, per neuron": RegisterTreatment(NEURONS, "per_neuron"),
    "zeroing": ZeroingTreatment(NEURONS),
    "attention bias": _bias(),
    "clamp": ClampTreatment(1.05),
}
FIRST_PATCH_KEPT = RegisterTreatment(NEURONS, "shared", keep_first_patch=True)


def _encoder(directory: Path, **changes: Any) -> VitEncoder:
    config = vit_config(directory, **changes)
    encoder = build_image_encoder(config, resolution=RESOLUTION, device="cpu")
    assert isinstance(encoder, VitEncoder)
    return encoder


def _outliers(settings: dict[str, Any]) -> OutlierTreatment:
    return TypeAdapter(OutlierTreatment).validate_python(settings)


def _cases() -> Iterator[Any]:
    for family in NAMES:
        for name, treatment in TREATMENTS.items():
            yield pytest.param(family, treatment, id=f"{family}, {name}")
    yield pytest.param("siglip vision", FIRST_PATCH_KEPT, id="siglip vision, first patch kept")


@pytest.mark.parametrize(("family", "treatment"), _cases())
def test_treated_latents_are_those_of_the_plain_forward(
    tmp_path: Path, family: str, treatment: Treatment
) -> None:
    model = save_vit(tmp_path, family)
    encoder, images = _encoder(tmp_path), random_images(3)
    untreated = encoder.encode(images)
    plain = PlainForward(model, family, None).latents(images)
    torch.testing.assert_close(untreated, plain, rtol=1e-5, atol=1e-5)
    expected = PlainForward(model, family, treatment).latents(images)
    with treated(encoder, treatment):
        latents = encoder.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert (latents - untreated).abs().mean() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_treatment(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vit(tmp_path, family)
    encoder, images = _encoder(tmp_path), random_images(5)
    untreated, special = encoder.encode(images), FAMILIES[family][1]
    fused: list[tuple[int, ...]] = []
    attention = functional.scaled_dot_product_attention

    def counted(query: Tensor, *inputs: Any, **options: Any) -> Tensor:
        fused.append(tuple(query.shape))
        return attention(query, *inputs, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    for name, treatment in TREATMENTS.items():
        extra = name.startswith(("registers", "attention"))
        with treated(encoder, treatment):
            latents = encoder.encode(images)
            assert encoder.register_row == (special if extra else None)
            assert encoder.dropped_tokens == special + extra
            assert encoder.patch_rows == slice(special + extra, None)
            assert encoder.tokens(images[:2]).shape == (2, special + extra + TOKENS, WIDTH)
            alone = torch.cat([encoder.encode(image[None]) for image in images])
        assert latents.shape == untreated.shape
        assert latents.isfinite().all()
        assert torch.equal(alone, latents)
        assert not torch.allclose(latents, untreated, atol=1e-3)
        assert encoder.model.config._attn_implementation == "sdpa"
        passes = 2 + 5 + 1
        assert (
            fused
            == [(4, 2, special + extra + TOKENS, WIDTH // 2)] * 2 * LAYERS
            + [(2, 2, special + extra + TOKENS, WIDTH // 2)] * LAYERS
            + [(4, 2, special + extra + TOKENS, WIDTH // 2)] * 5 * LAYERS
        )
        assert len(fused) == passes * LAYERS
        fused.clear()
        assert encoder.dropped_tokens == special
        assert torch.equal(encoder.encode(images), untreated)
        fused.clear()


def test_a_bias_of_one_image_is_its_register(tmp_path: Path) -> None:
    """What the register was to the other tokens is all that the recorded key and value are."""
    save_vit(tmp_path, "siglip vision")
    encoder, images = _encoder(tmp_path), random_images(3)
    registers = RegisterTreatment(NEURONS)
    key, value = record_attention_bias(encoder, registers, [images[:1]])
    assert encoder.treatment is None
    with treated(encoder, registers):
        expected = encoder.encode(images)
    with treated(encoder, BiasTreatment(NEURONS, key, value)):
        latents = encoder.encode(images)
    torch.testing.assert_close(latents[:1], expected[:1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(latents[1:], expected[1:], atol=1e-3)
    each = [record_attention_bias(encoder, registers, [image[None]]) for image in images]
    together = record_attention_bias(encoder, registers, [images[:2], images[2:]])
    for part in (0, 1):
        mean = torch.stack([recorded[part] for recorded in each]).mean(dim=0)
        torch.testing.assert_close(together[part], mean)


def test_a_treatment_for_a_while_is_undone_even_after_an_error(tmp_path: Path) -> None:
    save_vit(tmp_path, "siglip vision")
    encoder, images = _encoder(tmp_path), random_images(2)
    untreated, registers = encoder.encode(images), RegisterTreatment(NEURONS)
    encoder.treat(registers)
    with_registers = encoder.encode(images)
    with pytest.raises(RuntimeError), treated(encoder, None):
        assert torch.equal(encoder.encode(images), untreated)
        with treated(encoder, ZeroingTreatment(NEURONS)):
            assert encoder.register_row is None
        assert torch.equal(encoder.encode(images), untreated)
        raise RuntimeError
    assert torch.equal(encoder.encode(images), with_registers)
    with pytest.raises(InputError, match="layer 3 in an encoder with 3 layers"):
        encoder.treat(ZeroingTreatment({3: (0,)}))
    assert encoder.treatment is registers
    assert torch.equal(encoder.encode(images), with_registers)


@pytest.mark.parametrize(
    ("family", "treatment", "message"),
    [
        ("dinov2", RegisterTreatment({}), "no register neurons"),
        ("dinov2", ZeroingTreatment({0: ()}), "no register neurons"),
        ("dinov2", RegisterTreatment({0: (HIDDEN,)}), f"whose MLP has {HIDDEN} units"),
        ("dinov2", RegisterTreatment({1: (4, 4)}), "unit 4 of layer 1 twice"),
        ("dinov2", FIRST_PATCH_KEPT, "has 1 tokens before its patches"),
        (
            "siglip vision",
            BiasTreatment(NEURONS, torch.zeros(LAYERS, WIDTH), torch.zeros(LAYERS, 8)),
            r"whose value has shape \[3, 8\]",
        ),
    ],
)
def test_treatments_that_do_not_fit_are_refused(
    tmp_path: Path, family: str, treatment: Treatment, message: str
) -> None:
    save_vit(tmp_path, family)
    encoder = _encoder(tmp_path)
    with pytest.raises(InputError, match=message), treated(encoder, treatment):
        raise AssertionError("not refused")
    assert encoder.treatment is None


def _files(directory: Path) -> tuple[dict[str, Any], RegisterFile]:
    """Settings of every kind of treatment with their files, for the checkpoint in `directory`."""
    file = RegisterFile(str(directory), None, INPUT_SIZE, NEURONS, "a test")
    neurons, bias = directory / "registers.json", directory / "bias.safetensors"
    save_register_file(neurons, file)
    planted = _bias()
    save_attention_bias(bias, planted.key, planted.value, file)
    per_neuron = {"kind": "registers", "neurons": str(neurons), "maximum": "per_neuron"}
    settings: dict[str, Any] = {
        "registers, shared": {"kind": "registers", "neurons": str(neurons)},
        "registers, per neuron": per_neuron,
        "zeroing": {"kind": "zeroing", "neurons": str(neurons)},
        "attention bias": {
            "kind": "attention_bias",
            "neurons": str(neurons),
            "bias": str(bias),
        },
        "clamp": {"kind": "clamp", "max_over_median": 1.05},
    }
    return settings, file


def test_the_config_chooses_the_treatment(tmp_path: Path) -> None:
    save_vit(tmp_path, "siglip vision")
    settings, _ = _files(tmp_path)
    plain, images = _encoder(tmp_path), random_images(2)
    for name, chosen in settings.items():
        latents = _encoder(tmp_path, outliers=chosen).encode(images)
        with treated(plain, TREATMENTS[name]):
            assert torch.equal(plain.encode(images), latents)
    kept = {**settings["registers, shared"], "keep_first_patch": True}
    with treated(plain, FIRST_PATCH_KEPT):
        assert torch.equal(plain.encode(images), _encoder(tmp_path, outliers=kept).encode(images))


def test_neurons_of_another_encoder_are_refused(tmp_path: Path) -> None:
    save_vit(tmp_path, "siglip vision")
    settings, _ = _files(tmp_path)
    for kind in ("registers, shared", "zeroing", "attention bias"):
        with pytest.raises(InputError, match="required: register neurons of owner/other"):
            _encoder(tmp_path, name="owner/other", outliers=settings[kind])
    published = {"kind": "registers", "neurons": "package:siglip2_base_patch16_256"}
    with pytest.raises(InputError, match=r"encoders\.image\.name"):
        _encoder(tmp_path, outliers=published)
    copy = {"name": "google/siglip2-base-patch16-256", "input_size": 256}
    with pytest.raises(InputError, match=f"unit 2804 of layer 1, whose MLP has {HIDDEN} units"):
        _encoder(tmp_path, outliers=published, **copy)


def test_an_attention_bias_is_checked_when_it_is_read(tmp_path: Path) -> None:
    path, planted = tmp_path / "bias.safetensors", _bias()
    file = RegisterFile("owner/vit", None, INPUT_SIZE, NEURONS, "a test")
    save_attention_bias(path, planted.key, planted.value, file)
    key, value = load_attention_bias(path, file)
    assert torch.equal(key, planted.key)
    assert torch.equal(value, planted.value)
    other = RegisterFile("owner/vit", None, INPUT_SIZE, {0: (5,)}, "a test")
    with pytest.raises(InputError, match=f"required: .*{other.fingerprint}"):
        load_attention_bias(path, other)
    save_attention_bias(path, planted.key[:, :5], planted.value, file)
    with pytest.raises(InputError, match=r"'key': \[3, 5\]"):
        load_attention_bias(path, file)
    save_attention_bias(path, planted.key * torch.inf, planted.value, file)
    with pytest.raises(InputError, match="infinities or NaN"):
        load_attention_bias(path, file)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="could not be read"):
        load_attention_bias(path, file)
    with pytest.raises(InputError, match="could not be read"):
        load_attention_bias(tmp_path / "absent.safetensors", file)


def test_identities_are_equal_for_equal_treatments_only(tmp_path: Path) -> None:
    settings, file = _files(tmp_path)
    registers = settings["registers, shared"]
    different = [
        {"kind": "none"},
        *settings.values(),
        {"kind": "clamp", "max_over_median": 3},
        {**registers, "keep_first_patch": True},
    ]
    identities = [treatment_identity(_outliers(chosen)) for chosen in different]
    assert len(set(identities)) == len(different)
    assert identities[0] == "none"
    assert treatment_identity(_outliers({"kind": "clamp"})) == "clamp 3.0"

    def changed(neurons: dict[int, tuple[int, ...]], bias: Tensor) -> list[str]:
        """Identities of registers and attention bias from files elsewhere with other notes."""
        other = RegisterFile(file.encoder, None, INPUT_SIZE, neurons, "elsewhere", {"passes": 3})
        save_register_file(tmp_path / "new" / "list.json", other)
        save_attention_bias(tmp_path / "new" / "bias", bias, _bias().value, other)
        paths = {"neurons": str(tmp_path / "new" / "list.json")}
        both = {"kind": "attention_bias", **paths, "bias": str(tmp_path / "new" / "bias")}
        return [treatment_identity(_outliers(each)) for each in ({**registers, **paths}, both)]

    same = changed({2: (1, 7), 0: (11, 5, 30)}, _bias().key)
    assert same == [identities[1], identities[4]]
    assert not {*changed({2: (1, 7), 0: (11, 5)}, _bias().key)} & {*identities}
    new_registers, new_bias = changed(NEURONS, _bias().key + 1e-6)
    assert new_registers == identities[1]
    assert new_bias not in identities
    with pytest.raises(InputError, match="could not be read"):
        treatment_identity(_outliers({"kind": "zeroing", "neurons": str(tmp_path / "absent")}))


@pytest.mark.parametrize("name", TREATMENTS)
def test_half_precision_is_near_full(tmp_path: Path, name: str) -> None:
    save_vit(tmp_path, "siglip vision")
    images, treatment = random_images(4), TREATMENTS[name]
    full, half = _encoder(tmp_path), _encoder(tmp_path, dtype="bf16")
    with treated(full, treatment), treated(half, treatment):
        expected, latents = full.encode(images), half.encode(images)
    assert latents.dtype == torch.float32
    assert ((latents - expected).square().mean() / expected.square().mean()).sqrt() < 0.04


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treated_network_compiles_without_a_break(tmp_path: Path, name: str) -> None:
    """`fullgraph` fails on Python that looks at data or waits for the device."""
    save_vit(tmp_path, "siglip vision")
    encoder, images = _encoder(tmp_path), random_images(4)
    encoder.treat(TREATMENTS[name])
    expected = encoder.encode(images)
    torch.compiler.reset()
    network = torch.compile(encoder.model, backend="eager", fullgraph=True)
    tokens = network(pixel_values=encoder.preprocess(images, (INPUT_SIZE, INPUT_SIZE)))
    latents = tokens.last_hidden_state[:, encoder.patch_rows].transpose(1, 2)
    torch.testing.assert_close(latents, expected.flatten(2), rtol=1e-5, atol=1e-5)
