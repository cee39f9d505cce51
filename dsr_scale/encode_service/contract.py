"""What fixes the latents and tokens of an image and a caption, as flat text that can be compared.

Two encoders of equal contract give equal answers, so a trainer may ask either, and latents on disk may
stand in for both. What follows from the run file is known to everyone (`expected`); what only a
loaded encoder knows, its weights, the files beside them and the kind of device, is added by whoever
loaded it and must then be the same everywhere. Names on the hub are compared, directories are not: two
machines mount them where they like, and what lies in them is in the digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    ImageEncoderConfig,
    PixelsImage,
    TransformersText,
    VaeImage,
    VitImage,
)
from dsr_scale.config.run import AnyRun
from dsr_scale.encode_service.wire import PROTOCOL
from dsr_scale.encoders.contract import ImageEncoder, TextEncoder
from dsr_scale.encoders.locate import is_place
from dsr_scale.encoders.outliers import treatment_identity

_PLACES = {"model", "name", "statistics", "outliers", "cache_mib"}
"""Fields that say where something is or how much is kept, not what comes out."""


@dataclass(frozen=True)
class Contract:
    """Everything that the answers depend on, by name."""

    values: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any value."""
        text = json.dumps(dict(self.values), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, wanted: Mapping[str, str]) -> list[str]:
        """What is not as in `wanted`, which may know less than this; one text for each name."""
        return [
            f"{name} is {self.values.get(name, 'missing')}, wanted {value}"
            for name, value in sorted(wanted.items())
            if self.values.get(name) != value
        ]

    def to_json(self) -> bytes:
        """As a server describes itself."""
        return json.dumps(dict(self.values), sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Contract:
        """Raises ValueError for anything else than an object of strings."""
        values = json.loads(text)
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ValueError("no JSON object of strings")
        return cls(values)


def expected(run: AnyRun) -> Contract:
    """What the run file alone says. Raises InputError when a file that it names cannot be read."""
    image, text = run.encoders.image, run.encoders.text
    values = {
        "protocol": str(PROTOCOL),
        "resolution": str(run.data.resolution),
        "background": str(run.data.background),
        "latent_dtype": run.encoders.latent_dtype,
        **_settings("image", image.model_dump(mode="json")),
        **_settings("text", text.model_dump(mode="json")),
    }
    names = {
        "image.model": _image_name(image),
        "text.model": text.model if isinstance(text, TransformersText) else None,
    }
    values |= {key: name for key, name in names.items() if name and not is_place(name)}
    if isinstance(image, VitImage):
        values["image.statistics"] = _file_identity(image.statistics)
        values["image.outliers"] = treatment_identity(image.outliers)
    return Contract(values)


def served(
    run: AnyRun, image: ImageEncoder, text: TextEncoder | None, device: torch.device
) -> Contract:
    """What loaded encoders fulfil: the run file's contract, what they read, and the kind of device.

    Reads every weight; seconds for a large language model.
    """
    values = dict(expected(run).values)
    for name, encoder in (("image", image), ("text", text)):
        if encoder is None:
            continue
        if encoder.network is not None:
            values[f"{name}.weights"] = weights_fingerprint(encoder.network)
        if encoder.files_digest is not None:
            values[f"{name}.files"] = encoder.files_digest
    values["device"] = device.type
    if device.type == "cuda":
        values["device"] += " {}.{}".format(*torch.cuda.get_device_capability(device))
    return Contract(values)


def weights_fingerprint(network: nn.Module) -> str:
    """32 hexadecimal digits over name, dtype, shape and bytes of every parameter and buffer."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(network.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous()
        state.update(memoryview(content.reshape(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def _image_name(image: ImageEncoderConfig) -> str | None:
    match image:
        case VitImage():
            return image.known_as
        case VaeImage():
            return image.model
        case PixelsImage():
            return None


def _settings(section: str, settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{name}": str(value) for name, value in settings.items() if name not in _PLACES
    }


def _file_identity(path: str | None) -> str:
    if path is None:
        return "none"
    try:
        return xxhash.xxh3_128_hexdigest(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise InputError(
            found=f"{path} could not be read: {error.strerror}",
            required="the statistics file that encoders.image.statistics names",
            remedy="compute it with dsr-scale stats, or correct the path",
        ) from error
