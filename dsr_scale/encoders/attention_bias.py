"""A constant key and value per layer on disk: the attention bias that stands in for a register.

The file belongs to one list of register neurons, whose fingerprint it carries, and through it to
one encoder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from dsr_scale.base.atomic_files import write_bytes
from dsr_scale.base.errors import InputError
from dsr_scale.encoders.register_file import RegisterFile

_REMEDY = "record it again with dsr-scale registers, or correct encoders.image.outliers.bias"


def save_attention_bias(path: Path, key: Tensor, value: Tensor, neurons: RegisterFile) -> None:
    """Writes `key` and `value` [layers,C] as float32 safetensors, atomically.

    Raises InputError when the path cannot be written.
    """
    from safetensors.torch import save

    tensors = {"key": key, "value": value}
    content = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(content, metadata=_metadata(neurons)))


def load_attention_bias(path: Path, neurons: RegisterFile) -> tuple[Tensor, Tensor]:
    """The key and value, float32 [layers,C] each, that were recorded with these neurons.

    Raises InputError when the file is missing, unreadable or recorded with others.
    """
    from safetensors import SafetensorError, safe_open

    path = path.expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            found=f"{path} could not be read: {error}",
            required="a safetensors file with key and value [layers, channels]",
            remedy=_REMEDY,
        ) from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    key, value = tensors.get("key"), tensors.get("value")
    if key is None or value is None or key.ndim != 2 or key.shape != value.shape:
        raise InputError(
            found=f"{path} with tensors {shapes}",
            required="key and value [layers, channels]",
            remedy=_REMEDY,
        )
    held = {name: metadata.get(name, "missing") for name in _metadata(neurons)}
    if held != _metadata(neurons):
        raise InputError(
            found=f"{path}, recorded with {held}",
            required=f"an attention bias recorded with {_metadata(neurons)}",
            remedy=_REMEDY,
        )
    if not bool(torch.isfinite(key).all() and torch.isfinite(value).all()):
        raise InputError(
            found=f"{path} with infinities or NaN", required="finite numbers", remedy=_REMEDY
        )
    return key.float(), value.float()


def bias_fingerprint(key: Tensor, value: Tensor) -> str:
    """32 hexadecimal digits over the numbers of float32 [layers,C] tensors on the CPU."""
    state = hashlib.blake2b(f"{list(key.shape)}".encode(), digest_size=16)
    for tensor in (key, value):
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def _metadata(neurons: RegisterFile) -> dict[str, str]:
    return {
        "encoder": neurons.encoder,
        "revision": neurons.revision or "",
        "input_size": str(neurons.input_size),
        "neurons": neurons.fingerprint,
    }
