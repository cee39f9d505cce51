"""A step that is not finite or spikes changes nothing, exactly; everything else equals plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layouts import SHAPE, TRAINING, assembled
from rank_processes import run_ranks
from torch import Tensor

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.training import SkipConfig, TrainingConfig
from dsr_scale.model.build import build_model, decay_groups
from dsr_scale.model.conditioning import Condition
from dsr_scale.parallel import groups
from dsr_scale.parallel.assemble import assemble
from dsr_scale.parallel.ema import decay_at
from dsr_scale.parallel.guard import StepGuard
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import ZeroEngine

NOT_FINITE, SPIKING = 2, 5
STEPS = 8
SKIP = {"spike_deviations": 4.0, "window_steps": 2}


class Scalar:
    """A micro-batch whose loss is a scalar of the weights; bad at two steps."""

    def __init__(self, network: torch.nn.Module, step: int) -> None:
        self.network, self.step = network, step
        self.condition = Condition(null=torch.tensor([False]))
        self.latent_shape = torch.Size([1, 6, 4, 4])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.latent_shape), torch.zeros(1)

    def loss(self, output: Tensor) -> Tensor:
        return scalar(self.network, self.step) + 0 * output.sum()


def scalar(network: torch.nn.Module, step: int) -> Tensor:
    """Its gradient differs by step and parameter."""
    total = torch.zeros(())
    for name, parameter in sorted(network.named_parameters()):
        generator = torch.Generator().manual_seed(step * 1000 + len(name))
        total = total + (parameter * torch.randn(parameter.shape, generator=generator)).sum()
    return total * {NOT_FINITE: math.nan, SPIKING: 1e4}.get(step, 1.0)


def start(clip: float | None, zero: int, offload: bool, precision: str) -> ZeroEngine:
    settings: dict[str, Any] = {**TRAINING, "precision": precision, "device": "cpu", "skip": SKIP}
    settings["optimizer"] = {**settings["optimizer"], "gradient_clip": clip}
    training = TrainingConfig.model_validate(settings)
    ranks = groups.start("cpu")
    parallel = ParallelConfig.model_validate({"zero": zero, "offload": offload})
    shape = ModelShape.model_validate(SHAPE)
    local = assemble(shape, seed=1, ranks=ranks, parallel=parallel, training=training)
    return start_zero(local, None, training, parallel, ranks=ranks, accumulation_steps=1)


def state_of(engine: ZeroEngine) -> dict[str, Tensor]:
    return assembled([p._replace(tensor=p.tensor.clone()) for p in engine.pieces(owned=True)])


def guarded_steps(clip: float | None) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Which steps were skipped, the state after them, and the applied steps of AdamW."""
    engine = start(clip, 1, False, "fp32")
    skipped = []
    for step in range(STEPS):
        loss = engine.forward_backward([Scalar(engine.network, step)])
        skipped.append(engine.step(loss, step=step, learning_rate=1e-2).tolist()[2])
    counts = [float(entry["step"]) for entry in engine._optimizer.state.values()]
    return skipped, state_of(engine), counts


def changes(zero: int, offload: bool, precision: str) -> tuple[list[float], list[bool]]:
    """Which steps were skipped, and which changed anything."""
    engine = start(0.5, zero, offload, precision)
    skipped, changed = [], []
    before = state_of(engine)
    for step in range(STEPS):
        loss = engine.forward_backward([Ramp(engine.network, step)])
        skipped.append(engine.step(loss, step=step, learning_rate=1e-3).tolist()[2])
        after = state_of(engine)
        changed.append(any(not torch.equal(after[name], before[name]) for name in before))
        before = after
    return skipped, changed


class Ramp(Scalar):
    """The same through the network's own forward, which ZeRO-3 gathers weights for."""

    def loss(self, output: Tensor) -> Tensor:
        return (1 + output.mean()) * {NOT_FINITE: math.nan, SPIKING: 1e4}.get(self.step, 1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_every_stage_skips_whole_steps(zero: int, offload: bool, precision: str) -> None:
    skipped, changed = run_ranks(changes, 1, zero, offload, precision)[0]
    assert [step for step, flag in enumerate(skipped) if flag] == [NOT_FINITE, SPIKING]
    assert [step for step, flag in enumerate(changed) if not flag] == [NOT_FINITE, SPIKING]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_skipped_steps_change_nothing_and_the_others_equal_torch(clip: float | None) -> None:
    skipped, trained, counts = run_ranks(guarded_steps, 1, clip)[0]
    assert [step for step, flag in enumerate(skipped) if flag] == [NOT_FINITE, SPIKING]
    assert counts == [STEPS - 2] * 2
    plain = build_model(ModelShape.model_validate(SHAPE), seed=1)
    decay, spared = decay_groups(plain)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in decay], "weight_decay": 0.1},
            {"params": [p for _, p in spared], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    averages = {
        decay: {n: p.detach().clone() for n, p in plain.named_parameters()} for decay in (0.9, 0.5)
    }
    for step in range(STEPS):
        if step in (NOT_FINITE, SPIKING):
            continue
        optimizer.zero_grad()
        scalar(plain, step).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        for decay_rate, average in averages.items():
            keep = decay_at(step, decay_rate)
            for name, parameter in plain.named_parameters():
                average[name] = keep * average[name] + (1 - keep) * parameter.detach()
    for name, parameter in plain.named_parameters():
        expected = {
            "weights": parameter.detach(),
            "exp_avg": optimizer.state[parameter]["exp_avg"],
            "exp_avg_sq": optimizer.state[parameter]["exp_avg_sq"],
            "ema_9": averages[0.9][name],
            "ema_5": averages[0.5][name],
        }
        for kind, tensor in expected.items():
            torch.testing.assert_close(
                trained[f"{kind}.{name}"], tensor, atol=1e-6, rtol=1e-4, msg=f"{kind}.{name}"
            )


def judged(config: SkipConfig, values: list[tuple[float, float]]) -> Iterator[bool]:
    guard = StepGuard(config, torch.device("cpu"), None)
    for loss, norm in values:
        yield bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def test_spikes_are_judged_after_the_window_and_do_not_enter_the_mean() -> None:
    config = SkipConfig(spike_deviations=3.0, window_steps=4)
    quiet = [(1.0 + 0.01 * (i % 3), 2.0 + 0.01 * (i % 2)) for i in range(8)]
    assert list(judged(config, [(50.0, 2.0)])) == [False], "too early to judge"
    verdicts = list(judged(config, [*quiet, (9.0, 2.0), (1.0, 9.0), (9.0, 2.0), (1.01, 2.0)]))
    assert verdicts == [False] * 8 + [True, True, True, False]
    # Far below the mean is no spike.
    assert list(judged(config, [*quiet, (0.1, 0.1)]))[-1] is False


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, -1.0)])
def test_what_is_not_finite_is_always_skipped(bad: tuple[float, float]) -> None:
    assert list(judged(SkipConfig(), [bad, (1.0, 1.0)])) == [True, False]
