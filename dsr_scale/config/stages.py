"""Which blocks each pipeline stage holds: cut by cost, not by count.

Blocks are numbered over body and head: 0 … depth − 1 are the body's, the head's follow. A block of
the DDT head costs several of the body, the registers make later blocks dearer, and embedders and
final layer sit at the ends, so equal counts would leave ranks waiting. The cut minimises the dearest
stage exactly, by dynamic programming over at most some dozens of blocks. Cost is FLOPs of matrix
products: element-wise work is roughly proportional to it and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dsr_scale.base.errors import InputError
from dsr_scale.config.costs import (
    adaln_flops,
    block_flops,
    body_rows,
    cross_flops,
    final_flops,
    head_entry_flops,
    patch_flops,
    text_flops,
    timestep_flops,
    variant_flops,
)
from dsr_scale.config.derive import ModelShape


def num_blocks(shape: ModelShape) -> int:
    """Blocks of body and head together."""
    return shape.depth + (shape.head.depth if shape.head else 0)


def block_costs(shape: ModelShape) -> list[int]:
    """Forward FLOPs of one image for each block, what sits at the ends included.

    The patch embedding counts with the first block, the final layer with the last, and what enters
    the head with the head's first. What every stage repeats is `replicated_flops`.
    """
    per_token = shape.conditioning.kind == "query_adaln"
    costs: list[int] = []
    for block, rows in enumerate(body_rows(shape)):
        cost = block_flops(shape.width, rows) + variant_flops(shape, block)
        cost += adaln_flops(shape.width, rows if per_token else 1)
        if shape.conditioning.kind == "cross_attention":
            cost += cross_flops(shape.width, rows, shape.text_length)
        costs.append(cost)
    if shape.head is not None:
        rows, width = shape.image_tokens + shape.registers, shape.head.width
        cost = block_flops(width, rows) + variant_flops(shape, shape.depth)
        costs += [cost + adaln_flops(width, rows)] * shape.head.depth
        costs[shape.depth] += head_entry_flops(shape)
    costs[0] += patch_flops(shape, shape.width)
    costs[-1] += final_flops(shape)
    return costs


def replicated_flops(shape: ModelShape, first_block: int) -> int:
    """Forward FLOPs that a stage starting at `first_block` repeats: the embedders of its condition.

    Every stage embeds the timestep, and one with body blocks the condition too, so that no
    modulation travels.
    """
    return timestep_flops(shape.width) + (text_flops(shape) if first_block < shape.depth else 0)


def stage_flops(shape: ModelShape, span: range) -> int:
    """Forward FLOPs of one image on the stage that holds the blocks in `span`."""
    return sum(block_costs(shape)[span.start : span.stop]) + replicated_flops(shape, span.start)


def cut_stages(shape: ModelShape, stages: int) -> tuple[range, ...]:
    """`stages` contiguous spans of blocks whose dearest is as cheap as can be.

    Among equals the most even by the sum of squares, then the one whose first stages are shorter.
    Raises InputError when there are more stages than blocks.
    """
    blocks = num_blocks(shape)
    require_blocks(blocks, stages)
    costs = block_costs(shape)
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)

    def cost_of(start: int, stop: int) -> int:
        return before[stop] - before[start] + replicated_flops(shape, start)

    dearest = _best_cut(blocks, stages, cost_of, max)
    bound = max(cost_of(span.start, span.stop) for span in dearest)

    def squared(start: int, stop: int) -> float:
        cost = cost_of(start, stop)
        return cost**2 if cost <= bound else float("inf")

    return _best_cut(blocks, stages, squared, lambda left, right: left + right)


def require_blocks(blocks: int, stages: int) -> None:
    """Raises InputError when there are more stages than blocks."""
    if stages > blocks:
        raise InputError(
            found=f"{stages} pipeline stages (parallel.pp · parallel.virtual_stages), "
            f"{blocks} blocks of body and head",
            required="at least one block on every stage",
            remedy=f"lower parallel.pp or parallel.virtual_stages to a product of at most {blocks}",
        )


def _best_cut(
    blocks: int,
    stages: int,
    cost_of: Callable[[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[range, ...]:
    """The cut of `blocks` into `stages` whose costs, put together by `join`, are least."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0, 0)}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, int]] = {}
        for stop in range(stage, blocks - (stages - stage) + 1):
            row[stop] = min(
                (join(cost, cost_of(start, stop)), start)
                for start, (cost, _) in best[-1].items()
                if start < stop
            )
        best.append(row)
    spans: list[range] = []
    stop = blocks
    for row in reversed(best[1:]):
        start = row[stop][1]
        spans.append(range(start, stop))
        stop = start
    return tuple(reversed(spans))


def stages_of_rank(pipeline_rank: int, pp: int, virtual_stages: int) -> range:
    """The stages that a pipeline rank holds: r, r + pp, …"""
    return range(pipeline_rank, pp * virtual_stages, pp)


class PipelineReport(NamedTuple):
    """A cut and what it costs."""

    spans: tuple[range, ...]
    """Blocks of each stage."""
    stage_flops: tuple[int, ...]
    """Forward FLOPs per image of each stage."""
    rank_flops: tuple[int, ...]
    """The same for each pipeline rank, over its stages."""
    balance: float
    """Mean over the largest of `rank_flops`: 1 when no rank waits for a dearer one."""
    bubble: float
    """Share of a step in which a rank waits for the pipeline to fill and to drain."""


def pipeline_report(
    shape: ModelShape, *, pp: int, virtual_stages: int, microbatches: int
) -> PipelineReport:
    """The cut for `pp` ranks; `microbatches` are those of one replica's step."""
    spans = cut_stages(shape, pp * virtual_stages)
    stage = tuple(stage_flops(shape, span) for span in spans)
    rank = tuple(sum(stage[s] for s in stages_of_rank(r, pp, virtual_stages)) for r in range(pp))
    return PipelineReport(
        spans=spans,
        stage_flops=stage,
        rank_flops=rank,
        balance=sum(rank) / (pp * max(rank)),
        bubble=(pp - 1) / (virtual_stages * microbatches + pp - 1),
    )
