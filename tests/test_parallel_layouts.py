"""Every layout of ranks computes what one process computes: losses, gradient norms, all state.

Three optimizer steps of a network with registers, cross-attention text and a DDT head, on gloo. In
fp32 losses and norms agree to 1e-5 relative, and no weight, moment or average differs by more than
1e-5 of its tensor's largest value. In bf16 rounding depends on who adds what, and the bound is 1e-2.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from layouts import GLOBAL_BATCH, SHAPE, Outcome, steps
from rank_processes import run_ranks

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")

FP32, BF16 = 1e-5, 1e-2

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"pp": 2, "virtual_stages": 2}),
    (8, {"tp": 2, "sp": True, "pp": 2}),
    (2, {"zero": 1}),
    (2, {"zero": 2}),
    (2, {"zero": 3}),
    (4, {"tp": 2, "zero": 3}),
    (2, {"zero": 3, "offload": True}),
]

MORE_LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"tp": 4}),
    (4, {"tp": 4, "sp": True}),
    (2, {"pp": 2}),
    (4, {"pp": 4}),
    (2, {"pp": 2, "virtual_stages": 3}),
    (4, {"tp": 2, "pp": 2}),
    (8, {"tp": 2, "pp": 2}),
    (4, {"tp": 2, "sp": True, "pp": 2, "virtual_stages": 2}),
    (4, {"zero": 1}),
    (4, {"zero": 2}),
    (4, {"zero": 3}),
    (4, {"tp": 2, "sp": True, "zero": 2}),
    (2, {"zero": 1, "offload": True}),
    (2, {"zero": 2, "offload": True}),
]
"""Further along one axis, or combinations of what others combine."""

extended = pytest.mark.extended


def name(layout: tuple[int, dict[str, Any]]) -> str:
    ranks, parallel = layout
    return f"{ranks} ranks " + ",".join(f"{key}={value}" for key, value in parallel.items())


@functools.cache
def _alone(shape: str, training: str) -> Outcome:
    return run_ranks(steps, 1, json.loads(shape), {}, json.loads(training))[0]


def alone(shape: dict[str, Any], training: dict[str, Any]) -> Outcome:
    """What one process computes."""
    return _alone(json.dumps(shape), json.dumps(training))


def assert_agree(ours: Outcome, reference: Outcome, bound: float) -> None:
    assert ours.losses == pytest.approx(reference.losses, rel=bound)
    assert ours.norms == pytest.approx(reference.norms, rel=bound)
    assert ours.state.keys() == reference.state.keys()
    for tensor_name, expected in reference.state.items():
        difference = (ours.state[tensor_name] - expected).abs().max()
        assert difference <= bound * expected.abs().max() + 1e-7, tensor_name


def microbatch(layout: tuple[int, dict[str, Any]]) -> int:
    """Images, so that there are two micro-batches, or four in a pipeline; one process takes one at a time."""
    ranks, parallel = layout
    stages = parallel.get("pp", 1)
    share = GLOBAL_BATCH * parallel.get("tp", 1) * stages // ranks
    return max(1, share // (4 if stages > 1 else 2))


def assert_equal_to_one_process(
    layout: tuple[int, dict[str, Any]],
    shape: dict[str, Any] = SHAPE,
    bound: float = FP32,
    **training: Any,
) -> None:
    ranks, parallel = layout
    outcomes = run_ranks(steps, ranks, shape, parallel, training, microbatch(layout))
    assert_agree(outcomes[0], alone(shape, training), bound)
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses, "ranks know different losses"
        assert outcome.norms == outcomes[0].norms


def test_the_reference_itself_learns_and_averages_apart() -> None:
    outcome = alone(SHAPE, {})
    kinds = {key.partition(".")[0] for key in outcome.state}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq", "ema_9", "ema_5", "buffers"}
    for key, weight in outcome.state.items():
        if key.startswith("weights."):
            fast = outcome.state[key.replace("weights.", "ema_5.")]
            slow = outcome.state[key.replace("weights.", "ema_9.")]
            # Early on every half-life is short (ema.decay_at), and both decays agree.
            assert torch.equal(fast, slow) and not torch.equal(fast, weight), key


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=extended) for layout in MORE_LAYOUTS)],
    ids=name,
)
def test_fp32(layout: tuple[int, dict[str, Any]]) -> None:
    assert_equal_to_one_process(layout)


BF16_TRAINING = {
    "precision": "bf16",
    "optimizer": {"learning_rate": 1e-4, "eps": 1e-4, "gradient_clip": 0.5},
}


@pytest.mark.parametrize(
    "layout",
    [
        (2, {"tp": 2, "sp": True}),
        pytest.param((8, {"tp": 2, "pp": 2}), marks=extended),
        (2, {"pp": 2, "virtual_stages": 2}),
        (2, {"zero": 1}),
        pytest.param((2, {"zero": 2}), marks=extended),
        pytest.param((4, {"tp": 2, "zero": 3}), marks=extended),
        (2, {"zero": 2, "offload": True}),
    ],
    ids=name,
)
def test_bf16(layout: tuple[int, dict[str, Any]]) -> None:
    ranks, parallel = layout
    ours = run_ranks(steps, ranks, SHAPE, parallel, BF16_TRAINING, microbatch(layout))[0]
    reference = alone(SHAPE, BF16_TRAINING)
    assert ours.losses == pytest.approx(reference.losses, rel=BF16)
    assert ours.norms == pytest.approx(reference.norms, rel=BF16)
    for tensor_name, expected in reference.state.items():
        if tensor_name.startswith(("weights.", "ema_")):
            difference = (ours.state[tensor_name] - expected).norm()
            assert difference <= BF16 * expected.norm() + 1e-6, tensor_name


WHOLE_GRID: tuple[int, dict[str, Any]] = (4, {"tp": 2, "sp": True, "pp": 2})


@pytest.mark.parametrize(
    ("start", "layout"),
    [
        *((start, (2, {"pp": 2})) for start in (1, 2)),
        *(pytest.param(start, WHOLE_GRID, marks=extended) for start in (0, 3)),
        *(pytest.param(start, (2, {"pp": 2}), marks=extended) for start in (0, 3)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else name(value),
)
def test_registers_before_at_and_after_a_stage_border(
    start: int, layout: tuple[int, dict[str, Any]]
) -> None:
    """pp 2 without a head cuts 4 blocks in the middle: the border lies before block 2."""
    shape = {**SHAPE, "head": None, "register_start": start}
    assert_equal_to_one_process(layout, shape)


@pytest.mark.parametrize(
    "layout", [WHOLE_GRID, pytest.param((4, {"tp": 2, "zero": 3}), marks=extended)], ids=name
)
def test_without_registers(layout: tuple[int, dict[str, Any]]) -> None:
    assert_equal_to_one_process(layout, {**SHAPE, "registers": 0})


CONDITIONED: dict[str, dict[str, Any]] = {
    "class": {
        "conditioning": {"kind": "class", "num_classes": 3},
        "text_kind": "none",
        "text_channels": 0,
        "text_length": 0,
        "head": None,
    },
    "in context, head": {"conditioning": {"kind": "in_context"}},
    "in context, bytes": {
        "conditioning": {"kind": "in_context"},
        "text_kind": "bytes",
        "text_channels": 0,
        "head": None,
    },
    "queries": {"conditioning": {"kind": "query_adaln", "connector_depth": 1}, "head": None},
    "queries, head": {"conditioning": {"kind": "query_adaln", "connector_depth": 2}},
}


@pytest.mark.parametrize(
    "kind",
    [
        "class",
        "in context, head",
        pytest.param("in context, bytes", marks=extended),
        pytest.param("queries", marks=extended),
        "queries, head",
    ],
)
@pytest.mark.parametrize(
    "layout", [pytest.param((2, {"tp": 2}), marks=extended), WHOLE_GRID], ids=name
)
def test_every_conditioning(kind: str, layout: tuple[int, dict[str, Any]]) -> None:
    assert_equal_to_one_process(layout, {**SHAPE, **CONDITIONED[kind]})


@functools.cache
def without_recomputation(ranks: int, parallel: str) -> Outcome:
    return run_ranks(steps, ranks, SHAPE, json.loads(parallel), {})[0]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        (1, {}),
        pytest.param((2, {"tp": 2}), marks=extended),
        (2, {"tp": 2, "sp": True}),
        pytest.param((2, {"pp": 2}), marks=extended),
        pytest.param((2, {"zero": 3}), marks=extended),
    ],
    ids=name,
)
def test_recomputation_changes_no_number(mode: str, layout: tuple[int, dict[str, Any]]) -> None:
    ranks, parallel = layout
    ours = run_ranks(steps, ranks, SHAPE, parallel, {"recompute": mode})[0]
    kept = without_recomputation(ranks, json.dumps(parallel))
    assert ours.losses == kept.losses
    assert ours.norms == kept.norms
    assert all(torch.equal(ours.state[key], kept.state[key]) for key in kept.state)


@pytest.mark.parametrize(
    ("layout", "images"),
    [((1, {}), 4), ((2, {"tp": 2}), 1), pytest.param((2, {"pp": 2}), 4, marks=extended)],
    ids=str,
)
def test_micro_batches_change_nothing(layout: tuple[int, dict[str, Any]], images: int) -> None:
    ranks, parallel = layout
    ours = run_ranks(steps, ranks, SHAPE, parallel, {}, images)[0]
    assert_agree(ours, alone(SHAPE, {}), FP32)
