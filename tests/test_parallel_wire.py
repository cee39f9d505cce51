"""Bytes on the wire and bytes held per rank: counted while a step runs, against the formulas of `plan`.

Collectives are counted below DeepSpeed, megatron and the schedules, where torch dispatches them, with
the group they run on. Messages of a few bytes (loss, norm, verdict) are left out.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import GLOBAL_BATCH, SHAPE, one_step, start_engine
from rank_processes import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from dsr_scale.config.derive import ModelShape, ParallelLayout
from dsr_scale.config.memory import rank_memory
from dsr_scale.config.run import RunConfig
from dsr_scale.config.wire import Wire, wire_bytes
from dsr_scale.model.build import build_on_meta
from dsr_scale.parallel import start
from dsr_scale.parallel.fragments import master_partitions

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")

CONTROL_BYTES = 8


class Counter(TorchDispatchMode):
    """Payload bytes by axis and call."""

    def __init__(self, axes: dict[str, Any]) -> None:
        super().__init__()
        self.names = {
            axis.group.group_name: name for name, axis in axes.items() if axis.group is not None
        }
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name.startswith("c10d::") and not name.endswith(("recv_", "barrier")):
            group = next(a for a in arguments if isinstance(a, torch.ScriptObject))
            # DeepSpeed makes its own group of all ranks where there is one way of splitting only.
            axis = self.names.get(dist.ProcessGroup.unbox(group).group_name, "data")
            # Of a base call the second tensor is what the rank puts in, the first what comes out.
            payload = arguments[1] if "base" in name or "allgather" in name else arguments[0]
            payload = payload if isinstance(payload, (list, tuple)) else [payload]
            size = sum(t.numel() * t.element_size() for t in _flat(payload))
            if size > CONTROL_BYTES:
                self.bytes[f"{axis} {name.removeprefix('c10d::').strip('_')}"] += size
        return function(*arguments, **(settings or {}))


def _flat(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for each in tensors for tensor in _flat(each)]


def counted_step(
    shape_values: dict[str, Any], parallel: dict[str, Any], training: dict[str, Any]
) -> dict[str, int]:
    """What this rank sent in its second step, by axis and call."""
    shape = ModelShape.model_validate(shape_values)
    # Every weight of so small a model would be fetched ahead and never let go.
    start.PREFETCH_ELEMENTS = 0
    engine, ranks = start_engine(shape, parallel, training)
    one_step(engine, ranks, shape, 0)
    axes = {"tensor": ranks.tensor, "pipeline": ranks.pipeline, "data": ranks.data}
    counter = Counter(axes)
    with counter:
        one_step(engine, ranks, shape, 1)
    return dict(counter.bytes)


def run_for(parallel: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "directory": "d",
            "data": {"shards": "s"},
            "model": {"width": 32, "depth": 4, "heads": 4},
            "parallel": parallel,
            "training": {
                "precision": "fp32",
                "microbatch_images": 1,
                "global_batch_images": GLOBAL_BATCH,
                **training,
            },
        }
    )


def predicted(
    ranks: int, parallel: dict[str, Any], training: dict[str, Any], shape: ModelShape, rank: int
) -> Wire:
    """The formula for the pipeline rank of `rank`."""
    tp, pp = parallel.get("tp", 1), parallel.get("pp", 1)
    layout = ParallelLayout(tp, pp, ranks // (tp * pp))
    return wire_bytes(
        run_for(parallel, training),
        shape,
        layout,
        microbatches=GLOBAL_BATCH // layout.dp,
        pipeline_rank=rank // (tp * layout.dp),
    )


CROSS = "cross-attention, head"
SHAPES = {
    CROSS: SHAPE,
    "queries": {
        **SHAPE,
        "conditioning": {"kind": "query_adaln", "connector_depth": 1},
        "head": None,
    },
    "in context": {**SHAPE, "conditioning": {"kind": "in_context"}},
}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "none") for kind in SHAPES), (CROSS, "full"), (CROSS, "selective")],
)
@pytest.mark.parametrize("sp", [False, True])
def test_tensor_parallel_bytes(kind: str, mode: str, sp: bool) -> None:
    parallel, training = {"tp": 2, "sp": sp}, {"recompute": mode}
    counts = run_ranks(counted_step, 2, SHAPES[kind], parallel, training)
    shape = ModelShape.model_validate(SHAPES[kind])
    for rank, count in enumerate(counts):
        wire = predicted(2, parallel, training, shape, rank)
        assert count["tensor allreduce"] == wire.tensor_all_reduce + wire.tensor_gradients
        assert count.get("tensor allgather_base", 0) == wire.tensor_all_gather
        assert count.get("tensor reduce_scatter_base", 0) == wire.tensor_reduce_scatter


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"pp": 2}),
        (4, {"pp": 4}),
        (2, {"pp": 2, "virtual_stages": 2}),
        (4, {"tp": 2, "sp": True, "pp": 2}),
    ],
    ids=str,
)
def test_pipeline_bytes(ranks: int, parallel: dict[str, Any]) -> None:
    counts = run_ranks(counted_step, ranks, SHAPE, parallel, {})
    shape = ModelShape.model_validate(SHAPE)
    for rank, count in enumerate(counts):
        wire = predicted(ranks, parallel, {}, shape, rank)
        assert count.get("pipeline send", 0) == wire.pipeline_sent
        assert count["pipeline allreduce"] == wire.pipeline_gradients


@pytest.mark.parametrize(("ranks", "precision"), [(2, "fp32"), (4, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_bytes_on_the_wire(ranks: int, zero: int, precision: str) -> None:
    """All-reduce or reduce-scatter of gradients, gathers of weights, but for the padding of ZeRO's
    partitions: two flat groups to a multiple of 2·ranks, or with ZeRO-3 each tensor to one of ranks."""
    parallel, training = {"zero": zero}, {"precision": precision}
    shape = ModelShape.model_validate(SHAPE)
    tensors = sum(1 for _ in build_on_meta(shape).parameters())
    padding = 4 * (tensors * (ranks - 1) * GLOBAL_BATCH if zero == 3 else 2 * 2 * ranks)
    for rank, count in enumerate(run_ranks(counted_step, ranks, SHAPE, parallel, training)):
        wire = predicted(ranks, parallel, training, shape, rank)
        reduced = count["data reduce_scatter_base" if zero == 3 else "data allreduce"]
        assert 0 <= reduced - wire.data_gradients <= padding
        # Stage 3 finds the registers still there when the backward asks for them.
        assert abs(count["data allgather_base"] - wire.data_parameters) <= 2 * padding


def held_bytes(parallel: dict[str, Any], training: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, optimizer state and averages that this rank keeps between steps."""
    shape = ModelShape.model_validate(SHAPE)
    engine, ranks = start_engine(shape, parallel, training)
    one_step(engine, ranks, shape, 0)
    zero = engine._engine.optimizer
    partitions = master_partitions(zero)
    states = engine._optimizer.state
    kinds = dict.fromkeys(("optimizer", "ema"), 0)
    for partition in partitions:
        kinds["optimizer"] += partition.numel() * 4
        for name, tensor in states[partition].items():
            if tensor.dim():
                kinds["ema" if name.startswith("ema_") else "optimizer"] += tensor.numel() * 4
    weights = sum(
        getattr(p, "ds_tensor", p).numel() * p.element_size() for p in engine.network.parameters()
    )
    return {"weights": weights, **kinds}


