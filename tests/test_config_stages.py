"""The stage cut against brute force and published figures; what one rank holds against the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_config_costs import BYTES, HEAD, NONE, SHAPES, TEXT, run_of

from dsr_scale.base.errors import InputError
from dsr_scale.config.costs import forward_flops, parameters, text_flops, timestep_flops, total
from dsr_scale.config.derive import ModelShape, model_shape
from dsr_scale.config.load import load_run
from dsr_scale.config.rank_parameters import rank_share
from dsr_scale.config.stages import (
    block_costs,
    cut_stages,
    num_blocks,
    pipeline_report,
    stage_flops,
    stages_of_rank,
)
from dsr_scale.model.build import build_model

CONFIGS = Path(__file__).parents[1] / "configs"

CUT_SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **SHAPES,
    "deep, late registers": ({"width": 64, "depth": 9, "registers": {"start": 6}}, TEXT),
    "deep head": (
        {"width": 48, "depth": 6, "head": {**HEAD, "depth": 4},
         "conditioning": {"kind": "class"}},
        NONE,
    ),
    "in context, shallow head": (
        {"width": 160, "depth": 7, "head": {**HEAD, "depth": 1},
         "conditioning": {"kind": "in_context"}},
        BYTES,
    ),
}  # fmt: skip


def all_cuts(blocks: int, stages: int) -> list[tuple[range, ...]]:
    cuts: list[tuple[range, ...]] = []
    for inner in itertools.combinations(range(1, blocks), stages - 1):
        edges = (0, *inner, blocks)
        cuts.append(tuple(range(a, b) for a, b in itertools.pairwise(edges)))
    return cuts


@pytest.mark.parametrize("name", CUT_SHAPES)
def test_the_cut_is_the_best_of_all_cuts(name: str) -> None:
    shape = model_shape(run_of(*CUT_SHAPES[name]))
    for stages in range(1, num_blocks(shape) + 1):
        spans = cut_stages(shape, stages)
        assert [block for span in spans for block in span] == list(range(num_blocks(shape)))

        def badness(cut: tuple[range, ...]) -> tuple[int, int]:
            costs = [stage_flops(shape, span) for span in cut]
            return max(costs), sum(cost**2 for cost in costs)

        assert badness(spans) == min(map(badness, all_cuts(num_blocks(shape), stages)))


@pytest.mark.parametrize("name", CUT_SHAPES)
def test_stage_costs_add_up_to_the_forward(name: str) -> None:
    """Each further stage embeds the timestep again, and with body blocks the condition."""
    shape = model_shape(run_of(*CUT_SHAPES[name]))
    whole = sum(forward_flops(shape).values())
    assert stage_flops(shape, range(num_blocks(shape))) == whole
    for stages in (2, 3):
        for cut in all_cuts(num_blocks(shape), stages):
            extra = 0
            for span in cut[1:]:
                extra += timestep_flops(shape.width)
                if span.start < shape.depth:
                    extra += text_flops(shape)
            assert sum(stage_flops(shape, span) for span in cut) == whole + extra


def test_dh_xl_over_four_ranks_is_ten_nine_nine_and_the_head() -> None:
    shape = model_shape(load_run(CONFIGS / "published" / "dit_dh_xl.yaml"))
    spans = cut_stages(shape, 4)
    assert [len(span) for span in spans] == [10, 9, 9, 2]
    assert spans[-1] == range(28, 30)
    costs = block_costs(shape)
    assert 4.4 < costs[29] / costs[20] < 5.5, "a head block is worth several of the body"
    assert costs[3] < costs[20], "before the registers a block is cheaper"


def test_report_of_a_pipeline() -> None:
    shape = model_shape(load_run(CONFIGS / "t2i" / "query_adaln_2_4b.yaml"))
    plain = pipeline_report(shape, pp=4, virtual_stages=1, microbatches=8)
    assert plain.bubble == 3 / 11
    assert plain.rank_flops == plain.stage_flops
    assert plain.balance == sum(plain.rank_flops) / 4 / max(plain.rank_flops)
    interleaved = pipeline_report(shape, pp=4, virtual_stages=2, microbatches=8)
    assert interleaved.bubble == 3 / 19
    assert interleaved.rank_flops == tuple(
        interleaved.stage_flops[r] + interleaved.stage_flops[r + 4] for r in range(4)
    )
    assert [list(stages_of_rank(r, 2, 3)) for r in (0, 1)] == [[0, 2, 4], [1, 3, 5]]


def test_more_stages_than_blocks_are_refused() -> None:
    shape = model_shape(run_of(*SHAPES["class, head"]))
    with pytest.raises(InputError, match=r"7 pipeline stages.*6 blocks") as caught:
        cut_stages(shape, 7)
    assert "at most 6" in caught.value.remedy


COLUMN = r"(blocks\.\d+|y_embedder\..*)\.(attn\.qkv|cross\.q|cross\.kv|mlp\.w12)\.(weight|bias)"
ROW = r"(blocks\.\d+|y_embedder\..*)\.(attn\.proj|cross\.proj|mlp\.w3)\.weight"


def held(shape: ModelShape, name: str, numel: int, span: Sequence[int], tp: int) -> int:
    """Elements of one parameter on one tensor rank of the rank with the blocks in `span`, by name."""
    parts = name.split(".")
    last = num_blocks(shape) - 1
    per_token = shape.conditioning.kind == "query_adaln"
    if parts[0] == "blocks":
        block = int(parts[1])
        here = block in span
        split = re.fullmatch(COLUMN, name) or re.fullmatch(ROW, name)
        split = split or ("adaLN" in name and block < shape.depth and not per_token)
        return numel // (tp if split else 1) if here else 0
    split = bool(re.fullmatch(COLUMN, name) or re.fullmatch(ROW, name))
    has_head = shape.head is not None
    where = {
        "t_embedder": True,
        "y_embedder": True,
        "s_embedder": 0 in span,
        "x_embedder": shape.depth in span if has_head else 0 in span,
        "register_tokens": shape.register_start in span,
        "enc_register_tokens": shape.register_start in span,
        "dec_register_tokens": shape.depth in span,
        "s_projector": shape.depth in span,
        "final_layer": last in span,
    }
    return numel // (tp if split else 1) if where[parts[0]] else 0


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_a_rank_are_those_of_the_model_s_parts(name: str) -> None:
    shape = model_shape(run_of(*SHAPES[name]))
    named = [(n, p.numel()) for n, p in build_model(shape, seed=0).named_parameters()]
    everything = range(num_blocks(shape))
    assert rank_share(shape, [everything]).on_rank(1) == total(parameters(shape)).stored
    for pp, virtual in ((1, 1), (2, 1), (3, 1), (num_blocks(shape), 1), (2, 2)):
        spans = cut_stages(shape, pp * virtual)
        for rank, tp in itertools.product(range(pp), (1, 2)):
            mine = [spans[stage] for stage in stages_of_rank(rank, pp, virtual)]
            blocks = [block for span in mine for block in span]
            expected = sum(held(shape, n, numel, blocks, tp) for n, numel in named)
            assert rank_share(shape, mine).on_rank(tp) == expected, (mine, tp)
