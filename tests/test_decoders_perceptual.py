"""LPIPS from its definition, in float64, with drawn backbone weights in torchvision's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.decoders.perceptual import Backbone, open_lpips

declare_torchvision_operators()

Layer = tuple[int, int, int, int]
"""Channels, kernel, stride, padding of a convolution; a rectifier follows each."""

VGG16: list[Layer | str] = []
for _width, _count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
    VGG16 += [(_width, 3, 1, 1)] * _count + ["tap", "pool 2"]
ALEXNET: list[Layer | str] = [
    *((64, 11, 4, 2), "tap", "pool 3", (192, 5, 1, 2), "tap", "pool 3"),
    *((384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap"),
]
NETWORKS: dict[Backbone, list[Layer | str]] = {"vgg": VGG16, "alex": ALEXNET}


def _drawn(network: Backbone) -> dict[str, Tensor]:
    """Convolutions at the indices that rectifiers and poolings leave, and what is not used."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {"classifier.6.bias": torch.zeros(1000)}
    index, inward = 0, 3
    for layer in NETWORKS[network]:
        if isinstance(layer, tuple):
            outward, kernel = layer[:2]
            shape = (outward, inward, kernel, kernel)
            spread = (2 / (inward * kernel**2)) ** 0.5
            weights[f"features.{index}.weight"] = spread * torch.randn(shape, generator=generator)
            weights[f"features.{index}.bias"] = 0.1 * torch.randn(outward, generator=generator)
            inward = outward
            index += 2
        elif layer.startswith("pool"):
            index += 1
    return weights


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[Backbone, Path]:
    directory = tmp_path_factory.mktemp("backbones")
    paths: dict[Backbone, Path] = {name: directory / f"{name}.pth" for name in NETWORKS}
    for name, path in paths.items():
        torch.save(_drawn(name), path)
    return paths


def _pairs(side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, side, side, generator=generator), torch.rand(
        2, 3, side, side, generator=generator
    )


def _taps(images: Tensor, network: Backbone) -> list[Tensor]:
    weights = _drawn(network)
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
    x = (images.double() * 2 - 1 - shift) / scale
    taps: list[Tensor] = []
    index = 0
    for layer in NETWORKS[network]:
        if isinstance(layer, tuple):
            kernel, bias = (
                weights[f"features.{index}.{part}"].double() for part in ("weight", "bias")
            )
            x = functional.conv2d(x, kernel, bias, stride=layer[2], padding=layer[3]).clamp(min=0)
            index += 2
        elif layer == "tap":
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        else:
            x = functional.max_pool2d(x, int(layer[-1]), 2)
            index += 1
    return taps


def _by_definition(a: Tensor, b: Tensor, network: Backbone) -> Tensor:
    """Σ over depths of the mean over positions of the heads' weighted squared differences."""
    import lpips

    file = Path(str(lpips.__file__)).parent / "weights" / "v0.1" / f"{network}.pth"
    heads = torch.load(file, weights_only=True, map_location="cpu")
    total = torch.zeros(len(a), dtype=torch.float64)
    for depth, (x, y) in enumerate(zip(_taps(a, network), _taps(b, network), strict=True)):
        weight = heads[f"lin{depth}.model.1.weight"].double().flatten()
        total += ((x - y).square() * weight[:, None, None]).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize(("network", "side"), [("vgg", 32), ("alex", 63)])
@torch.no_grad()
def test_it_is_lpips(backbones: dict[Backbone, Path], network: Backbone, side: int) -> None:
    metric = open_lpips(network, str(backbones[network]))
    a, b = _pairs(side)
    expected = _by_definition(a, b, network)
    assert (expected > 0.01).all()
    torch.testing.assert_close(metric.distance(a, b).double(), expected, rtol=1e-4, atol=1e-7)
    assert not metric.distance(a, a).any()
    # Training mode must not switch on the dropout that the package's heads come with.
    metric.train()
    torch.testing.assert_close(metric.distance(a, b).double(), expected, rtol=1e-4, atol=1e-7)


def test_gradients_reach_the_images_alone(backbones: dict[Backbone, Path]) -> None:
    metric = open_lpips("alex", str(backbones["alex"]))
    a, b = _pairs(63)
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = metric.distance(a, b)
    assert distance.dtype == torch.float32
    distance.sum().backward()
    assert a.grad is not None
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    step = 1e-2 * a.grad / a.grad.abs().max()
    with torch.no_grad():
        gained = (metric.distance(a + step, b) - metric.distance(a - step, b)).sum() / 2
    assert float(gained) == pytest.approx(float((step * a.grad).sum()), rel=0.05)


def test_missing_weights_say_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        open_lpips("vgg", None)
    assert str(tmp_path / "hub/checkpoints/vgg16-397923af.pth") in caught.value.found
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in caught.value.remedy
    assert "decoder.losses.lpips.weight=0" in caught.value.remedy
    with pytest.raises(InputError, match=r"alexnet-owt-7be5be79\.pth"):
        open_lpips("alex", str(tmp_path / "nowhere.pth"))


def test_the_file_in_torchs_cache_is_found(
    backbones: dict[Backbone, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "alexnet-owt-7be5be79.pth").symlink_to(backbones["alex"])
    a, b = _pairs(63)
    named = open_lpips("alex", str(backbones["alex"])).distance(a, b)
    assert torch.equal(open_lpips("alex", None).distance(a, b), named)


def test_weights_of_another_network_are_refused(
    backbones: dict[Backbone, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="does not fit LPIPS' backbone"):
        open_lpips("alex", str(backbones["vgg"]))
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="does not fit LPIPS' backbone"):
        open_lpips("vgg", str(garbage))
