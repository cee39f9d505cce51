"""The diffusion transformer split over tensor ranks: the same forward, its tokens divided or not.

`split_model` replaces the modules that `tensor_plan` names. `SplitDiT` adds what a table cannot say:
where the tokens are divided (sequence parallel) and made whole, and that AdaLN of all blocks is
gathered once per forward. Each block keeps its own product, since stacking the weights of all
blocks into one would copy a third of the parameters for every micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsr_scale.config.derive import ModelShape
from dsr_scale.model.dit import Carried, DiT, Probe, Signal
from dsr_scale.model.layers import AttentionBias, RMSNorm
from dsr_scale.model.layout import TokenLayout
from dsr_scale.parallel.groups import Axis
from dsr_scale.parallel.tensor_layers import (
    ColumnLinear,
    RowLinear,
    SplitModulation,
    SummedLinear,
    SummedNorm,
    gather_features,
    gather_rows,
    sum_gradient,
    take_rows,
)
from dsr_scale.parallel.tensor_plan import Part, Rule, TensorPlan


@dataclass(frozen=True)
class SplitSignal(Signal):
    """`Signal`, and what modulates each body block of a stretch."""

    block_conditions: dict[int, Tensor]
    """Shift, scale and gate [B,1,6D], or with one condition per token this rank's rows of it."""


class SplitDiT(DiT):
    """One tensor rank's part of a DiT; every rank of the group calls it together."""

    def __init__(self, shape: ModelShape, tensor: Axis, *, sequence: bool) -> None:
        super().__init__(shape)
        self.tensor = tensor
        self.sequence = sequence

    def span(
        self,
        blocks: range,
        carried: Carried | None,
        latents: Tensor,
        signal: Signal,
        layout: TokenLayout,
        *,
        probe: Probe | None = None,
    ) -> Carried:
        body = [index for index in blocks if index < self.depth]
        conditions = (
            self._modulations(body, signal.c)
            if signal.c.shape[1] == 1
            else self._row_shares(body, signal, layout)
        )
        split = SplitSignal(signal.t_emb, signal.c, signal.text, signal.mask, conditions)
        return super().span(blocks, carried, latents, split, layout, probe=probe)

    def _modulations(self, body: Sequence[int], c: Tensor) -> dict[int, Tensor]:
        """Shift, scale and gate of these blocks, gathered at once: [B,1,D] → [B,1,6D] each."""
        if not body:
            return {}
        c = sum_gradient(c, self.tensor)
        parts = []
        for index in body:
            modulation = self.blocks[str(index)].adaLN_modulation
            assert isinstance(modulation, SplitModulation)
            parts.append(modulation.part(c))
        gathered = gather_features(torch.stack(parts), self.tensor, on_row_shares=self.sequence)
        return dict(zip(body, gathered.unbind(0), strict=True))

    def _row_shares(
        self, body: Sequence[int], signal: Signal, layout: TokenLayout
    ) -> dict[int, Tensor]:
        """Each block's own rows of the condition; divided once before and once after registers."""
        shares: dict[int, Tensor] = {}
        conditions: dict[int, Tensor] = {}
        for index in body:
            absent = layout.registers - layout.inside(index).registers
            if absent not in shares:
                rows = super().block_condition(index, signal, layout)
                shares[absent] = take_rows(rows, self.tensor) if self.sequence else rows
            conditions[index] = shares[absent]
        return conditions

    def block_condition(self, index: int, signal: Signal, layout: TokenLayout) -> Tensor:
        assert isinstance(signal, SplitSignal)
        return signal.block_conditions[index]

    def enter_body(self, latents: Tensor, signal: Signal, layout: TokenLayout) -> Tensor:
        return self._divide(super().enter_body(latents, signal, layout))

    def enter_registers(self, tokens: Tensor) -> Tensor:
        return self._divide(super().enter_registers(self._whole(tokens)))

    def leave_body(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        if not layout.text:
            return tokens
        return self._divide(super().leave_body(self._whole(tokens), layout))

    def head_modulation(self, tokens: Tensor, signal: Signal) -> Tensor:
        if self.sequence:
            signal = replace(signal, t_emb=sum_gradient(signal.t_emb, self.tensor))
        return super().head_modulation(tokens, signal)

    def enter_head(self, latents: Tensor, layout: TokenLayout) -> Tensor:
        return self._divide(super().enter_head(latents, layout))

    def leave(self, carried: Carried, signal: Signal, layout: TokenLayout) -> Tensor:
        tokens, modulation = carried
        if modulation is not None:
            modulation = self._whole(modulation)
        return super().leave(Carried(self._whole(tokens), modulation), signal, layout)

    def _divide(self, tokens: Tensor) -> Tensor:
        return take_rows(tokens, self.tensor) if self.sequence else tokens

    def _whole(self, tokens: Tensor) -> Tensor:
        return gather_rows(tokens, self.tensor) if self.sequence else tokens


def split_model(model: SplitDiT) -> None:
    """Replaces every module that the plan does not leave whole; weights are empty afterwards."""
    plan = TensorPlan(model.shape)
    for path, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, RMSNorm, AttentionBias)):
            continue
        rule = plan.rule(path)
        replacement = _replacement(rule, module, model.tensor, sequence=model.sequence)
        if replacement is None:
            continue
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, name, replacement)
        if rule.part is Part.MODULATION:
            block = model.get_submodule(parent_path.rpartition(".")[0])
            block.adaLN_modulation = SplitModulation(nn.SiLU(), replacement)


def _replacement(
    rule: Rule, module: nn.Linear | RMSNorm | AttentionBias, tensor: Axis, *, sequence: bool
) -> nn.Module | None:
    if isinstance(module, AttentionBias):
        heads, head_dim = module.key.shape
        return AttentionBias(heads // tensor.size, head_dim)
    sums = rule.part is Part.HEADS or (rule.part is Part.TOKENS and sequence)
    if isinstance(module, RMSNorm):
        return SummedNorm(len(module.weight), tensor) if sums else None
    sizes = module.in_features, module.out_features
    on_shares = rule.on_tokens and sequence
    match rule.part:
        case Part.COLUMN:
            return ColumnLinear(*sizes, tensor, sequence=on_shares)
        case Part.ROW:
            return RowLinear(*sizes, tensor, sequence=on_shares)
        case Part.MODULATION:
            return ColumnLinear(*sizes, tensor, sequence=False, sum_input=False)
        case _:
            return SummedLinear(*sizes, tensor) if sums else None


def mark_split_parameters(model: nn.Module, shape: ModelShape) -> None:
    """Tells DeepSpeed which weights tensor ranks do not share, so that a norm counts the others once."""
    plan = TensorPlan(shape)
    for name, parameter in model.named_parameters():
        if plan.split(name, 0, 2) is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
