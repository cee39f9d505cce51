"""Idle share of two pipeline ranks against the formula (p−1)/(v·m+p−1).

The network is a real one whose blocks sleep instead of computing, so that stages cost the same and
two cores suffice; schedule, messages and autograd are those of training. A rank is idle while it
neither sleeps in a block nor has its main thread on a core. The schedule's own work, a constant for
each pass of a micro-batch, is thereby part of a stage's cost, as the formula has it; the second row
counts it as idle too.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsr_scale.config.stages import cut_stages
from dsr_scale.model.build import build_model
from dsr_scale.parallel import groups
from dsr_scale.parallel.pipeline import Pipeline
from tools.bench import workload
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Sample,
    Settings,
    Variant,
    compare,
    interleave,
)
from tools.bench.ranks import RankGroup, Step

RANKS = 2
BLOCKS = 4
AIM = Aim(0.95, 1.05)
IDLE, NOT_ASLEEP = "idle_share", "not_asleep_share"


class Layout(NamedTuple):
    """A schedule to measure."""

    virtual_stages: int
    micro_batches: int

    @property
    def name(self) -> str:
        """As in the table."""
        stages = f", {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"pp{RANKS}{stages}, {self.micro_batches} micro-batches"

    @property
    def formula(self) -> float:
        """Share of a step in which a rank waits for the pipeline to fill and to drain."""
        return (RANKS - 1) / (self.virtual_stages * self.micro_batches + RANKS - 1)


LAYOUTS = (Layout(1, 4), Layout(1, 8), Layout(2, 4), Layout(2, 8))


def run(settings: Settings) -> Report:
    """Steps of every schedule in turn; the A/A row is of a second group of the same ranks."""
    forward_s = 0.001 if settings.tiny else 0.05
    layouts = LAYOUTS[-1:] if settings.tiny else LAYOUTS
    groups_of: dict[str, RankGroup] = {}
    variants: dict[str, Variant] = {}
    try:
        for layout in layouts:
            for name in (layout.name, f"{layout.name}, again"):
                group = groups_of[name] = RankGroup(build, RANKS, layout, forward_s)
                variants[name] = lambda group=group: _idle(group.step())
        samples = interleave(variants, settings.rounds, warmup=0 if settings.tiny else 1)
    finally:
        for group in groups_of.values():
            group.close()
    comparisons = []
    for layout in layouts:
        formula = f"{layout.name}, formula"
        samples[formula] = [{IDLE: layout.formula, NOT_ASLEEP: layout.formula}] * settings.rounds
        twins = f"{layout.name}, again", layout.name
        name = f"measured over {layout.formula:.4f}"
        comparisons += [
            Comparison(name, IDLE, layout.name, formula, twins, AIM),
            Comparison(name, NOT_ASLEEP, layout.name, formula, twins),
        ]
    facts: dict[str, object] = {"blocks": BLOCKS, "forward_s": forward_s}
    return Report(compare(samples, comparisons), samples, facts)


def _idle(sample: Sample) -> Sample:
    available_s = RANKS * sample["wall_s"]
    busy_s = sample["slept_s"] + sample["worked_s"]
    return {
        **sample,
        IDLE: 1 - busy_s / available_s,
        NOT_ASLEEP: 1 - sample["slept_s"] / available_s,
    }


def build(layout: Layout, forward_s: float) -> Step:
    """A rank's step: forward and backward of all micro-batches."""
    ranks = groups.start("cpu", pp=RANKS)
    shape = workload.class_shape(width=8, depth=BLOCKS, heads=1, grid=2, registers=0)
    network = build_model(shape, seed=0)
    slept: list[float] = []
    for number in network.blocks:
        network.blocks[number] = SleepingBlock(forward_s, slept)
    pipeline = Pipeline(
        network,
        cut_stages(shape, RANKS * layout.virtual_stages),
        ranks.pipeline,
        rows_per_share=1,
        device=ranks.device,
    )
    training = workload.training_config(
        images=layout.micro_batches, microbatch=1, device="cpu", precision="fp32"
    )
    batches = workload.make_batches(shape, training, ranks.device)

    def step() -> Sample:
        slept.clear()
        began = time.thread_time()
        pipeline.run(workload.examples(batches))
        network.zero_grad()
        return {"slept_s": sum(slept), "worked_s": time.thread_time() - began}

    return step


class SleepingBlock(nn.Module):
    """Hands its tokens on after a while, and their gradient after twice that."""

    def __init__(self, forward_s: float, slept: list[float]) -> None:
        super().__init__()
        self._forward_s = forward_s
        self._slept = slept

    def forward(self, tokens: Tensor, *others: Tensor | None) -> Tensor:
        """[B,N,D] → [B,N,D]."""
        return _Sleep.apply(tokens, self._forward_s, self._slept)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tokens: Tensor, forward_s: float, slept: list[float]) -> Tensor:
        context.backward_s, context.slept = 2 * forward_s, slept
        _sleep(forward_s, slept)
        return tokens.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _sleep(context.backward_s, context.slept)
        return gradient, None, None


def _sleep(seconds: float, slept: list[float]) -> None:
    began = time.perf_counter()
    time.sleep(seconds)
    slept.append(time.perf_counter() - began)
