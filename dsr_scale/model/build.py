"""From a `ModelShape` to an initialised model, and which of its parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.shape_checks import check_shape
from dsr_scale.model.dit import DiT
from dsr_scale.model.initialisation import initial_values

_NEVER_DECAY = (
    "register_tokens",
    "queries",
    "null_token",
    "embedding_table",
    "byte_table",
    "cls_token",
    "sink",
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


def decay_groups(
    model: nn.Module,
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Parameters that weight decay applies to, and those it spares: (decay, no_decay).

    Matrices decay; norms, biases, embeddings, registers, queries and null tokens do not, nor do the
    keys and values of an attention bias. Decided by
    name and rank of the tensor, so it holds for linears of any class, split or not.
    """
    decay: list[tuple[str, nn.Parameter]] = []
    spared: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        never = any(part.endswith(_NEVER_DECAY) for part in name.split("."))
        (spared if never or parameter.dim() < 2 else decay).append((name, parameter))
    return decay, spared
