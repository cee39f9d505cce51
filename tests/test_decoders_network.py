"""The decoder to train: its arithmetic written out, its initial values, and the folder it becomes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import EncodersConfig, RaeDecoder, VitImage
from dsr_scale.decoders.network import (
    RaeDecoderNetwork,
    build_decoder_network,
    save_autoencoder,
)
from dsr_scale.encoders.contract import build_decoder
from dsr_scale.encoders.statistics import LatentStatistics, StatisticsIdentity, save_statistics

declare_torchvision_operators()

CHANNELS, GRID, PATCH, WIDTH, DEPTH, HEADS, MLP = 20, 4, 3, 24, 2, 3, 40
SIDE = GRID * PATCH
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _network(**changes: Any) -> RaeDecoderNetwork:
    sizes: dict[str, Any] = {
        "latent_channels": CHANNELS,
        "grid": GRID,
        "image_size": SIDE,
        "patch": PATCH,
        "width": WIDTH,
        "depth": DEPTH,
        "heads": HEADS,
        "mlp_width": MLP,
        "image_mean": MEAN,
        "image_std": STD,
    }
    return build_decoder_network(**{**sizes, **changes})


@pytest.fixture(scope="module")
def trained() -> RaeDecoderNetwork:
    """A network none of whose weights is zero or one."""
    network = _network()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(3, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(6))


def _layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _positions(grid: int, width: int) -> Tensor:
    """Sine and cosine [1+grid², width], columns in the first half, the class token at zero; a grid
    of any size spans that of 16."""
    quarter = width // 4
    frequencies = [10000 ** (-index / quarter) for index in range(quarter)]
    rows = [[0.0] * width]
    for row in range(grid):
        for column in range(grid):
            values: list[float] = []
            for place in (column * 16 / grid, row * 16 / grid):
                values += [math.sin(place * f) for f in frequencies]
                values += [math.cos(place * f) for f in frequencies]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def _by_hand(network: RaeDecoderNetwork, latents: Tensor) -> Tensor:
    """The published decoder in float64 from its state dict, position by position."""
    weights = {
        name.removeprefix("decoder."): tensor.double()
        for name, tensor in network.state_dict().items()
    }

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("bti,oi->bto", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    batch = len(latents)
    tokens = torch.stack(
        [latents[:, :, r, c] for r in range(GRID) for c in range(GRID)], dim=1
    ).double()
    x = linear(tokens, "decoder_embed")
    x = torch.cat([weights["trainable_cls_token"].expand(batch, 1, WIDTH), x], dim=1)
    x = x + _positions(GRID, WIDTH)
    for block in range(DEPTH):
        name = f"decoder_layers.{block}"
        normed = _layer_norm(x, weights, f"{name}.layernorm_before")
        q, k, v = (
            linear(normed, f"{name}.attention.to_{part}").unflatten(-1, (HEADS, -1))
            for part in "qkv"
        )
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(WIDTH / HEADS)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        x = x + linear(mixed, f"{name}.attention.to_out.0")
        hidden = linear(
            _layer_norm(x, weights, f"{name}.layernorm_after"), f"{name}.intermediate.dense"
        )
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, f"{name}.output.dense")
    patches = linear(_layer_norm(x, weights, "decoder_norm"), "decoder_pred")[:, 1:]
    images = torch.empty(batch, 3, SIDE, SIDE, dtype=torch.float64)
    for y in range(SIDE):
        for column in range(SIDE):
            token = (y // PATCH) * GRID + column // PATCH
            inside = (y % PATCH) * PATCH + column % PATCH
            for colour in range(3):
                value = patches[:, token, inside * 3 + colour]
                images[:, colour, y, column] = value * STD[colour] + MEAN[colour]
    return images


@torch.no_grad()
def test_it_is_the_published_decoder_written_out(
    trained: RaeDecoderNetwork, latents: Tensor
) -> None:
    expected = _by_hand(trained, latents)
    assert expected.std() > 0.1
    torch.testing.assert_close(trained(latents).double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_half_precision_a_black_output_is_the_exact_mean(latents: Tensor) -> None:
    network = _network().bfloat16()
    network.last_layer.zero_()
    images = network(latents.bfloat16())
    expected = torch.tensor(MEAN).view(1, 3, 1, 1).expand(3, 3, SIDE, SIDE)
    assert torch.equal(images, expected)


def test_the_last_layer_makes_the_pixels(latents: Tensor) -> None:
    network = _network()
    network(latents).square().mean().backward()
    assert network.last_layer.grad is not None
    assert network.last_layer.shape == (3 * PATCH**2, WIDTH)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_initial_values_depend_on_seed_name_and_shape_alone() -> None:
    shallow, deep, other = _network(depth=1), _network(depth=3), _network(depth=1, seed=1)
    deep_values = deep.state_dict()
    for name, value in shallow.state_dict().items():
        assert torch.equal(value, deep_values[name]), name
    assert not torch.equal(shallow.last_layer, other.last_layer)
    first, second = (deep_values[f"decoder.decoder_layers.{n}.output.dense.weight"] for n in (0, 1))
    assert not torch.equal(first, second)


def test_initial_values_are_those_of_masked_autoencoders() -> None:
    network = _network(width=96, mlp_width=200, depth=1)
    for name, value in network.named_parameters():
        if name.endswith("trainable_cls_token"):
            assert 0.01 < value.std() < 0.03
        elif name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            bound = math.sqrt(6 / sum(value.shape))
            assert 0.97 * bound < value.abs().max() <= bound, name
            assert float(value.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.06), (
                name
            )


@pytest.fixture(scope="module")
def folder(trained: RaeDecoderNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "rae"
    save_autoencoder(trained, path, encoder_name="SigLIP2 with a test-time register")
    return path


@torch.no_grad()
def test_diffusers_decodes_what_was_saved(
    trained: RaeDecoderNetwork, latents: Tensor, folder: Path
) -> None:
    from dsr_scale.encoders.loading import load_autoencoder
    from dsr_scale.encoders.locate import locate

    rae: Any = load_autoencoder(
        "AutoencoderRAE", locate(str(folder)), dtype="fp32", device=torch.device("cpu")
    )
    torch.testing.assert_close(rae.decode(latents).sample, trained(latents), rtol=0, atol=1e-6)
    for name, tensor in trained.decoder.state_dict().items():
        assert torch.equal(rae.decoder.state_dict()[name], tensor), name
    side = rae.encoder_input_size
    assert rae.encode(torch.rand(1, 3, side, side)).latent.isnan().all()
    assert "SigLIP2 with a test-time register" in (folder / "README.md").read_text()
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
    }


@torch.no_grad()
def test_a_run_file_names_the_saved_folder(
    trained: RaeDecoderNetwork, latents: Tensor, folder: Path, tmp_path: Path
) -> None:
    mean = torch.randn(CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(7))
    variance = torch.rand(mean.shape, generator=torch.Generator().manual_seed(8)) + 0.5
    path = tmp_path / "statistics.safetensors"
    model = str(tmp_path)
    identity = StatisticsIdentity(model, None, SIDE)
    save_statistics(path, LatentStatistics(10, mean.double(), variance.double() * 10), identity)
    image = VitImage(
        model=model, channels=CHANNELS, patch=4, input_size=4 * GRID, statistics=str(path)
    )
    encoders = EncodersConfig(image=image, decoder=RaeDecoder(model=str(folder)))
    decoder = build_decoder(encoders, resolution=SIDE, device="cpu")
    assert decoder is not None
    whitened = (latents - mean) / (variance + 1e-5).sqrt()
    expected = (trained(latents) * 255).round().clamp(0, 255)
    difference = (decoder.decode(whitened).float() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert expected.std() > 20


@torch.no_grad()
def test_a_half_precision_network_is_saved_in_single(
    trained: RaeDecoderNetwork, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    save_autoencoder(trained, tmp_path, encoder_name="to be replaced")
    network = _network().bfloat16()
    save_autoencoder(network, tmp_path, encoder_name="any")
    (file,) = tmp_path.glob("*.safetensors")
    saved = load_file(file)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    last = saved["decoder.decoder_pred.weight"]
    assert torch.equal(last, network.last_layer.float())
    assert torch.equal(saved["encoder_mean"].flatten(), torch.tensor(MEAN))


def test_a_place_that_cannot_be_written_is_named(
    trained: RaeDecoderNetwork, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="taken is a file"):
        save_autoencoder(trained, tmp_path / "taken", encoder_name="any")
