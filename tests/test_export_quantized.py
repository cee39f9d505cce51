"""8-bit weights: nearest values, the right tensors, the stated bounds on a trained network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from drawn_bundles import drawn_network, small_shape
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import run_training
from torch import Tensor
from typer.testing import CliRunner

from dsr_scale.cli.main import app
from dsr_scale.config.data import DataConfig
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.encoders import PixelsImage
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.evaluate.training_images import training_images
from dsr_scale.export.bundle import export_run, read_description
from dsr_scale.export.pipeline import load
from dsr_scale.export.quantization import Quantization, quantize_blocks, quantized_weight
from dsr_scale.model.conditioning import Condition

DATA = DataConfig(shards="package:emoji", resolution=32)
KINDS: tuple[Quantization, ...] = ("int8", "fp8")
VELOCITY_BOUND = {"int8": 0.01, "fp8": 0.04}
"""Largest relative error of the velocity from model time 0.05 on, as docs/inference.md states it."""
IMAGE_BOUND = {"int8": 0.005, "fp8": 0.015}
"""Largest root mean square difference of images with values in [0,1]."""
BLOCK_WEIGHT = re.compile(
    r"blocks\.\d\.(attn\.(qkv|proj)|cross\.(q|kv|proj)|mlp\.(w12|w3)|adaLN_modulation\.1)\.weight"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = ("training.steps=150", "checkpoint.every_steps=150", "tracking.norms_every_steps=null")
    return run_training(tmp_path_factory.mktemp("quantized"), *steps)


@pytest.fixture(scope="module")
def bundles(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fp32, and its two quantized forms."""
    folder = tmp_path_factory.mktemp("bundles")
    export_run(run, folder / "fp32")
    for kind in KINDS:
        export_run(run, folder / kind, quantization=kind)
    return {name: folder / name for name in ("fp32", *KINDS)}


