"""ZeRO-1 in this process against plain torch: a step that is not finite changes nothing, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import write_config

from dsr_scale.config.derive import model_shape
from dsr_scale.config.load import load_run
from dsr_scale.model.build import build_model, decay_groups
from dsr_scale.parallel import groups
from dsr_scale.parallel.ema import decay_at
from dsr_scale.parallel.zero import ZeroEngine, start_zero


@pytest.fixture(scope="module")
def ranks() -> Iterator[groups.Ranks]:
    yield groups.start("cpu")
    groups.stop()


def gradient_source(model: torch.nn.Module, step: int) -> torch.Tensor:
    """A scalar whose gradient differs by step and parameter; not finite at step 1."""
    generator = torch.Generator().manual_seed(step)
    total = torch.zeros(())
    for parameter in model.parameters():
        total = total + (parameter * torch.randn(parameter.shape, generator=generator)).sum()
    return total * float("nan") if step == 1 else total


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_that_is_not_finite_changes_nothing(
    ranks: groups.Ranks, tmp_path: Path, clip: float | None
) -> None:
    run = load_run(
        write_config(tmp_path),
        [f"training.optimizer.gradient_clip={'null' if clip is None else clip}"],
    )
    shape = model_shape(run)
    model, plain = build_model(shape, seed=0), build_model(shape, seed=0)
    decay, spared = decay_groups(model)
    engine: ZeroEngine = start_zero(
        model,
        ([p for _, p in decay], [p for _, p in spared]),
        run.training,
        ranks=ranks,
        accumulation_steps=1,
    )
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
    average = {n: p.detach().clone() for n, p in plain.named_parameters()}
    applied = []
    for step in range(4):
        engine.backward(gradient_source(engine.model, step), accumulation_steps=1)
        applied.append(engine.step(step=step, learning_rate=1e-2).applied)
        if step == 1:
            continue
        optimizer.zero_grad()
        gradient_source(plain, step).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        keep = decay_at(step, run.training.ema_decay)
        for name, parameter in plain.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * parameter.detach()
    assert applied == [True, False, True, True]
    trained = dict(engine.full_tensors())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            trained[f"weights.{name}"], parameter.detach(), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(trained[f"ema.{name}"], average[name], atol=1e-6, rtol=1e-5)
        moment = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(trained[f"exp_avg.{name}"], moment, atol=1e-6, rtol=1e-4)
