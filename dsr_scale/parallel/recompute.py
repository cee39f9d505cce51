"""What the backward pass computes again instead of keeping, block by block.

`full` keeps a block's input and runs the block again: a third more work, a few per cent of the
memory. `selective` keeps the results of matrix products and attention, which cost the time, and runs
the element-wise work again, which costs the memory. Both change no number: what is run again is the
same arithmetic on the same values.

With tensor parallelism megatron's collectives inside a block run again with it. Where they reduce in
place (no sequence parallelism) the kept product already holds the sum, and the collective's result is
kept with it, so that nothing is summed twice.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.linear.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.c10d.allreduce_.default,
}


def _policy(context: Any, operation: Any, *arguments: Any, **settings: Any) -> CheckpointPolicy:
    keep = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(blocks: nn.ModuleDict, mode: Literal["none", "selective", "full"]) -> None:
    """Wraps each block's forward; names of parameters stay."""
    if mode == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks.values():
        block.forward = functools.partial(_run, block.forward, settings)


def _run(forward: Any, settings: dict[str, Any], *inputs: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, **settings)
