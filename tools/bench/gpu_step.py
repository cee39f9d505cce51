"""One GPU: a DiT-XL step through DeepSpeed against the plain loop, and peak memory against `plan`.

bf16, each of the two eager and with compiled blocks, in processes of their own. Peak memory is taken
while the engine is alone on the GPU; then the plain loop joins it. Without a GPU it
refuses, unless it is tried out at a tiny size, where no number means anything.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ParallelLayout, model_shape
from dsr_scale.config.load import load_run
from dsr_scale.config.memory import memory_per_gpu
from dsr_scale.config.run import RunConfig
from tools.bench import workload
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Row,
    Sample,
    Samples,
    Settings,
    compare,
    counted,
    interleave,
    timed,
)
from tools.bench.ranks import in_own_process

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "published" / "dit_xl.yaml"
MICROBATCH = 32
STEP_AIM, MEMORY_AIM = Aim(high=1.03), Aim(0.95, 1.05)
TINY = (
    "model.preset=null",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.registers.count=4",
)


def run(settings: Settings) -> Report:
    """Eager, then compiled; the GPU is emptied in between."""
    if not settings.tiny and not torch.cuda.is_available():
        raise InputError(
            found="no CUDA device",
            required="one GPU with room for two copies of DiT-XL, about 50 GiB",
            remedy="run gpu_step where there is one; the other benchmarks need none",
        )
    rows: list[Row] = []
    samples: Samples = {}
    facts: dict[str, object] = {}
    for name in ("eager", "compiled"):
        config = run_config(settings, compiled=name == "compiled")
        measured, peak_bytes = in_own_process(measure, config, name, settings)
        samples |= measured
        layout = ParallelLayout(1, 1, 1)
        planned = memory_per_gpu(config, model_shape(config), layout, microbatches=1).device
        facts[f"{name} peak bytes"] = peak_bytes
        facts[f"{name} planned bytes"] = planned._asdict()
        ratio = peak_bytes / planned.total
        rows.append(counted(f"{name}: peak memory over plan", "bytes", ratio, MEMORY_AIM))
        rows += compare(
            samples,
            [
                Comparison(f"{name} step", "wall_s", *_names(name), STEP_AIM),
                Comparison(f"{name} step, host", "cpu_s", *_names(name)),
            ],
        )
    return Report(rows, samples, facts)


def run_config(settings: Settings, *, compiled: bool) -> RunConfig:
    """DiT-XL in bf16, one micro-batch a step."""
    microbatch = 2 if settings.tiny else MICROBATCH
    return load_run(
        CONFIG,
        [
            f"training.global_batch_images={microbatch}",
            f"training.microbatch_images={microbatch}",
            "training.precision=bf16",
            f"training.compile={str(compiled).lower()}",
            "training.optimizer.gradient_clip=1.0",
            f"training.device={'cuda' if torch.cuda.is_available() else 'cpu'}",
            *(TINY if settings.tiny else ()),
        ],
    )


def _names(name: str) -> tuple[str, str, tuple[str, str]]:
    return f"{name} engine", f"{name} plain", (f"{name} plain again", f"{name} plain")


def measure(run: RunConfig, name: str, settings: Settings) -> tuple[Samples, int]:
    """Samples of both sides, and the peak of the engine's steps."""
    if settings.tiny:
        # A compiler takes longer than all the rest of a dry run.
        torch.compiler.set_stance("force_eager")
    shape = model_shape(run)
    engine, ranks = workload.start_engine(shape, run.training, run.parallel)
    batches = workload.make_batches(shape, run.training, ranks.device)
    ours = workload.EngineSteps(engine, batches)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        _step(ours)
    peak_bytes = _peak_bytes()
    plain = workload.PlainSteps(shape, run.training, batches, ranks.device)
    engine_name, plain_name, (again, _) = _names(name)
    variants = {
        plain_name: lambda: _visit(plain),
        again: lambda: _visit(plain),
        engine_name: lambda: _visit(ours),
    }
    return interleave(variants, settings.rounds, warmup=1 if settings.tiny else 3), peak_bytes


def _step(steps: workload.EngineSteps | workload.PlainSteps) -> None:
    steps.gradients()
    steps.update()


def _visit(steps: workload.EngineSteps | workload.PlainSteps) -> Sample:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else None
    return timed(lambda: _step(steps), wait)


def _peak_bytes() -> int:
    """Without a GPU the process's own, so that a dry run has a number."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
