"""A step through the engine against a hand-written plain PyTorch loop of the same network.

Both live in one process and take turns. The update (clipping, AdamW, averages) is also timed by
itself: there nothing hides what DeepSpeed adds, while in the whole step it is a small share, and the
smaller the more micro-batches a step has. Where the C library gives freed memory back to the kernel,
DeepSpeed's flat buffers are mapped and cleared anew in every step; `memory kept` is the same
comparison with that turned off for both sides.
"""

from __future__ import annotations

import ctypes
import resource
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
FAULTS = "page_faults"


class Case(NamedTuple):
    """One network and batch on which both sides are run."""

    name: str
    precision: str
    sizes: dict[str, int]
    microbatch: int
    micro_batches: int = 1
    keep_memory: bool = False

    @property
    def names(self) -> tuple[str, str, tuple[str, str]]:
        """Engine, plain loop, and the twins of the A/A row."""
        plain = f"{self.name}, plain"
        return f"{self.name}, engine", plain, (f"{plain} again", plain)


_SIZES = {"width": 384, "depth": 4, "heads": 6, "grid": 16, "registers": 36}
CASES = (
    Case("fp32", "fp32", _SIZES, 4),
    Case("fp32, memory kept", "fp32", _SIZES, 4, keep_memory=True),
    Case("fp32, 4 micro-batches", "fp32", _SIZES, 4, 4),
    # Small, for CPUs without bf16 products take two orders of magnitude longer for them.
    Case("bf16", "bf16", {"width": 192, "depth": 4, "heads": 3, "grid": 8, "registers": 4}, 1),
)
_TINY_SIZES = {"width": 32, "depth": 2, "heads": 2, "grid": 4, "registers": 4}
TINY = (
    Case("fp32", "fp32", _TINY_SIZES, 2, 2, keep_memory=True),
    Case("bf16", "bf16", _TINY_SIZES, 2),
)


def run(settings: Settings) -> Report:
    """Every case in a process of its own."""
    cases = TINY if settings.tiny else CASES
    samples: Samples = {}
    for case in cases:
        samples |= in_own_process(measure, case, settings)
    comparisons = [each for case in cases for each in _comparisons(case)]
    facts: dict[str, object] = {case.name: case._asdict() for case in cases}
    for case in cases:
        for variant in case.names[:2]:
            faults = statistics.median(sample.pop(FAULTS) for sample in samples[variant])
            facts[f"{variant}: page faults in an update"] = round(faults)
    return Report(compare(samples, comparisons), samples, facts)


def _comparisons(case: Case) -> Iterator[Comparison]:
    yield Comparison(f"{case.name}: step", "cpu_s", *case.names, AIM)
    yield Comparison(f"{case.name}: step", "wall_s", *case.names)
    yield Comparison(f"{case.name}: update alone", "update_cpu_s", *case.names)


def measure(case: Case, settings: Settings) -> Samples:
    """The samples of one case."""
    if case.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    shape = workload.class_shape(**case.sizes)
    training = workload.training_config(
        images=case.microbatch * case.micro_batches,
        microbatch=case.microbatch,
        device="cpu",
        precision=case.precision,
    )
    batches = workload.make_batches(shape, training, cpu)
    engine, _ = workload.start_engine(shape, training, ParallelConfig())
    ours, plain, (again, _) = case.names
    steps = {
        plain: workload.PlainSteps(shape, training, batches, cpu),
        again: workload.PlainSteps(shape, training, batches, cpu),
        ours: workload.EngineSteps(engine, batches),
    }
    return interleave({name: _visit(each) for name, each in steps.items()}, settings.rounds)


def _visit(steps: workload.EngineSteps | workload.PlainSteps) -> Callable[[], Sample]:
    """A step as one sample, its update timed by itself too."""

    def visit() -> Sample:
        gradients = timed(steps.gradients)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        update = timed(steps.update)
        return {
            "wall_s": gradients["wall_s"] + update["wall_s"],
            "cpu_s": gradients["cpu_s"] + update["cpu_s"],
            "update_cpu_s": update["cpu_s"],
            FAULTS: resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before,
        }

    return visit


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, however large; nothing happens with another C library."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
