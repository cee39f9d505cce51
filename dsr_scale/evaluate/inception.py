"""The Inception network of FID: torch-fidelity's, with TensorFlow's 2015 weights and resizing.

Three things are read from one pass. `pool` is what FID compares. `logits` are those of the Inception
Score, without the bias. `spatial` is what ADM's evaluator compares for sFID: the first 7 channels of
`mixed_6/conv:0` at 17×17. TensorFlow counts the mixed blocks from 5b on, so its mixed_6 is
torch-fidelity's `Mixed_6d`, and its `conv` is the 1×1 branch after the rectifier, `branch1x1`.

The library would download weights by itself, on every rank at once, and unpickle any file it is
given. Here nothing is downloaded: a file is named or lies where the library would have put it, and is
known to hold nothing but tensors before the library reads it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
"""The last eight digits begin the file's SHA-256."""
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"

POOL_CHANNELS = 2048
SPATIAL_SIDE, SPATIAL_DEPTH = 17, 7
SPATIAL_CHANNELS = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_DEPTH
CLASSES = 1008


class InceptionFeatures(NamedTuple):
    """What one pass gives of B images, float32."""

    pool: Tensor
    """[B,2048]"""
    spatial: Tensor
    """[B,2023], in ADM's order: row, column, channel."""
    logits: Tensor
    """[B,1008], without bias."""


def find_weights(given: Path | None) -> Path:
    """The file `given`, or the one in torch's cache. Raises InputError that says what to fetch."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    path = cached if given is None else given
    if not path.is_file():
        raise InputError(
            found=f"no Inception weights at {path}",
            required=f"{WEIGHTS_NAME}, 91 MiB",
            remedy=f"fetch {WEIGHTS_URL} and put it at {cached}, or name the file with "
            "--inception-weights",
        )
    return path


class Inception:
    """The frozen network on one device."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Raises InputError when the library is not installed or the file does not fit."""
        self.weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._network = _load(weights).to(device)
        self._device = device
        self._spatial: list[Tensor] = []
        self._network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            lambda module, inputs, output: self._spatial.append(output[:, :SPATIAL_DEPTH])
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> InceptionFeatures:
        """Features of uint8 images [B,3,H,W] of any size."""
        pool, logits = self._network(images.to(self._device))
        spatial = self._spatial.pop().permute(0, 2, 3, 1).flatten(1)
        return InceptionFeatures(pool, spatial.float(), logits)


def _load(weights: Path) -> torch.nn.Module:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError(
            found="no package torch-fidelity",
            required="the Inception network that FID is defined by",
            remedy="pip install 'dsr-scale[eval]'",
        )
    declare_torchvision_operators()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(weights, weights_only=True, map_location="cpu")
        return FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(weights),
        )
    # torch.load raises nearly anything on files that are not its own.
    except Exception as error:
        raise InputError(
            found=f"{weights} does not fit Inception: {' '.join(str(error).split())[:300]}",
            required=f"{WEIGHTS_NAME} as torch-fidelity publishes it",
            remedy=f"fetch {WEIGHTS_URL} again",
        ) from error
