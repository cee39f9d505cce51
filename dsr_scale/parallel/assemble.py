"""From a network's shape to the part of it that this rank trains, in one order.

    whole network on the meta device          names and sizes, no memory
      → pipeline   blocks of other ranks go    so that nothing is made for them
      → tensor     modules of the tensor plan  replaced while they are still empty
      → values     drawn by name, cut, copied  any split starts from the same numbers
      → recompute  block by block
      → compile    block by block, recomputation inside
      → ZeRO       last: it flattens the parameters that are left (`zero.start_zero`)

A rank draws the tensors of its own stage only, each whole and one at a time, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn

from dsr_scale.base.boxes import Split
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.shape_checks import check_shape
from dsr_scale.config.stages import cut_stages
from dsr_scale.config.training import TrainingConfig
from dsr_scale.model.build import build_on_meta, decay_groups
from dsr_scale.model.dit import DiT
from dsr_scale.model.initialisation import initial_values
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.pipeline import ON_EVERY_STAGE, Pipeline, keep_blocks
from dsr_scale.parallel.recompute import recompute_blocks
from dsr_scale.parallel.tensor_plan import TensorPlan

Network = TypeVar("Network", bound=nn.Module)


class LocalModel(NamedTuple, Generic[Network]):
    """What a rank holds of the network."""

    network: Network
    splits: dict[str, Split | None]
    """Parameter name → where this rank's tensor lies in the whole one; None is all of it."""
    owned: frozenset[str]
    """Parameters and buffers that this rank saves: of equal copies, one rank's."""
    on_every_stage: frozenset[str]
    """Parameters whose gradients are summed over the pipeline; empty without one."""
    spans: tuple[range, ...]
    """Blocks of every stage of the replica."""


def assemble(
    shape: ModelShape,
    *,
    seed: int,
    ranks: Ranks,
    parallel: ParallelConfig,
    training: TrainingConfig,
) -> LocalModel[DiT]:
    """Builds this rank's part in float32 on the CPU. Raises InputError for sizes that do not fit."""
    check_shape(shape)
    whole = build_on_meta(shape)
    spans = tuple(cut_stages(shape, ranks.pipeline.size * parallel.virtual_stages))
    network = _empty(shape, ranks, parallel)
    keep_blocks(network, _own_blocks(spans, ranks))
    if ranks.tensor.size > 1:
        _split(network)
    # Modules that the plan replaced already have memory; the rest is still meta.
    network = network.to_empty(device="cpu")
    plan = TensorPlan(shape)
    splits = {
        name: plan.split(name, ranks.tensor.rank, ranks.tensor.size)
        for name, _ in network.named_parameters()
    }
    _fill(network, whole, seed, splits)
    if ranks.tensor.size > 1:
        from dsr_scale.parallel.tensor_model import mark_split_parameters

        mark_split_parameters(network, shape)
    on_every_stage = frozenset(
        name for name in splits if ranks.pipeline.size > 1 and name.startswith(ON_EVERY_STAGE)
    )
    _mark_copies(network, on_every_stage, ranks)
    recompute_blocks(network.blocks, training.recompute)
    if training.compile:
        for block in network.blocks.values():
            # Megatron's collectives are no part of a graph: with them a block is several.
            block.compile(fullgraph=ranks.tensor.size == 1)
    return LocalModel(network, splits, _owned(network, splits, ranks), on_every_stage, spans)


def _empty(shape: ModelShape, ranks: Ranks, parallel: ParallelConfig) -> DiT:
    with torch.device("meta"):
        if ranks.tensor.size == 1:
            return DiT(shape)
        from dsr_scale.parallel.tensor_model import SplitDiT

        return SplitDiT(shape, ranks.tensor, sequence=parallel.sp)


def _split(network: DiT) -> None:
    from dsr_scale.parallel.tensor_model import SplitDiT, split_model

    assert isinstance(network, SplitDiT)
    split_model(network)


def _own_blocks(spans: Sequence[range], ranks: Ranks) -> list[int]:
    mine = spans[ranks.pipeline.rank :: ranks.pipeline.size]
    return [block for span in mine for block in span]


@torch.no_grad()
def _fill(network: DiT, whole: DiT, seed: int, splits: dict[str, Split | None]) -> None:
    """Copies each initial value's own part; `whole` says which values there are."""
    state = {name: t for name, t in network.state_dict().items() if t is not None}
    for name, draw in initial_values(whole, seed):
        if name in state:
            split = splits.get(name)
            value = draw()
            state.pop(name).copy_(value if split is None else split.take(value))
    assert not state, f"no initial value for {sorted(state)}"


def _mark_copies(network: nn.Module, on_every_stage: frozenset[str], ranks: Ranks) -> None:
    """Tells DeepSpeed which parameters another pipeline rank counts in the gradient norm."""
    for name, parameter in network.named_parameters():
        if name in on_every_stage and ranks.pipeline.rank > 0:
            parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def _owned(network: DiT, splits: dict[str, Split | None], ranks: Ranks) -> frozenset[str]:
    owned = set()
    for name, tensor in network.state_dict().items():
        if tensor is None:  # megatron's linears list an extra state that they do not have
            continue
        copied_over_stages = name.startswith(ON_EVERY_STAGE) and ranks.pipeline.rank > 0
        copied_over_tensor = splits.get(name) is None and ranks.tensor.rank > 0
        if not copied_over_stages and not copied_over_tensor:
            owned.add(name)
    return frozenset(owned)


def make_pipeline(
    local: LocalModel[DiT], ranks: Ranks, parallel: ParallelConfig
) -> Pipeline | None:
    """The schedule over this rank's stages; None without pipeline ranks."""
    if ranks.pipeline.size == 1:
        return None
    return Pipeline(
        local.network,
        local.spans,
        ranks.pipeline,
        rows_per_share=ranks.tensor.size if parallel.sp else 1,
        device=ranks.device,
    )


def parameter_groups(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that decay and those that do not."""
    decay, spared = decay_groups(network)
    return [p for _, p in decay], [p for _, p in spared]
