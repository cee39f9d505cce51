"""The modules that put the tensor plan to work, around megatron-core's parallel linears.

Megatron's layers work on [sequence, batch, width] and return a pair; the model works on
[batch, sequence, width]. The transpose moves no data without sequence parallelism (it is not done)
and only this rank's share of the tokens with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.model.layers import RMSNorm
from dsr_scale.parallel.groups import Axis


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group.

    Megatron's mapping of this kind reduces a contiguous copy and returns the original when a
    gradient is not contiguous, and works in place on a tensor that autograd may share; both would be
    silent, and weights are where gradients of any layout arrive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradient(x: Tensor, tensor: Axis) -> Tensor:
    """`x`, whose gradient, of which each tensor rank computes a part, is summed over them."""
    assert tensor.group is not None
    summed = _SumGradient.apply(x, tensor.group)
    assert isinstance(summed, Tensor)
    return summed


def take_rows(x: Tensor, tensor: Axis) -> Tensor:
    """This rank's share of the rows: [B,N,D] → [B,N/tp,D]; the gradient is gathered whole."""
    return scatter_to_sequence_parallel_region(x.transpose(0, 1), group=tensor.group).transpose(
        0, 1
    )


def gather_rows(x: Tensor, tensor: Axis) -> Tensor:
    """All rows on every rank: [B,N/tp,D] → [B,N,D], for work that every rank repeats."""
    whole = gather_from_sequence_parallel_region(
        x.transpose(0, 1), tensor_parallel_output_grad=False, group=tensor.group
    )
    return whole.transpose(0, 1)


def gather_features(x: Tensor, tensor: Axis, *, on_row_shares: bool) -> Tensor:
    """All features on every rank: [...,F/tp] → [...,F].

    `on_row_shares`: each rank applies them to its own rows, so gradients differ and are summed.
    """
    if on_row_shares:
        return all_gather_last_dim_from_tensor_parallel_region(x, group=tensor.group)
    return gather_from_tensor_model_parallel_region(x, group=tensor.group)


def _settings(tensor: Axis, *, sequence: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor.size,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _no_initial_value(weight: Tensor) -> None:
    raise AssertionError("weights are filled by name after the model is split")


class ColumnLinear(ColumnParallelLinear):
    """A linear that holds some output features: [B,N,I] → [B,N,O/tp].

    With `sequence`, the input is [B,N/tp,I] and is gathered, its gradient scattered.
    """

    def __init__(
        self, inputs: int, outputs: int, tensor: Axis, *, sequence: bool, sum_input: bool = True
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_settings(tensor, sequence=sequence),
            init_method=_no_initial_value,
            disable_grad_reduce=not sum_input,
            tp_group=tensor.group,
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`sum_input` false leaves the input's gradient to a sum that the caller does for many."""
        if not self.sequence_parallel:
            return super().forward(x.contiguous())[0]
        return super().forward(x.transpose(0, 1).contiguous())[0].transpose(0, 1)


class RowLinear(RowParallelLinear):
    """A linear that holds some input features: [B,N,I/tp] → [B,N,O], or [B,N/tp,O] with `sequence`."""

    def __init__(self, inputs: int, outputs: int, tensor: Axis, *, sequence: bool) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_settings(tensor, sequence=sequence),
            init_method=_no_initial_value,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tensor.group,
        )
        self._tensor = tensor

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        if not self.sequence_parallel:
            return super().forward(x.contiguous())[0] + self.bias
        out = super().forward(x.transpose(0, 1).contiguous())[0]
        return out.transpose(0, 1) + sum_gradient(self.bias, self._tensor)


class SummedNorm(RMSNorm):
    """RMSNorm whose weight every tensor rank applies to a part of the work only."""

    def __init__(self, width: int, tensor: Axis) -> None:
        super().__init__(width)
        self._tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
        return normed.to(x.dtype) * sum_gradient(self.weight, self._tensor)


class SummedLinear(nn.Linear):
    """A whole linear that every tensor rank applies to its own tokens only."""

    def __init__(self, inputs: int, outputs: int, tensor: Axis) -> None:
        super().__init__(inputs, outputs)
        self._tensor = tensor

    def forward(self, input: Tensor) -> Tensor:
        weight = sum_gradient(self.weight, self._tensor)
        return functional.linear(input, weight, sum_gradient(self.bias, self._tensor))


class SplitModulation(nn.Sequential):
    """AdaLN of a body block whose products for all blocks are taken before the blocks run.

    `part` gives this rank's features of shift, scale and gate; gathered by the caller for all blocks
    at once, they come back as the block's condition, which `forward` hands on as it is.
    """

    def part(self, c: Tensor) -> Tensor:
        """[B,1,D] → [B,1,6D/tp]."""
        return super().forward(c)

    def forward(self, input: Tensor) -> Tensor:
        return input
