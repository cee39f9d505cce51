"""A step through the engine against a hand-written plain PyTorch loop of the same network.

Both live in one process and take turns. The update (clipping, AdamW, averages) is also timed by
itself: there nothing hides what DeepSpeed adds, while in the whole step it is a small share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsr_scale.config.parallel import ParallelConfig
from tools.bench import workload
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Sample,
    Samples,
    Settings,
    compare,
    interleave,
    timed,
)
from tools.bench.ranks import in_own_process

AIM = Aim(high=1.03)
PRECISIONS = ("fp32", "bf16")


def run(settings: Settings) -> Report:
    """Every precision after the other: bf16 on a smaller network, for CPUs without bf16 products
    take two orders of magnitude longer for them."""
    sizes = {
        "fp32": {"width": 384, "depth": 4, "heads": 6, "grid": 16, "registers": 36},
        "bf16": {"width": 192, "depth": 4, "heads": 3, "grid": 8, "registers": 4},
    }
    images = {"fp32": 4, "bf16": 1}
    if settings.tiny:
        tiny = {"width": 32, "depth": 2, "heads": 2, "grid": 4, "registers": 4}
        sizes, images = {"fp32": tiny, "bf16": tiny}, {"fp32": 2, "bf16": 2}
    samples: Samples = {}
    for precision in PRECISIONS:
        samples |= in_own_process(measure, sizes[precision], precision, images[precision], settings)
    comparisons = [
        Comparison(f"{precision} {part}", metric, *_names(precision), aim)
        for precision in PRECISIONS
        for part, metric, aim in (
            ("step", "cpu_s", AIM),
            ("step", "wall_s", None),
            ("update alone", "update_cpu_s", None),
        )
    ]
    facts: dict[str, object] = {"sizes": sizes, "images": images}
    return Report(compare(samples, comparisons), samples, facts)


def _names(precision: str) -> tuple[str, str, tuple[str, str]]:
    plain = f"{precision} plain"
    return f"{precision} engine", plain, (f"{plain} again", plain)


def measure(sizes: dict[str, int], precision: str, images: int, settings: Settings) -> Samples:
    """The samples of one precision."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    shape = workload.class_shape(**sizes)
    training = workload.training_config(
        images=images, microbatch=images, device="cpu", precision=precision
    )
    batches = workload.make_batches(shape, training, cpu)
    engine, _ = workload.start_engine(shape, training, ParallelConfig())
    ours, plain, (again, _) = _names(precision)
    steps = {
        plain: workload.PlainSteps(shape, training, batches, cpu),
        again: workload.PlainSteps(shape, training, batches, cpu),
        ours: workload.EngineSteps(engine, batches),
    }
    number = 1 if settings.tiny else 2
    return interleave({name: _visit(each, number) for name, each in steps.items()}, settings.rounds)


def _visit(steps: workload.EngineSteps | workload.PlainSteps, number: int) -> Callable[[], Sample]:
    """`number` steps as one sample, its update timed by itself too."""

    def visit() -> Sample:
        total = {"wall_s": 0.0, "cpu_s": 0.0, "update_cpu_s": 0.0}
        for _ in range(number):
            gradients, update = timed(steps.gradients), timed(steps.update)
            for metric in ("wall_s", "cpu_s"):
                total[metric] += gradients[metric] + update[metric]
            total["update_cpu_s"] += update["cpu_s"]
        return total

    return visit
