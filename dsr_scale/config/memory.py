"""Bytes on one GPU of a layout: states after ZeRO and the tensor split, activations after recompute.

States are exact counts. Activations are those of the blocks, which dominate: eager ones were measured
on this package's blocks by counting what autograd keeps, whole and with linears that hold half of
the heads; compiled and recomputed ones are derived. The frozen encoders, communication buffers and
the allocator's slack are in none of them; nor is what `model.attention_variant` changes, which was
measured as 7 % less to 4 % more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsr_scale.config.costs import body_rows
from dsr_scale.config.derive import ModelShape, ParallelLayout
from dsr_scale.config.rank_parameters import rank_share
from dsr_scale.config.run import RunConfig
from dsr_scale.config.stages import cut_stages, num_blocks, stages_of_rank


class Memory(NamedTuple):
    """Bytes on one GPU by item."""

    weights: int
    """In the training precision; divided over data-parallel ranks by ZeRO-3."""
    gradients: int
    """Accumulated in fp32; divided by ZeRO-2 and ZeRO-3."""
    optimizer: int
    """fp32 master weights (ZeRO keeps them in fp32 training too) and two moments, divided."""
    ema: int
    """fp32, each average divided like the optimizer."""
    activations: int
    """At the largest number of micro-batches in flight."""

    @property
    def total(self) -> int:
        """Sum of the items."""
        return sum(self)


class RankMemory(NamedTuple):
    """What one rank needs."""

    pipeline_rank: int
    parameters: int
    """Held by this rank, before ZeRO-3 divides them."""
    device: Memory
    host_bytes: int
    """Optimizer and averages, when they are offloaded."""


def memory_per_gpu(
    run: RunConfig, shape: ModelShape, layout: ParallelLayout, *, microbatches: int
) -> RankMemory:
    """The pipeline rank that needs the most; `microbatches` are those of one replica's step."""
    ranks = [
        rank_memory(run, shape, layout, microbatches=microbatches, pipeline_rank=rank)
        for rank in range(layout.pp)
    ]
    return max(ranks, key=lambda rank: (rank.device.total, -rank.pipeline_rank))


def rank_memory(
    run: RunConfig,
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    microbatches: int,
    pipeline_rank: int,
) -> RankMemory:
    """States and activations of one pipeline rank."""
    parallel = run.parallel
    spans = cut_stages(shape, layout.pp * parallel.virtual_stages)
    held = [spans[s] for s in stages_of_rank(pipeline_rank, layout.pp, parallel.virtual_stages)]
    count = rank_share(shape, held).on_rank(layout.tp)
    weight_bytes = 2 if run.training.precision == "bf16" else 4
    optimizer = math.ceil(count * 12 / layout.dp)
    ema = math.ceil(count * 4 / layout.dp) * len(run.training.ema_decays)
    kept = [stage_activation_bytes(run, shape, span) for span in held]
    peak = peak_in_flight(kept, layout.pp, pipeline_rank, microbatches)
    peak += max(recompute_bytes(run, shape, span) for span in held)
    device = Memory(
        weights=math.ceil(count * weight_bytes / (layout.dp if parallel.zero == 3 else 1)),
        gradients=math.ceil(count * 4 / (layout.dp if parallel.zero > 1 else 1)),
        optimizer=0 if parallel.offload else optimizer,
        ema=0 if parallel.offload else ema,
        activations=round(run.training.microbatch_images * peak),
    )
    host = optimizer + ema if parallel.offload else 0
    return RankMemory(pipeline_rank, count, device, host)


class _Kept(NamedTuple):
    """Bytes kept for the backward pass, in units of the width, per row and block."""

    whole: float
    split: float = 0.0
    """The part of it that tensor ranks divide: heads and hidden units."""
    repeated: float = 0.0
    """The part that every rank keeps for all tokens even when these are divided."""

    def on_rank(self, tp: int, sp: bool) -> float:
        """On one tensor rank; what is left of the whole is divided with the tokens."""
        tokens = self.whole - self.split - self.repeated
        return self.split / tp + tokens / (tp if sp else 1) + self.repeated

    def times(self, number: int) -> _Kept:
        """`number` times as much."""
        return _Kept(*(number * size for size in self))


class _ActivationCost(NamedTuple):
    block: _Kept
    per_token_adaln: _Kept
    cross: _Kept
    """Per row of the body."""
    cross_text: _Kept
    """Per text row."""
    qk_norm: _Kept


