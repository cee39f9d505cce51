"""LPIPS: how far two images are apart for an eye, as the `lpips` package defines it (version 0.1).

The package carries its linear heads; its backbone is torchvision's classifier, which the package
would download by itself on every rank at once. Here nothing is downloaded: a file is named or lies
where torch keeps such files, holds nothing but tensors, and must fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators

Backbone = Literal["vgg", "alex"]

WEIGHTS_URLS: dict[Backbone, str] = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
"""The last eight digits begin the file's SHA-256."""


class Perceptual(nn.Module):
    """The frozen metric. It has no dropout, so training mode changes nothing."""

    def __init__(self, metric: nn.Module) -> None:
        """`metric`: `lpips.LPIPS` with all its weights."""
        super().__init__()
        self.metric = metric.eval().requires_grad_(False)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS [B] of images [B,3,H,W] in [0, 1], each with the one at its place, in float32."""
        with torch.autocast(a.device.type, enabled=False):
            return self.metric(a.float(), b.float(), normalize=True).flatten()


def open_lpips(network: Backbone, backbone: str | None) -> Perceptual:
    """LPIPS on the CPU; `backbone` is torchvision's state dict, None for the one in torch's cache.

    Raises InputError that says what to fetch when there is no such file, or when it does not fit.
    """
    path = _find(network, backbone)
    declare_torchvision_operators()
    import lpips

    # On the meta device: the constructor draws a whole classifier of 138 million weights for VGG.
    with torch.device("meta"):
        metric = lpips.LPIPS(
            net=network, pretrained=False, pnet_rand=True, use_dropout=False, verbose=False
        )
    metric.scaling_layer = lpips.ScalingLayer()
    metric.net.load_state_dict(_backbone_weights(metric.net, network, path), assign=True)
    _load_heads(metric, Path(str(lpips.__file__)).parent / "weights" / "v0.1" / f"{network}.pth")
    return Perceptual(metric)


def _find(network: Backbone, given: str | None) -> Path:
    name = WEIGHTS_URLS[network].rsplit("/", 1)[-1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = cached if given is None else Path(given).expanduser()
    if not path.is_file():
        raise InputError(
            found=f"no weights of LPIPS' backbone at {path}",
            required=f"{name} as torchvision publishes it",
            remedy=f"fetch {WEIGHTS_URLS[network]} and put it at {cached}, or name the file with "
            "decoder.losses.lpips.backbone; decoder.losses.lpips.weight=0 goes without",
        )
    return path


def _backbone_weights(backbone: Any, network: Backbone, path: Path) -> dict[str, Tensor]:
    """Torchvision's convolutions `features.N.…` under the package's names `sliceK.N.…`."""
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
        weights = {
            name: stored[f"features.{name.split('.', 1)[1]}"].float()
            for name in backbone.state_dict()
        }
        misshapen = [
            name for name, old in backbone.state_dict().items() if weights[name].shape != old.shape
        ]
        if misshapen:
            raise ValueError(f"other shapes at {', '.join(misshapen[:3])}")
    # torch.load raises nearly anything on files that are not its own.
    except Exception as error:
        raise InputError(
            found=f"{path} does not fit LPIPS' backbone: {' '.join(str(error).split())[:300]}",
            required=f"the state dict of torchvision's {'VGG-16' if network == 'vgg' else 'AlexNet'}",
            remedy=f"fetch {WEIGHTS_URLS[network]} again",
        ) from error
    return weights


def _load_heads(metric: Any, path: Path) -> None:
    """The package's linear heads, which it names after the place behind their dropout."""
    stored = torch.load(path, weights_only=True, map_location="cpu")
    for number, head in enumerate(metric.lins):
        head.load_state_dict({"model.0.weight": stored[f"lin{number}.model.1.weight"]}, assign=True)
