"""What outlier treatments do inside a forward pass, as hooks on a transformer's own modules.

The library's forward stays in charge, so attention remains the fused one. A register goes between the
special tokens and the patches: attention knows no order, so this equals the released "after the
patches" but for the order of sums, and rotary positions, which the library gives to the last tokens,
stay with the patches. Hooks have no branch on data and never wait for the device.

Activations, keys and values are changed where they are, since nothing but the hooked module's
reader sees them and a copy of every MLP's activations would cost more than the treatment. A hook that
records them must therefore copy what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Hook = Callable[..., Any]


def append_register(row: int) -> Hook:
    """Forward hook on the embeddings: a zero token before what was row `row`, [B,N,C] → [B,N+1,C]."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        def with_register(tokens: Tensor) -> Tensor:
            register = torch.zeros_like(tokens[:, :1])
            return torch.cat([tokens[:, :row], register, tokens[:, row:]], dim=1)

        return _with_tokens(output, with_register)

    return hook


def move_to_register(
    units: Tensor, *, row: int, first_patch: int, maximum: Literal["shared", "per_neuron"]
) -> Hook:
    """Pre-hook on an MLP's last linear: the register's units take the extreme, the patches' get zero.

    The extreme of the activations [B,N,hidden] of `units` (int64 [R]) is the value furthest from
    zero over all tokens, signed; over all units as well (`shared`), or of each (`per_neuron`). Rows
    before `row` keep their activation, rows from `first_patch` on lose it.
    """

    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        activations = inputs[0]
        chosen = activations.index_select(-1, units)
        over = (1, 2) if maximum == "shared" else (1,)
        high, low = chosen.amax(over, keepdim=True), chosen.amin(over, keepdim=True)
        extreme = torch.where(high.abs() > low.abs(), high, low)
        activations[:, first_patch:].index_fill_(-1, units, 0)
        register = activations[:, row : row + 1]
        register.index_copy_(-1, units, extreme.expand(-1, -1, len(units)))

    return hook


def zero_units(units: Tensor, *, first_patch: int) -> Hook:
    """Pre-hook on an MLP's last linear: `units` (int64 [R]) of rows from `first_patch` on are zero."""

    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0][:, first_patch:].index_fill_(-1, units, 0)

    return hook


def set_row(row: int, constant: Tensor) -> Hook:
    """Forward hook on a projection: row `row` of its output [B,N,C] is `constant` [C]."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
        output[:, row] = constant

    return hook


def clamp_norms(max_over_median: float, *, first_patch: int) -> Hook:
    """Forward hook on a block: patch norms are at most `max_over_median` times their image's median.

    Of an even number of norms, the median is the lower of the two in the middle.
    """

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        def clamped(tokens: Tensor) -> Tensor:
            patches = tokens[:, first_patch:]
            norms = patches.float().norm(dim=-1, keepdim=True)
            limit = max_over_median * norms.median(dim=1, keepdim=True).values
            scale = torch.where(norms > limit, limit / norms, torch.ones_like(norms))
            scaled = patches * scale.to(patches.dtype)
            return torch.cat([tokens[:, :first_patch], scaled], dim=1)

        return _with_tokens(output, clamped)

    return hook


def sum_row(row: int, sums: Tensor) -> Hook:
    """Forward hook on a projection: adds row `row` of its output [B,N,C], over B, to `sums` [C]."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
        sums.add_(output[:, row].to(sums.dtype).sum(dim=0))

    return hook


def _with_tokens(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its tokens changed; some modules return more beside them."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
