"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from dsr_scale.config.training import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0: linear warm-up, flat, then the decay."""
    peak = config.optimizer.learning_rate
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    start = max(schedule.decay_start_step, schedule.warmup_steps)
    end = schedule.decay_end_step or config.steps
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if schedule.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (schedule.final_learning_rate - peak) * progress