def all_values(kind: Quantization) -> Tensor:
    """Every value that 8 bits can stand for, without NaN and without the one that int8 leaves out."""
    if kind == "int8":
        return torch.arange(-127.0, 128.0)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_becomes_the_nearest_value_of_its_row_s_grid(kind: Quantization) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 40, generator=generator)
    weight *= torch.logspace(-6, 3, 12)[:, None]
    weight[3] = 0.0
    weight[4, 1:] *= 1e-4  # one large weight beside small ones
    values, scale = quantized_weight(weight, kind)
    assert (values.element_size(), scale.dtype, scale.shape) == (1, torch.float32, (12, 1))
    grid = all_values(kind)
    for row, quantized in zip(weight, values.float() * scale, strict=True):
        step = row.abs().max() / grid.max()
        nearest = (row[:, None] - grid * step).abs().min(dim=1).values
        torch.testing.assert_close(
            (row - quantized).abs(), nearest, rtol=0, atol=1e-6 * float(step) * 127
        )
    assert values[3].float().abs().max() == 0
    # The errors that the module's docstring states.
    error = (weight - values.float() * scale).abs()
    half_step = scale / 2 if kind == "int8" else torch.maximum(weight.abs() / 16, scale * 2**-10)
    assert bool((error <= half_step * (1 + 1e-5)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_only_linears_of_blocks_change_and_the_file_shrinks(
    bundles: dict[str, Path], kind: Quantization
) -> None:
    full = load_file(bundles["fp32"] / "model.safetensors")
    small = load_file(bundles[kind] / "model.safetensors")
    narrowed = {name for name in full if BLOCK_WEIGHT.fullmatch(name)}
    assert len(narrowed) == 4 * 8
    for name, tensor in full.items():
        if name in narrowed:
            assert small[name].element_size() == 1 and small[name].shape == tensor.shape
            assert small[name.replace(".weight", ".scale")].shape == (len(tensor), 1)
        else:
            assert torch.equal(small[name], tensor), name
    assert len(small) == len(full) + len(narrowed)
    stored = {"int8": "I8", "fp8": "F8_E4M3"}[kind]
    with safe_open(bundles[kind] / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in narrowed} == {stored}
    sizes = {name: (path / "model.safetensors").stat().st_size for name, path in bundles.items()}
    saved = sum(3 * full[name].numel() - 4 * len(full[name]) for name in narrowed)
    headers = 4096
    assert abs(sizes["fp32"] - sizes[kind] - saved) < headers


def noised(t: float) -> Tensor:
    """Latents of eight training images at model time t."""
    images, _ = training_images(DATA, 8)
    encoder = build_image_encoder(PixelsImage(patch=8), resolution=32, device="cpu")
    noise = draw_noise((192, 4, 4), 11, [0] * 8, range(8), "cpu")
    return (1 - t) * encoder.encode(images).float() + t * noise


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_velocity_is_within_the_stated_bound(bundles: dict[str, Path], kind: Quantization) -> None:
    full, small = (load(bundles[name], device="cpu") for name in ("fp32", kind))
    _, captions = training_images(DATA, 8)
    for t in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        x = noised(t)
        exact = full.velocity(full.condition(captions))(x, t)
        near = small.velocity(small.condition(captions))(x, t)
        error = float((near - exact).norm() / exact.norm())
        assert 1e-5 < error < VELOCITY_BOUND[kind], (t, error)


def test_images_are_within_the_stated_bound(bundles: dict[str, Path]) -> None:
    _, captions = training_images(DATA, 8)
    sampling = SamplingConfig(steps=20, guidance=2.0)
    images = {
        name: load(path, device="cpu").sample(captions, seed=1, sampling=sampling).float() / 255
        for name, path in bundles.items()
    }
    assert images["fp32"].std() > 0.1
    for kind in KINDS:
        error = float((images["fp32"] - images[kind]).square().mean().sqrt())
        assert 0 < error < IMAGE_BOUND[kind], (kind, error)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_network_computes_with_the_dequantized_weights(kind: Quantization) -> None:
    """A plain network that holds values times scales puts out the same."""
    quantized, plain = drawn_network(small_shape()), drawn_network(small_shape())
    quantize_blocks(quantized, kind)
    stored = quantized.state_dict()
    for name, parameter in plain.named_parameters():
        if BLOCK_WEIGHT.fullmatch(name):
            parameter.copy_(stored[name].float() * stored[name.replace(".weight", ".scale")])
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(2))
    condition = Condition(null=torch.tensor([False, True]), tokens=tokens)
    x = draw_noise((192, 4, 4), 1, [0, 0], [0, 1], "cpu")
    t = torch.tensor([0.3, 0.8])
    torch.testing.assert_close(quantized(x, t, condition), plain(x, t, condition))
    untouched = drawn_network(small_shape())
    assert (plain(x, t, condition) - untouched(x, t, condition)).abs().max() > 1e-4


def test_a_cast_leaves_eight_bits_and_scales_alone(bundles: dict[str, Path]) -> None:
    for kind in KINDS:
        before = load_file(bundles[kind] / "model.safetensors")
        model = load(bundles[kind], device="cpu", dtype="bf16").model
        for name, tensor in model.state_dict().items():
            kept = name.endswith((".scale", ".W")) or BLOCK_WEIGHT.fullmatch(name)
            assert tensor.dtype == (before[name].dtype if kept else torch.bfloat16), name
            if kept:
                assert torch.equal(tensor.float(), before[name].float()), name


def test_the_command_quantizes_and_the_bundle_says_so(run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(run), str(tmp_path), "--quantize", "int8", "--dtype", "bf16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    description = read_description(tmp_path)
    assert (description.quantization, description.dtype) == ("int8", "bf16")
    assert "int8 in the blocks, else bf16" in (tmp_path / "README.md").read_text()
    images = load(tmp_path, device="cpu").sample(
        ["skull"], seed=0, sampling=SamplingConfig(steps=2)
    )
    assert images.float().std() > 10