_ACTIVATIONS: dict[tuple[str, bool], _ActivationCost] = {
    ("bf16", False): _ActivationCost(
        _Kept(59.5, 35.4), _Kept(18.0), _Kept(12.0, 4.0), _Kept(4.0, 4.0), _Kept(12.0, 12.0)
    ),
    ("fp32", False): _ActivationCost(
        _Kept(110.9, 70.7), _Kept(35.9), _Kept(20.0, 8.0), _Kept(8.0, 8.0), _Kept(8.0, 8.0)
    ),
    ("bf16", True): _ActivationCost(
        _Kept(36.1, 24.0), _Kept(12.0), _Kept(8.0, 4.0), _Kept(4.0, 4.0), _Kept(4.0, 4.0)
    ),
    ("fp32", True): _ActivationCost(
        _Kept(72.2, 48.0), _Kept(24.0), _Kept(16.0, 8.0), _Kept(8.0, 8.0), _Kept(8.0, 8.0)
    ),
}
"""(type of activations, compiled) → cost without recompute. Compiled: derived for perfectly fused
element-wise work (docs/method.md §7)."""

_SELECTIVE = _ActivationCost(
    _Kept(24.7, 18.7, 4.0), _Kept(12.0), _Kept(6.0, 4.0, 2.0), _Kept(4.0, 4.0), _Kept(0.0)
)
"""bf16, derived: the input and the outputs of qkv, attention, proj, w12 and w3 are 2 + 6 + 2 + 2 +
32/3 + 2 widths, those of AdaLN 12, of the cross-attention's q, attention and proj 6; fp32 is twice
that. Products of proj and w3 are kept before they are reduced and scattered, so for all tokens."""

_FULL = _ActivationCost(_Kept(2.0), _Kept(0.0), _Kept(0.0), _Kept(0.0), _Kept(0.0))
"""bf16: the block's input alone; fp32 is twice that."""


def _kept_cost(run: RunConfig) -> _ActivationCost:
    """What blocks keep under the run's recompute."""
    if run.training.recompute == "none":
        return _whole_cost(run)
    cost = _SELECTIVE if run.training.recompute == "selective" else _FULL
    if run.training.precision == "bf16":
        return cost
    return _ActivationCost(*(kept.times(2) for kept in cost))


def _whole_cost(run: RunConfig) -> _ActivationCost:
    """What a block keeps while its backward runs."""
    dtype = "bf16" if run.training.precision == "bf16" else "fp32"
    return _ACTIVATIONS[dtype, run.training.compile]


def activation_bytes(run: RunConfig, shape: ModelShape) -> float:
    """Bytes per image that all blocks keep for the backward pass, on one tensor rank."""
    return stage_activation_bytes(run, shape, range(num_blocks(shape)))


def stage_activation_bytes(run: RunConfig, shape: ModelShape, span: range) -> float:
    """Bytes per image that the blocks in `span` keep for the backward pass."""
    return sum(_block_bytes(run, shape, span, _kept_cost(run)))


def recompute_bytes(run: RunConfig, shape: ModelShape, span: range) -> float:
    """Bytes per image that come on top while one block is computed again; 0 without recompute."""
    whole = _block_bytes(run, shape, span, _whole_cost(run))
    kept = _block_bytes(run, shape, span, _kept_cost(run))
    return max(w - k for w, k in zip(whole, kept, strict=True))


def _block_bytes(
    run: RunConfig, shape: ModelShape, span: range, cost: _ActivationCost
) -> Iterator[float]:
    """Bytes per image of each block in `span`, on one tensor rank."""
    tp, sp = run.parallel.tp, run.parallel.sp
    kind = shape.conditioning.kind
    rows = body_rows(shape)
    base = cost.block.on_rank(tp, sp) + (cost.qk_norm.on_rank(tp, sp) if shape.qk_norm else 0)
    per_token = cost.per_token_adaln.on_rank(tp, sp)
    for block in span:
        if block >= shape.depth:
            assert shape.head is not None
            yield (shape.image_tokens + shape.registers) * shape.head.width * (base + per_token)
            continue
        per_row = base + (per_token if kind == "query_adaln" else 0)
        text = 0.0
        if kind == "cross_attention":
            per_row += cost.cross.on_rank(tp, sp)
            text = shape.text_length * cost.cross_text.on_rank(tp, sp)
        yield shape.width * (rows[block] * per_row + text)


def peak_in_flight(kept: Sequence[float], pp: int, pipeline_rank: int, microbatches: int) -> float:
    """Most bytes per image of micro-batch that a rank's stages, which keep `kept`, hold at once.

    1F1B holds one micro-batch for each rank from this one to the last. The interleaved schedule
    starts deeper; its order of forwards and backwards is walked through.
    """
    if len(kept) == 1:
        return min(pp - pipeline_rank, microbatches) * kept[0]
    stages, rounds = len(kept), max(1, microbatches // pp)
    in_round = microbatches // rounds
    units = stages * microbatches
    ahead = min((stages - 1) * in_round + 2 * (pp - 1 - pipeline_rank), units)
    now = peak = 0.0
    for step in range(units + ahead):
        if step < units:
            now += kept[step // in_round % stages]
            peak = max(peak, now)
        if step >= ahead:
            now -= kept[stages - 1 - (step - ahead) // in_round % stages]
    return peak
