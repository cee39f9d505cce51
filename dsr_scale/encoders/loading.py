"""Loads a pretrained network for inference only: every weight found, frozen, in evaluation mode.

The libraries initialise weights at random where a checkpoint lacks them and only log it. A frozen
encoder with random weights trains a model on noise, so here that is an error. What a checkpoint
has and the network does not use (heads, decoders) is dropped without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import Dtype
from dsr_scale.encoders.locate import Location

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@contextlib.contextmanager
def loading_errors(location: Location) -> Iterator[None]:
    """Turns a failed download or unreadable files into an InputError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    # RuntimeError is how both libraries report weights whose shape is not what the config says.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(location, error) from error


def _not_loaded(location: Location, error: Exception) -> InputError:
    found = f"{location.source} could not be loaded: {' '.join(str(error).split())[:400]}"
    if location.is_local:
        return InputError(
            found=found,
            required="whole files as save_pretrained writes them, weights that fit their config",
            remedy="copy or download this directory again",
        )
    revision = f" --revision {location.revision}" if location.revision else ""
    return InputError(
        found=found,
        required="a model on the hub that this machine can reach or has already downloaded",
        remedy=f"on a machine with network run 'hf download {location.source}{revision}' into a "
        "cache that this machine sees (HF_HOME), or copy the model here and give its directory",
    )


def load_transformer(
    model_class: Any, location: Location, *, dtype: Dtype, device: torch.device, **options: Any
) -> Any:
    """A frozen transformers model of `model_class`; `options` go to its `from_pretrained`.

    Raises InputError when it cannot be loaded or the checkpoint lacks weights other than a pooler's.
    """
    declare_torchvision_operators()
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with loading_errors(location):
            model, report = model_class.from_pretrained(
                location.source,
                revision=location.revision,
                dtype=TORCH_DTYPES[dtype],
                output_loading_info=True,
                **options,
            )
    finally:
        logging.set_verbosity(verbosity)
    # Language models saved without their pooling head get a random one, whose output is not read.
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    _require_complete(location, missing)
    return _frozen(model, device)


def load_autoencoder(
    class_name: str, location: Location, *, dtype: Dtype, device: torch.device
) -> Any:
    """A frozen diffusers model of the class with that name.

    Raises InputError when it cannot be loaded or the checkpoint lacks weights.
    """
    declare_torchvision_operators()
    import diffusers
    from transformers import modeling_utils

    # AutoencoderRAE makes a transformers 4 model while diffusers has switched torch's initialisers
    # off, which fails unless transformers skips its own too (diffusers issue 13279).
    without_initialisation = getattr(modeling_utils, "no_init_weights", contextlib.nullcontext)
    with loading_errors(location), without_initialisation():
        model, report = getattr(diffusers, class_name).from_pretrained(
            location.source,
            revision=location.revision,
            torch_dtype=TORCH_DTYPES[dtype],
            output_loading_info=True,
        )
    _require_complete(location, list(report["missing_keys"]))
    return _frozen(model, device)


def require_equal(name: str, configured: object, loaded: object, location: Location) -> None:
    """Raises InputError when a configured value is not what the loaded model's config says."""
    if configured != loaded:
        raise InputError(
            found=f"{name} = {configured}, but {location.source} has {loaded}",
            required="a config that agrees with the model",
            remedy=f"set {name} to {loaded}, or choose another model",
        )


def _require_complete(location: Location, missing: list[str]) -> None:
    if missing:
        raise InputError(
            found=f"{location.source} lacks {len(missing)} weights of the network, among them "
            f"{', '.join(sorted(missing)[:3])}",
            required="a checkpoint with every weight",
            remedy="give a checkpoint of this architecture, or download it again",
        )


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)
