"""The files that RAE and DSR released, as they lie on the disk: weights, averages, moments, statistics.

Training files are pickles; only tensors and plain values are taken from them. They are mapped into
memory, so that of a file with optimizer no more is read than is used.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.export.published import AVERAGED_TOLERANCE, FREQUENCIES, fixed_positions

KINDS = ("model", "ema")
"""What a training file calls its weights and their average."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


@dataclass(frozen=True)
class PublishedFile:
    """What a released file holds, on the CPU; tensors of large files are mapped, not read."""

    path: Path
    states: Mapping[str, dict[str, Tensor]]
    """State dicts by kind, of `KINDS`; a bare one is `model`."""
    step: int | None
    """Optimizer steps, where the file says so."""
    optimizer: Mapping[str, Any] | None
    """State dict of torch's AdamW, of `model`."""

    def kind(self, wanted: str | None) -> str:
        """`wanted`, or the average where there is one. Raises InputError for a kind that is not there."""
        if wanted is None:
            return "ema" if "ema" in self.states else "model"
        if wanted not in self.states:
            raise InputError(
                found=f"no {wanted} in {self.path}, only {', '.join(self.states)}",
                required="weights that the file holds",
                remedy="choose the other kind; a bare state dict counts as model",
            )
        return wanted


def read_published(path: Path) -> PublishedFile:
    """Reads a training file (`model`, `ema`, …) or a bare state dict; drops the prefixes of wrappers.

    Only tensors and plain values are unpickled. Raises InputError for a file that is neither.
    """
    content = load_tensors(path)
    named = {kind: content[kind] for kind in KINDS if isinstance(content.get(kind), dict)}
    states = {
        kind: {_unwrapped(name): value for name, value in state.items()}
        for kind, state in (named or {"model": content}).items()
    }
    for kind, state in states.items():
        strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if strange or not state:
            raise InputError(
                found=f"{path}: {kind} with {', '.join(strange[:5]) or 'nothing'}, not tensors",
                required="a state dict, or a training file with model or ema",
                remedy="give a file that the trainers of RAE or DSR saved",
            )
    step = content.get("step")
    return PublishedFile(
        path,
        states,
        step if isinstance(step, int) else None,
        content.get("optimizer") if named else None,
    )


def load_tensors(path: Path) -> dict[str, Any]:
    """The dict that `torch.save` wrote to `path`, mapped where its format allows.

    Raises InputError when it is missing, no such file, or holds more than tensors and plain values.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Files in the format before torch 1.6 cannot be mapped.
        except RuntimeError:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            found=f"{path} could not be read: {' '.join(str(error).split())[:300]}",
            required="a file of tensors and plain values as torch.save writes it",
            remedy="check the path, or download the file again",
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            found=f"{path} with a {type(content).__name__}",
            required="a dict of tensors",
            remedy="give a file that the trainers of RAE or DSR saved",
        )
    return {str(name): value for name, value in content.items()}


def _unwrapped(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def published_moments(
    file: PublishedFile, shape: ModelShape
) -> tuple[dict[str, dict[str, Tensor]], int] | None:
    """AdamW's moments by kind and parameter, as released, and its step; None in a file without them.

    The released trainer numbers the parameters that train in the order in which the model registers
    them, which is the order of its state dict. Raises InputError when sizes say otherwise.
    """
    if file.optimizer is None or "model" not in file.states:
        return None
    frozen = {FREQUENCIES, *fixed_positions(shape)}
    names = [name for name in file.states["model"] if name not in frozen]
    groups, entries = file.optimizer.get("param_groups", []), file.optimizer.get("state", {})
    numbers = [number for group in groups for number in group["params"]]
    moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
    fits = len(groups) == 1 and len(numbers) == len(names)
    for name, number in zip(names, numbers, strict=False):
        for kind in MOMENTS:
            moment = entries.get(number, {}).get(kind)
            if moment is None or moment.shape != file.states["model"][name].shape:
                fits = False
            else:
                moments[kind][name] = moment
    if not fits:
        raise InputError(
            found=f"{file.path}: an optimizer of {len(entries)} parameters in {len(groups)} groups, "
            f"whose sizes are not those of the {len(names)} parameters that train, in their order",
            required="AdamW with both moments of every parameter, as the released trainer saves it",
            remedy="start without moments: --fresh-optimizer",
        )
    return moments, int(entries[numbers[0]]["step"])


def frequencies(file: PublishedFile) -> Tensor:
    """The timestep frequencies [256] of weights and average, which share them in a training checkpoint.

    The average's own have drifted like the fixed positions. Raises InputError when the two differ by
    more, so that they are of two networks.
    """
    first, *others = (state[FREQUENCIES].float() for state in file.states.values())
    for other in others:
        if not bool(((other - first).abs() <= AVERAGED_TOLERANCE * first.abs()).all()):
            raise InputError(
                found=f"{file.path}: model and ema with different {FREQUENCIES}",
                required="weights and their own average",
                remedy="give a file as one training saved it, or a bare state dict",
            )
    return first


def read_statistics(path: Path, wanted: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of latents, float64 [C,h,w] of the `wanted` sizes; a batch of one is taken too.

    Raises InputError for a file without them, of other sizes, or with a variance below 0.
    """
    content = load_tensors(path)
    found = {}
    for part in ("mean", "var"):
        value = content.get(part)
        if isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1:
            value = value[0]
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            held = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                found=f"{path}: {part} is {held}",
                required=f"mean and var {list(wanted)}, the sizes of the encoder's latents",
                remedy="choose the encoder that the file belongs to",
            )
        found[part] = value.double()
    if not bool((found["var"] >= 0).all()) or not bool(found["mean"].isfinite().all()):
        raise InputError(
            found=f"{path} with a var below 0, or undefined values",
            required="mean and variance of finite latents",
            remedy="download the file again",
        )
    return found["mean"], found["var"]