@pytest.mark.parametrize(
    ("ranks", "parallel", "precision"),
    [
        (1, {}, "fp32"),
        (2, {"zero": 1}, "bf16"),
        (4, {"zero": 2}, "fp32"),
        (2, {"zero": 2}, "bf16"),
        (2, {"zero": 3}, "bf16"),
        (4, {"tp": 2, "zero": 3}, "fp32"),
        (4, {"pp": 2}, "fp32"),
        (4, {"tp": 2, "pp": 2}, "bf16"),
    ],
    ids=str,
)
def test_zero_bytes_per_rank(ranks: int, parallel: dict[str, Any], precision: str) -> None:
    training = {"precision": precision}
    shape = ModelShape.model_validate(SHAPE)
    tp, pp = parallel.get("tp", 1), parallel.get("pp", 1)
    dp = ranks // (tp * pp)
    tensors = sum(1 for _ in build_on_meta(shape).parameters())
    padding = 4 * (tensors * dp if parallel.get("zero") == 3 else 2 * 2 * dp)
    run = run_for(parallel, {**training, "ema_decays": [0.9, 0.5]})
    for rank, held in enumerate(run_ranks(held_bytes, ranks, parallel, training)):
        expected = rank_memory(
            run,
            shape,
            ParallelLayout(tp, pp, dp),
            microbatches=GLOBAL_BATCH // dp,
            pipeline_rank=rank // (tp * dp),
        ).device
        assert 0 <= held["weights"] - expected.weights <= padding
        assert abs(held["optimizer"] - expected.optimizer) <= 3 * padding
        assert abs(held["ema"] - expected.ema) <= 2 * padding
