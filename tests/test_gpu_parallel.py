"""One GPU under DeepSpeed: what must change no number, what must change nothing, what must not wait."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GLOBAL_BATCH, SHAPE, TRAINING, _disturb, assembled, example
from rank_processes import run_ranks
from torch import Tensor

from dsr_scale.checkpoint import tensors
from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.training import TrainingConfig
from dsr_scale.parallel import ema, fragments, groups
from dsr_scale.parallel.assemble import assemble
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import ZeroEngine
from dsr_scale.train.objective import Example
from dsr_scale.train.outcomes import Outcomes

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
MICROBATCH = 4
SHAPE_ON_GPU = ModelShape.model_validate(SHAPE)
TOLERANCE: dict[str, dict[str, Any]] = {
    "fp32": {"atol": 1e-5, "rtol": 1e-4},
    "bf16": {"atol": 2e-3, "rtol": 1e-2},
}


def start(training: dict[str, Any], parallel: dict[str, Any]) -> ZeroEngine:
    """The engine of the small network on the GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    settings = TrainingConfig.model_validate(
        {
            **TRAINING,
            **training,
            "microbatch_images": MICROBATCH,
            "global_batch_images": GLOBAL_BATCH,
            "device": "cuda",
        }
    )
    layout = ParallelConfig.model_validate(parallel)
    ranks = groups.start("cuda")
    local = assemble(SHAPE_ON_GPU, seed=1, ranks=ranks, parallel=layout, training=settings)
    _disturb(local.network, local.splits)
    return start_zero(
        local,
        None,
        settings,
        layout,
        ranks=ranks,
        accumulation_steps=GLOBAL_BATCH // MICROBATCH,
    )


def batch(step: int) -> list[Example]:
    """The micro-batches of a step, on the GPU."""
    first = step * GLOBAL_BATCH
    found = []
    for start_id in range(first, first + GLOBAL_BATCH, MICROBATCH):
        made = example(SHAPE_ON_GPU, list(range(start_id, start_id + MICROBATCH)))
        found.append(
            replace(made, latents=made.latents.to(CUDA), condition=made.condition.to(CUDA))
        )
    return found


def state_of(engine: ZeroEngine) -> dict[str, Tensor]:
    """A copy of the whole training state on the host."""
    return assembled([p._replace(tensor=p.tensor.cpu().clone()) for p in engine.pieces(owned=True)])


def train(training: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Tensor]:
    """The state after three steps."""
    engine = start(training, parallel)
    for step in range(3):
        loss = engine.forward_backward(batch(step))
        assert engine.step(loss, step=step, learning_rate=1e-2).tolist()[2] == 0
    return state_of(engine)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], precision: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name, **TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_changes_no_number(precision: str) -> None:
    whole, *again = (
        run_ranks(train, 1, {"precision": precision, "recompute": mode}, {})[0]
        for mode in ("none", "selective", "full")
    )
    for state in again:
        assert_equal(state, whole, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_on_the_host_takes_the_same_steps(precision: str) -> None:
    training = {"precision": precision}
    on_device = run_ranks(train, 1, training, {})[0]
    assert_equal(run_ranks(train, 1, training, {"offload": True})[0], on_device, precision)


class _Spoiled:
    """A micro-batch whose loss is multiplied by something."""

    def __init__(self, good: Example, factor: float) -> None:
        self.good, self.factor = good, factor
        self.condition, self.latent_shape = good.condition, good.latent_shape

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.good.inputs()

    def loss(self, output: Tensor) -> Tensor:
        return self.good.loss(output) * self.factor


def spoil(training: dict[str, Any], parallel: dict[str, Any], factor: float) -> None:
    """Four good steps, one that is spoiled and must leave no trace, and another good one."""
    skip = {"spike_deviations": 6.0, "window_steps": 3}
    engine = start({**training, "skip": skip}, parallel)
    for step in range(6):
        before = state_of(engine)
        examples: list[Any] = batch(step)
        if step == 4:
            examples = [_Spoiled(each, factor) for each in examples]
        loss = engine.forward_backward(examples)
        _, _, skipped = engine.step(loss, step=step, learning_rate=1e-4).tolist()
        assert skipped == (step == 4), step
        after = state_of(engine)
        weights = [name for name in before if name.startswith("weights.")]
        if step == 4:
            for name, tensor in before.items():
                assert torch.equal(after[name], tensor), name
        else:
            assert any(not torch.equal(after[name], before[name]) for name in weights)
    counts = {float(entry["step"]) for entry in engine._optimizer.state.values()}
    assert counts == {5.0}


@pytest.mark.parametrize("factor", [math.nan, 1e4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing(precision: str, factor: float) -> None:
    run_ranks(spoil, 1, {"precision": precision}, {}, factor)


@contextmanager
def no_sync() -> Iterator[None]:
    """Anything in here that makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch_for_syncs() -> None:
    """The parts of a step that this package adds to DeepSpeed's, each by itself."""
    engine = start({"skip": {"spike_deviations": 6.0, "window_steps": 2}}, {})
    outcomes = Outcomes()
    for step in range(3):
        loss = engine.forward_backward(batch(step))
        values = engine.step(loss, step=step, learning_rate=1e-3)
        norm = engine._gradient_norm(loss)
        partitions = fragments.master_partitions(engine._engine.optimizer)
        with no_sync():
            verdict = engine.guard.judge(loss, norm)
            ema.update(partitions, engine._optimizer.state, (0.9, 0.5), step, 1 - verdict)
            known = outcomes.push(step + 1, values, ["sample"])
        assert [outcome.step for outcome in known] == ([step] if step else [])
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        values.tolist()


def test_guard_average_and_outcomes_do_not_wait_for_the_gpu() -> None:
    run_ranks(watch_for_syncs, 1)


def save_and_load(folder: Path, precision: str) -> None:
    """Saves while training goes on; reads it back on the host, and into the engine."""
    engine = start({"precision": precision}, {})

    def step(number: int) -> None:
        engine.step(engine.forward_backward(batch(number)), step=number, learning_rate=1e-2)

    step(0)
    step(1)
    saved = state_of(engine)
    writer = CheckpointWriter(None)
    writer.start(folder / "step", engine.pieces(owned=True), {"step": 2})
    step(2)
    after = state_of(engine)
    writer.wait()
    assert any(not torch.equal(after[name], tensor) for name, tensor in saved.items())
    read: dict[str, Tensor] = {}
    shapes = tensors.names_and_shapes(folder / "step")
    tensors.load(folder / "step", shapes, read.__setitem__)
    assert read.keys() == saved.keys()
    tensors.load_pieces(folder / "step", engine.pieces(owned=False))
    engine.refresh(applied_steps=2)
    loaded = state_of(engine)
    for name, tensor in saved.items():
        assert torch.equal(read[name], tensor), name
        assert torch.equal(loaded[name], tensor), name
    step(2)
    assert_equal(state_of(engine), after, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_save_from_the_gpu_goes_on_beside_training(tmp_path: Path, precision: str) -> None:
    run_ranks(save_and_load, 1, tmp_path, precision)
