"""Memory of a rank: activations against what autograd keeps, states and micro-batches in flight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_config_costs import NONE, SHAPES, TEXT, condition_of, run_of
from torch import nn

from dsr_scale.config.costs import parameters, total
from dsr_scale.config.derive import ModelShape, ParallelLayout, model_shape
from dsr_scale.config.memory import (
    activation_bytes,
    memory_per_gpu,
    peak_in_flight,
    rank_memory,
)
from dsr_scale.config.rank_parameters import rank_share
from dsr_scale.config.run import RunConfig
from dsr_scale.config.stages import cut_stages
from dsr_scale.model.block import Block
from dsr_scale.model.build import build_model


def keep_one_rank_s_part(model: nn.Module, tp: int) -> None:
    """Replaces the blocks' linears by ones of one tensor rank's size."""
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for name in (
            "attn.qkv",
            "cross.q",
            "cross.kv",
            "mlp.w12",
            "attn.proj",
            "cross.proj",
            "mlp.w3",
        ):
            owner, _, leaf = name.partition(".")
            if not hasattr(block, owner):
                continue
            linear = getattr(getattr(block, owner), leaf)
            column = leaf in ("qkv", "q", "kv", "w12")
            sizes = (1, tp) if column else (tp, 1)
            part = nn.Linear(linear.in_features // sizes[0], linear.out_features // sizes[1])
            setattr(getattr(block, owner), leaf, part)


def saved_bytes(shape: ModelShape, dtype: torch.dtype, tp: int = 1) -> int:
    """Bytes of distinct storages that autograd keeps for one image's backward, weights aside."""
    model = build_model(shape, seed=0)
    keep_one_rank_s_part(model, tp)
    model = model.to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor
        return tensor

    latents = torch.randn(1, shape.channels, *shape.grid, dtype=dtype)
    condition = condition_of(shape).to(dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(latents, torch.full((1,), 0.5), condition)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def with_parallel(run: RunConfig, **parallel: Any) -> RunConfig:
    return run.model_copy(update={"parallel": run.parallel.model_copy(update=parallel)})


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"width": 192, "conditioning": {"kind": "class"}}, NONE),
        ({"width": 192, "head": {"width": 192, "depth": 2, "heads": 4}}, TEXT),
        ({"width": 192, "qk_norm": True}, TEXT),
        ({"width": 192, "conditioning": {"kind": "in_context"}}, TEXT),
        ({"width": 192, "conditioning": {"kind": "query_adaln", "connector_depth": 1}}, TEXT),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_activations_are_what_autograd_keeps(
    model: dict[str, Any], text: dict[str, Any], precision: str, tp: int
) -> None:
    """Two depths: the difference is the blocks, whatever embedders and final layer keep."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    runs = [
        with_parallel(
            run_of({**model, "depth": depth, "registers": {"start": 1}}, text, precision=precision),
            tp=tp,
        )
        for depth in (3, 9)
    ]
    shapes = [model_shape(run) for run in runs]
    estimated, measured = (
        [activation_bytes(run, shape) for run, shape in zip(runs, shapes, strict=True)],
        [saved_bytes(shape, dtype, tp) for shape in shapes],
    )
    assert math.isclose(estimated[1] - estimated[0], measured[1] - measured[0], rel_tol=0.05)


def test_recompute_keeps_less_and_pays_one_block() -> None:
    for precision, size in (("bf16", 2), ("fp32", 4)):
        runs = {
            mode: run_of({"width": 192}, TEXT, precision=precision, compile=True, recompute=mode)
            for mode in ("none", "selective", "full")
        }
        shape = model_shape(runs["none"])
        kept = {mode: activation_bytes(run, shape) for mode, run in runs.items()}
        rows = 64 + 64 + (64 + 36) * 2
        assert kept["full"] == rows * 192 * size, "each block's input and nothing else"
        assert kept["full"] < kept["selective"] < kept["none"]
        layout = ParallelLayout(1, 1, 1)
        full = memory_per_gpu(runs["full"], shape, layout, microbatches=1).device
        last_block = kept["none"] - activation_bytes(
            runs["none"], shape.model_copy(update={"depth": 3, "register_start": 2})
        )
        one_image = kept["full"] + last_block - 100 * 192 * size
        assert full.activations == round(32 * one_image)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_states_follow_precision_zero_and_offload(precision: str, zero: int, offload: bool) -> None:
    """weights 2 or 4, gradients 4, master and moments 12, two averages of 4 bytes per parameter."""
    run = run_of(*SHAPES["class"], precision=precision, microbatch_images=4, ema_decays=[0.9, 0.99])
    run = with_parallel(run, zero=zero, offload=offload)
    shape = model_shape(run)
    count = total(parameters(shape)).stored
    weight = 2 if precision == "bf16" else 4
    for dp in (1, 8):
        rank = memory_per_gpu(run, shape, ParallelLayout(1, 1, dp), microbatches=3)
        assert rank.parameters == count
        states = math.ceil(12 * count / dp) + 2 * math.ceil(4 * count / dp)
        assert rank.device.weights == math.ceil(weight * count / (dp if zero == 3 else 1))
        assert rank.device.gradients == math.ceil(4 * count / (dp if zero > 1 else 1))
        assert rank.device.optimizer + rank.device.ema == (0 if offload else states)
        assert rank.host_bytes == (states if offload else 0)
        assert rank.device.activations == round(4 * activation_bytes(run, shape))


def test_ranks_of_a_pipeline() -> None:
    run = with_parallel(run_of(*SHAPES["queries, bytes, head"]), pp=3, tp=2)
    shape = model_shape(run)
    layout = ParallelLayout(2, 3, 4)
    ranks = [
        rank_memory(run, shape, layout, microbatches=6, pipeline_rank=rank) for rank in range(3)
    ]
    for rank, span in zip(ranks, cut_stages(shape, 3), strict=True):
        assert rank.parameters == rank_share(shape, [span]).on_rank(2)
    worst = memory_per_gpu(run, shape, layout, microbatches=6)
    assert worst.device.total == max(rank.device.total for rank in ranks)
    few = rank_memory(run, shape, layout, microbatches=1, pipeline_rank=0).device.activations
    assert ranks[0].device.activations == pytest.approx(3 * few, rel=1e-6)


def test_sequence_parallel_divides_all_activations() -> None:
    run = run_of({"width": 192, "qk_norm": True, "registers": {"count": 8}}, TEXT)
    shape = model_shape(run)
    whole = activation_bytes(run, shape)
    some = activation_bytes(with_parallel(run, tp=2), shape)
    assert activation_bytes(with_parallel(run, tp=2, sp=True), shape) == pytest.approx(whole / 2)
    assert whole / 2 < some < whole


def walked(kept: list[float], pp: int, rank: int, microbatches: int) -> float:
    """The most a rank holds by torch's own order of the interleaved schedule."""
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _ComputationType

    schedule = object.__new__(ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages = pp, len(kept)
    schedule._n_microbatches = microbatches
    schedule.number_of_rounds = max(1, microbatches // pp)
    schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
    schedule._num_stages = pp * len(kept)
    now = peak = 0.0
    for action in schedule._calculate_single_rank_operations(rank):
        if action is None:
            continue
        size = kept[action.stage_index // pp]
        forward = action.computation_type == _ComputationType.FORWARD
        now += size if forward else -size
        peak = max(peak, now)
    assert now == 0
    return peak


@pytest.mark.parametrize(
    ("pp", "virtual", "microbatches"), [(2, 2, 4), (4, 2, 8), (2, 3, 6), (4, 2, 10), (3, 2, 3)]
)
def test_in_flight_is_what_torch_schedules(pp: int, virtual: int, microbatches: int) -> None:
    kept = [1.0 + 0.25 * stage for stage in range(virtual)]
    for rank in range(pp):
        expected = walked(kept, pp, rank, microbatches)
        assert peak_in_flight(kept, pp, rank, microbatches) == pytest.approx(expected)


def test_one_f_one_b_holds_a_micro_batch_for_each_later_rank() -> None:
    assert [peak_in_flight([2.0], 4, rank, 8) for rank in range(4)] == [8, 6, 4, 2]
    assert peak_in_flight([2.0], 4, 0, 3) == 6
