"""The discriminator: features of the whole network, heads written out, and where gradients go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.decoders.discriminator import (
    Discriminator,
    Head,
    SpectralConv2d,
    discriminator_loss,
    generator_loss,
    open_discriminator,
)

declare_torchvision_operators()
import transformers  # noqa: E402

WIDTH, PATCH, SIDE, LAYERS = 24, 4, 16, 4
GRID = SIDE // PATCH
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
}


def _dino() -> Any:
    config = transformers.ViTConfig(**SMALL, intermediate_size=48)
    return transformers.ViTModel(config, add_pooling_layer=False)


def _dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**SMALL, "image_size": 24}))


def _dinov2_with_registers() -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config)


def _dinov3() -> Any:
    config = transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2)
    return transformers.DINOv3ViTModel(config)


FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "dino": (_dino, 1),
    "dinov2": (_dinov2, 1),
    "dinov2 with registers": (_dinov2_with_registers, 4),
    "dinov3": (_dinov3, 3),
}
"""How a checkpoint is made, and how many tokens stand before its patches."""


def _saved(directory: Path, family: str = "dino") -> Any:
    """Writes a checkpoint with large random weights; returns its network."""
    torch.manual_seed(0)
    network = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    network.save_pretrained(directory)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": 20},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return network


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino")
    _saved(path)
    return path


def _images(batch: int, side: int = SIDE) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_hidden_states_of_the_whole_network(tmp_path: Path, family: str) -> None:
    network = _saved(tmp_path, family)
    discriminator = open_discriminator(str(tmp_path), None, blocks=[2, 0], seed=0)
    discriminator.train()
    images = _images(2)
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    states = network(pixels, output_hidden_states=True).hidden_states
    for ours, block in zip(discriminator.features(images), (2, 0), strict=True):
        tokens = states[block + 1][:, FAMILIES[family][1] :]
        assert tokens.shape[1] == GRID**2
        for row in range(GRID):
            for column in range(GRID):
                expected = tokens[:, row * GRID + column]
                torch.testing.assert_close(ours[:, :, row, column], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_sizes_are_resized_to_what_the_processor_feeds(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[1], seed=0)
    images = _images(2, 40)
    small = functional.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    assert torch.equal(discriminator(images), discriminator(small))
    flat = torch.full((1, 3, 40, 40), 0.3)
    torch.testing.assert_close(discriminator(flat), discriminator(flat[..., :SIDE, :SIDE]))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(-1, keepdim=True)
    parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return parts.reshape(x.shape) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


@torch.no_grad()
def test_a_head_written_out() -> None:
    head = Head(WIDTH)
    generator = torch.Generator().manual_seed(4)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, WIDTH, GRID, GRID, generator=generator)
    weights = {name: value.double() for name, value in head.state_dict().items()}

    def convolved(x: Tensor, name: str) -> Tensor:
        kernel = weights[f"{name}.weight"]
        # The iteration stops short of the norm; how far is another test.
        kernel = kernel / float(getattr(head, name).largest_singular_value())
        side = kernel.shape[-1]
        columns = functional.unfold(x, side, padding=side // 2)
        return (kernel.flatten(1) @ columns).unflatten(2, (GRID, GRID)) + weights[
            f"{name}.bias"
        ].view(1, -1, 1, 1)

    def activated(x: Tensor, name: str) -> Tensor:
        x = _norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 8)
        return torch.where(x > 0, x, 0.2 * x)

    y = activated(convolved(x.double(), "inward"), "inward_norm")
    y = (y + activated(convolved(y, "around"), "around_norm")) / math.sqrt(2)
    expected = convolved(y, "outward")
    assert expected.std() > 0.1
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_spectral_bound_is_the_largest_singular_value_but_for_a_few_percent() -> None:
    for kernel in (1, 3):
        layer = SpectralConv2d(64, 48, kernel)
        layer.weight.normal_(generator=torch.Generator().manual_seed(kernel))
        exact = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert 0.94 * exact < layer.largest_singular_value() <= exact * (1 + 1e-5)
        layer.weight[0].mul_(20)
        exact = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        torch.testing.assert_close(layer.largest_singular_value(), exact, rtol=1e-4, atol=0)
        assert layer.bias is not None
        layer.bias.zero_()
        x = torch.randn(1, 64, 5, 5)
        before = layer(x)
        layer.weight.mul_(1000)
        torch.testing.assert_close(layer(x), before)


@torch.no_grad()
def test_half_precision_features_under_heads_in_single(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[0, 3], seed=0)
    images = _images(2)
    exact = discriminator(images)
    discriminator.features.to(torch.bfloat16)
    rounded = discriminator(images)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.1 * exact.std()


@torch.no_grad()
def test_logits_of_an_image_do_not_depend_on_its_batch(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[0, 3], seed=0)
    images = _images(4)
    together = discriminator(images)
    assert together.shape == (4, 2 * GRID**2)
    assert together.std() > 0.05
    torch.testing.assert_close(together[2:3], discriminator(images[2:3]), rtol=1e-4, atol=1e-5)


def test_heads_are_drawn_from_the_seed_and_are_the_whole_state(directory: Path) -> None:
    def opened(seed: int) -> Discriminator:
        return open_discriminator(str(directory), None, blocks=[0, 3], seed=seed)

    first, again, other = opened(1), opened(1), opened(2)
    images = _images(2)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))
    other.heads.load_state_dict(first.heads.state_dict())
    assert torch.equal(first(images), other(images))


def _step(discriminator: Discriminator, loss: Tensor) -> None:
    discriminator.zero_grad()
    loss.backward()


def test_its_own_step_changes_heads_only(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[0, 3], seed=0)
    trained = {name for name, p in discriminator.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in discriminator.named_parameters() if "heads." in name}
    fake = _images(4)[2:].requires_grad_()
    logits = discriminator(_images(2)), discriminator(fake.detach())
    _step(discriminator, discriminator_loss(*logits))
    assert fake.grad is None
    for name, parameter in discriminator.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_the_generators_step_reaches_the_images(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[0, 3], seed=0).double()
    fake = _images(1).double().requires_grad_()
    _step(discriminator, generator_loss(discriminator.features(fake)[1].square()))
    assert fake.grad is not None
    direction = torch.randn(fake.shape, generator=torch.Generator().manual_seed(2)).double() * 1e-5
    with torch.no_grad():
        ends = [
            generator_loss(discriminator.features(fake + sign * direction)[1].square())
            for sign in (1, -1)
        ]
    expected = float((fake.grad * direction).sum())
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(expected, rel=1e-4)
    (pull,) = torch.autograd.grad(generator_loss(discriminator(fake)), fake)
    assert pull.ne(0).all()


def test_heads_learn_to_tell_two_kinds_of_images_apart(directory: Path) -> None:
    discriminator = open_discriminator(str(directory), None, blocks=[0, 3], seed=0)
    optimizer = torch.optim.Adam(discriminator.heads.parameters(), lr=5e-3)
    real = _images(8)
    fake = functional.avg_pool2d(real, 3, 1, 1)
    first = float(discriminator_loss(discriminator(real), discriminator(fake)))
    for _ in range(20):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.5 * first


def test_hinge_losses_by_hand() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    fake = torch.tensor([[-2.0, -0.5], [3.0, 0.0]])
    assert float(discriminator_loss(real, fake)) == pytest.approx(
        ((0 + 0.5 + 2 + 0) / 4 + (0 + 0.5 + 4 + 1) / 4) / 2
    )
    assert float(generator_loss(fake)) == pytest.approx(-(-2 - 0.5 + 3 + 0) / 4)


def test_what_cannot_be_features_is_refused(directory: Path, tmp_path: Path) -> None:
    for blocks in ([], [4], [-1], [1, 1]):
        with pytest.raises(InputError, match="from 0 to 3"):
            open_discriminator(str(directory), None, blocks=blocks, seed=0)
    with pytest.raises(InputError, match=r"decoder\.adversarial=null"):
        open_discriminator(str(tmp_path / "nowhere"), None, blocks=[0], seed=0)
    _saved(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        open_discriminator(str(tmp_path / "bare"), None, blocks=[0], seed=0)
    _without_a_weight(tmp_path / "torn")
    with pytest.raises(InputError, match=r"lacks 1 weights, such as layernorm\.weight"):
        open_discriminator(str(tmp_path / "torn"), None, blocks=[0], seed=0)


def _without_a_weight(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    _saved(directory)
    weights = load_file(directory / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
