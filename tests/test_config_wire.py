"""Payloads of collectives against counts written here for one known model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_config_costs import BYTES, HEAD, NONE, TEXT, run_of
from test_config_memory import with_parallel

from dsr_scale.config.derive import ParallelLayout, model_shape
from dsr_scale.config.rank_parameters import embedder_share, rank_share
from dsr_scale.config.run import RunConfig
from dsr_scale.config.stages import cut_stages
from dsr_scale.config.wire import (
    TensorPayload,
    Wire,
    carried_elements,
    division_payload,
    wire_bytes,
)

CLASS = {"width": 64, "registers": {"count": 8, "start": 1}, "conditioning": {"kind": "class"}}
CROSS = {"width": 64, "registers": {"count": 8, "start": 1}}
ROWS = 64 + 3 * 72
"""Over the four blocks: 64 image tokens, and 8 registers from the second on."""


def wire_of(run: RunConfig, layout: ParallelLayout, microbatches: int, rank: int = 0) -> Wire:
    return wire_bytes(run, model_shape(run), layout, microbatches=microbatches, pipeline_rank=rank)


def test_one_process_sends_nothing() -> None:
    assert wire_of(run_of(CROSS, TEXT), ParallelLayout(1, 1, 1), 4).total == 0


def test_tensor_ranks_all_reduce_four_times_a_block() -> None:
    run = with_parallel(run_of(CLASS, NONE, precision="fp32", microbatch_images=3), tp=2)
    wire = wire_of(run, ParallelLayout(2, 1, 1), 5)
    images = 5 * 3
    assert wire.tensor_all_reduce == images * 4 * (4 * ROWS * 64 + 64)
    assert wire.tensor_all_gather == images * 4 * (4 * 6 * 64 // 2), "the modulations"
    assert wire.tensor_reduce_scatter == wire.tensor_gradients == wire.data_gradients == 0
    again = run.model_copy(
        update={"training": run.training.model_copy(update={"recompute": "full"})}
    )
    assert wire_of(again, ParallelLayout(2, 1, 1), 5).tensor_all_reduce == images * 4 * (
        6 * ROWS * 64 + 64
    )


def test_cross_attention_is_a_third_pair_and_its_text_has_a_gradient() -> None:
    run = with_parallel(run_of(CROSS, TEXT, precision="bf16", microbatch_images=1), tp=2)
    wire = wire_of(run, ParallelLayout(2, 1, 1), 1)
    assert wire.tensor_all_reduce == 2 * (6 * ROWS * 64 + 4 * 12 * 64 + 64)


def test_the_caption_s_own_blocks_are_counted() -> None:
    """Two blocks over 9 bytes, two connector layers of 64 queries that read 9 rows."""
    model = {"width": 64, "registers": {"count": 8, "start": 0},
             "conditioning": {"kind": "query_adaln"}}  # fmt: skip
    run = with_parallel(run_of(model, BYTES, precision="bf16", microbatch_images=1), tp=2)
    wire = wire_of(run, ParallelLayout(2, 1, 1), 1)
    embedder = 2 * 4 * 9 * 64 + 2 * (4 * 64 + 9) * 64
    assert wire.tensor_all_reduce == 2 * (4 * 4 * 72 * 64 + embedder)
    assert wire.tensor_all_gather == 0, "per-token AdaLN is on every rank"


def test_sequence_parallel_gathers_and_scatters() -> None:
    """A pair gathers shards three times (input, its copy for the weights, output's gradient) and
    scatters twice; whole weights that see part of the tokens sum their gradients."""
    run = with_parallel(
        run_of({**CLASS, "head": HEAD}, NONE, precision="bf16", microbatch_images=2),
        tp=2, sp=True,
    )  # fmt: skip
    wire = wire_of(run, ParallelLayout(2, 1, 1), 3)
    images, pairs = 6, 2 * (ROWS * 64 + 2 * 72 * 80)
    modulations = 4 * 6 * 64
    # Made whole or gathered back: the entrances of body (64), registers (64, 72) and head (72),
    # and before the final layer tokens and modulation of the head.
    divided = (64 + 64 + 72) * 64 + 3 * 72 * 80
    assert wire.tensor_all_gather == images * 2 * (3 * pairs + modulations + divided) // 2
    # The caption's vector, and the timestep that every rank adds to its own tokens.
    assert wire.tensor_all_reduce == images * 2 * 2 * 64
    assert wire.tensor_reduce_scatter == images * 2 * (2 * pairs + modulations)
    body = 4 * (2 * 64 + 64 + 64)
    head = 2 * (2 * 80 + 80 + 80 + 80 * 480 + 480)
    assert wire.tensor_gradients == 3 * 2 * (body + head + 64 * 80 + 80)


@pytest.mark.parametrize(("zero", "times", "gathers"), [(1, 1, 1), (2, 4, 1), (3, 4, 8)])
def test_data_ranks_by_zero_stage(zero: int, times: int, gathers: int) -> None:
    run = with_parallel(run_of(CROSS, TEXT, precision="bf16"), zero=zero)
    count = rank_share(model_shape(run), [range(4)]).on_rank(1)
    wire = wire_of(run, ParallelLayout(1, 1, 4), 4)
    assert wire.data_gradients == times * 4 * count, "in fp32"
    assert wire.data_parameters == gathers * 2 * math.ceil(count / 4)
    assert wire.total == wire.data_gradients + wire.data_parameters


def test_what_crosses_the_stage_boundaries() -> None:
    """Before the registers, with them, with text in context, into the head, inside the head."""
    cross = model_shape(run_of({**CROSS, "registers": {"count": 8, "start": 2}}, TEXT))
    assert [carried_elements(cross, block) // 64 for block in (1, 2, 3)] == [64, 64, 72]
    context: dict[str, Any] = {**CROSS, "head": HEAD, "conditioning": {"kind": "in_context"}}
    shape = model_shape(run_of(context, TEXT))
    assert carried_elements(shape, 1) == (64 + 12) * 64
    assert carried_elements(shape, 3) == (64 + 12 + 8) * 64
    assert carried_elements(shape, 4) == 72 * 64, "the text has left"
    assert carried_elements(shape, 5) == 2 * 72 * 80, "tokens and what modulates them"


def test_a_pipeline_sends_forward_and_back_and_sums_its_embedders() -> None:
    run = with_parallel(run_of(CROSS, TEXT, precision="bf16", microbatch_images=2), pp=3)
    shape, layout = model_shape(run), ParallelLayout(1, 3, 1)
    spans = cut_stages(shape, 3)
    edges = [carried_elements(shape, span.start) for span in spans[1:]]
    sent = [wire_of(run, layout, 5, rank).pipeline_sent for rank in range(3)]
    assert sent == [10 * 2 * edges[0], 10 * 2 * (edges[0] + edges[1]), 10 * 2 * edges[1]]
    embedders = 4 * embedder_share(shape).on_rank(1)
    assert [wire_of(run, layout, 5, rank).pipeline_gradients for rank in range(3)] == [
        embedders
    ] * 3


def test_divided_tokens_travel_and_are_counted_divided() -> None:
    run = run_of(CROSS, TEXT, precision="bf16", microbatch_images=2)
    whole, parted = (
        wire_of(with_parallel(run, pp=2, tp=2, sp=sp), ParallelLayout(2, 2, 1), 4, 1)
        for sp in (False, True)
    )
    assert 0 < parted.pipeline_sent == whole.pipeline_sent // 2


@pytest.mark.parametrize(("conditioning", "moved"), [
    ("in_context", (76 + 76 + 84 + 84 + 72 + 72) * 64),
    ("query_adaln", (64 + 64 + 72 + 72 + 64 + 72) * 64),
])  # fmt: skip
def test_where_tokens_are_divided_and_made_whole(conditioning: str, moved: int) -> None:
    """Beside the blocks' own: body, registers, text that leaves, final layer, per-token conditions."""
    model = {**CROSS, "conditioning": {"kind": conditioning}}
    shape = model_shape(run_of(model, TEXT))
    assert division_payload(shape, range(4), 2) == TensorPayload(all_gather=moved // 2)


def test_selective_recompute_gathers_again_only_under_sequence_parallelism() -> None:
    layout = ParallelLayout(2, 1, 1)
    plain, again = (run_of(CROSS, TEXT, recompute=mode) for mode in ("none", "selective"))
    assert wire_of(with_parallel(plain, tp=2), layout, 1) == wire_of(
        with_parallel(again, tp=2), layout, 1
    )
    first, second = (wire_of(with_parallel(r, tp=2, sp=True), layout, 1) for r in (plain, again))
    assert second.tensor_reduce_scatter > first.tensor_reduce_scatter
    assert second.tensor_all_gather > first.tensor_all_gather
