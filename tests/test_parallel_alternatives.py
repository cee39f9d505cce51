"""Remedies for outliers beside registers, on layouts of ranks: what one process computes, and the plan's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import SHAPE, steps
from rank_processes import run_ranks
from test_parallel_layouts import (
    alone,
    assert_equal_to_one_process,
    name,
)
from test_parallel_wire import counted_step, predicted

from dsr_scale.config.derive import ModelShape

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")
extended = pytest.mark.extended

Layout = tuple[int, dict[str, Any]]
TENSOR: Layout = (2, {"tp": 2})
SEQUENCE: Layout = (2, {"tp": 2, "sp": True})
PIPELINE: Layout = (2, {"pp": 2})
ALTERNATIVES: dict[str, dict[str, Any]] = {
    "off by one": {**SHAPE, "attention_variant": "off_by_one"},
    "gated": {**SHAPE, "attention_variant": "gated"},
    "masked registers, bias": {**SHAPE, "attention_variant": "bias", "registers_masked": True},
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("masked registers, bias", SEQUENCE),
        ("gated", SEQUENCE),
        ("off by one", PIPELINE),
        pytest.param("masked registers, bias", TENSOR, marks=extended),
        pytest.param("masked registers, bias", PIPELINE, marks=extended),
        pytest.param("gated", TENSOR, marks=extended),
        pytest.param("masked registers, bias", (2, {"zero": 3}), marks=extended),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_fp32(kind: str, layout: Layout) -> None:
    assert_equal_to_one_process(layout, ALTERNATIVES[kind])


@extended
def test_masked_registers_before_captions_in_context() -> None:
    shape = {
        **SHAPE,
        "conditioning": {"kind": "in_context"},
        "registers_masked": True,
        "attention_variant": "off_by_one",
    }
    assert_equal_to_one_process(SEQUENCE, shape)


@pytest.mark.parametrize(
    ("kind", "mode"), [("gated", "selective"), ("masked registers, bias", "full")]
)
def test_recomputation_changes_no_number(kind: str, mode: str) -> None:
    ours = run_ranks(steps, 1, ALTERNATIVES[kind], {}, {"recompute": mode})[0]
    kept = alone(ALTERNATIVES[kind], {})
    assert ours.losses == kept.losses
    assert ours.norms == kept.norms
    assert all(torch.equal(ours.state[key], kept.state[key]) for key in kept.state)


@pytest.mark.parametrize(
    ("mode", "sp"), [pytest.param("none", False, marks=extended), ("selective", True)]
)
def test_a_gate_s_bytes_on_the_wire(mode: str, sp: bool) -> None:
    parallel, training = {"tp": 2, "sp": sp}, {"recompute": mode}
    counts = run_ranks(counted_step, 2, ALTERNATIVES["gated"], parallel, training)
    shape = ModelShape.model_validate(ALTERNATIVES["gated"])
    for rank, count in enumerate(counts):
        wire = predicted(2, parallel, training, shape, rank)
        assert count["tensor allreduce"] == wire.tensor_all_reduce + wire.tensor_gradients
        assert count.get("tensor allgather_base", 0) == wire.tensor_all_gather
        assert count.get("tensor reduce_scatter_base", 0) == wire.tensor_reduce_scatter
