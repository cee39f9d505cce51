"""From a `ModelShape` to an initialised model, and which of its parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.model.dit import DiT
from dsr_scale.model.initialisation import initial_values
from dsr_scale.model.layers import refuse_masked_flash

_NEVER_DECAY = (
    "register_tokens",
    "queries",
    "null_token",
    "embedding_table",
    "byte_table",
)


def build_model(shape: ModelShape, *, seed: int) -> DiT:
    """The model of `shape` on the CPU in float32, initialised as published, a function of `seed`.

    Leaves the global random state alone. Raises InputError for sizes that do not fit together.
    """
    check_shape(shape)
    model = build_on_meta(shape).to_empty(device="cpu")
    state = model.state_dict()
    with torch.no_grad():
        for name, draw in initial_values(model, seed):
            state.pop(name).copy_(draw())
    assert not state, f"no initial value for {sorted(state)}"
    return model


def build_on_meta(shape: ModelShape) -> DiT:
    """The model's names and sizes without memory: for counting, planning and sharded construction."""
    with torch.device("meta"):
        return DiT(shape)


def check_shape(shape: ModelShape) -> None:
    """Raises InputError for widths, heads, grids and registers that do not fit together."""
    parts = [("model", shape.width, shape.heads)]
    if shape.head is not None:
        parts.append(("model.head", shape.head.width, shape.head.heads))
    for name, width, heads in parts:
        if width % (4 * heads):
            raise InputError(
                found=f"{name}.width = {width}, {name}.heads = {heads}",
                required="a head width, width ÷ heads, divisible by 4 (rows and columns of RoPE pairs)",
                remedy=f"set {name}.width to a multiple of {4 * heads}, or change {name}.heads",
            )
    if shape.grid[0] % shape.patch or shape.grid[1] % shape.patch:
        raise InputError(
            found=f"a latent grid of {shape.grid[0]}×{shape.grid[1]}, model.patch = {shape.patch}",
            required="a grid divisible by the patch",
            remedy="change model.patch or data.resolution",
        )
    if shape.registers and shape.register_start >= shape.depth:
        raise InputError(
            found=f"model.registers.start = {shape.register_start} in a body of {shape.depth} blocks",
            required="a start block below model.depth",
            remedy=f"set model.registers.start to at most {shape.depth - 1}, or model.registers.count to 0",
        )
    if shape.conditioning.kind != "class" and shape.text_kind == "none":
        raise InputError(
            found=f"model.conditioning.kind = {shape.conditioning.kind} without a text encoder",
            required="captions as bytes or features",
            remedy="set encoders.text, or model.conditioning.kind to class",
        )
    if shape.attention == "flash" and shape.conditioning.kind == "in_context":
        raise refuse_masked_flash()


def decay_groups(
    model: nn.Module,
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Parameters that weight decay applies to, and those it spares: (decay, no_decay).

    Matrices decay; norms, biases, embeddings, registers, queries and null tokens do not. Decided by
    name and rank of the tensor, so it holds for linears of any class, split or not.
    """
    decay: list[tuple[str, nn.Parameter]] = []
    spared: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        never = any(part.endswith(_NEVER_DECAY) for part in name.split("."))
        (spared if never or parameter.dim() < 2 else decay).append((name, parameter))
    return decay, spared
