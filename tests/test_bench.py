"""The benchmarks' arithmetic by comparison with plain formulas, and every benchmark once, tiny."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from torch import Tensor

from dsr_scale.base.boxes import Piece
from dsr_scale.base.errors import InputError
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.stages import pipeline_report
from tools.bench import bubble, latent_sources, workload
from tools.bench.__main__ import BENCHMARKS, benchmark
from tools.bench.protocol import (
    Aim,
    Comparison,
    Row,
    Sample,
    Settings,
    compare,
    counted,
    interleave,
    interval,
    timed,
)
from tools.bench.report import as_json, environment

TINY_SHAPE = {"width": 32, "depth": 2, "heads": 2, "grid": 4, "registers": 4}
STEPS = 3


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 11, 15, 40])
def test_interval_is_the_innermost_that_holds_the_median(count: int) -> None:
    values = [float(value) for value in range(count)]
    low, middle, high = interval([*values[::2], *values[1::2]])
    assert middle == statistics.median(values)
    assert low == count - 1 - high

    def coverage(place: int) -> float:
        """Probability that between `place` and n − place of n values lie below the true median."""
        return sum(math.comb(count, k) for k in range(place, count - place + 1)) / 2**count

    place = int(low) + 1
    if count < 6:
        assert (low, high) == (0, count - 1)
    else:
        assert coverage(place) >= 0.95 > coverage(place + 1)


def test_a_drifting_machine_favours_nobody() -> None:
    clock = 100.0
    visits: list[str] = []

    def variant(name: str, work: float) -> Sample:
        nonlocal clock
        clock += 1.0
        visits.append(name)
        return {"wall_s": clock + work}

    works = {"a": 0.0, "twin": 0.0, "b": 50.0}
    samples = interleave(
        {name: lambda name=name, work=work: variant(name, work) for name, work in works.items()},
        rounds=9,
        warmup=1,
    )
    assert visits[:12] == ["a", "twin", "b", "b", "twin", "a"] * 2
    assert {name: len(found) for name, found in samples.items()} == {"a": 9, "twin": 9, "b": 9}
    for a, twin, b in zip(*samples.values(), strict=True):
        assert a == twin
        assert b["wall_s"] - a["wall_s"] == 50


def rows(twin: list[float], variant: list[float], aim: Aim | None = None) -> list[Row]:
    """The A/A row and the row of `variant`, for a reference that always takes 2."""
    columns = {"a": [1.0] * len(twin), "twin": twin, "b": variant}
    samples = {name: [{"cpu_s": 2 * v} for v in values] for name, values in columns.items()}
    return compare(samples, [Comparison("b over a", "cpu_s", "b", "a", ("twin", "a"), aim)])


def test_an_effect_within_the_spread_of_the_twins_is_noise() -> None:
    # The interval of nine values leaves out one at each end: the 1.5 does not count.
    twin = [0.98, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.04, 1.5]
    same, slower = rows(twin, [1.03] * 9)
    assert (same.effect, same.ratio, same.spread) == ("A/A", 1.0, pytest.approx(0.04))
    assert (slower.ratio, slower.effect) == (pytest.approx(1.03), "noise")
    assert rows(twin, [1.25] * 9)[1].effect == "+25.0 %"
    assert rows(twin, [0.9] * 9)[1].effect == "-10.0 %"
    # A median counts, not a mean: one visit in which something else ran changes nothing.
    assert rows([1.0] * 9, [1.1] * 8 + [90.0])[1].ratio == pytest.approx(1.1)


def test_aims() -> None:
    cases = [
        (Aim(high=1.25), 1.25, True, "≤ 1.25"),
        (Aim(high=1.25), 1.26, False, "≤ 1.25"),
        (Aim(low=0.8), 0.79, False, "≥ 0.8"),
        (Aim(0.95, 1.05), 0.96, True, "0.95 to 1.05"),
    ]
    for aim, ratio, met, text in cases:
        row = counted("peak", "bytes", ratio, aim)
        assert (row.meets_aim, str(aim)) == (met, text)
        assert row.effect == f"{100 * (ratio - 1):+.1f} %", "what is counted has no noise"
    assert counted("peak", "bytes", 1.0).meets_aim is None


def test_timed_counts_work_and_not_sleep() -> None:
    order: list[str] = []
    sample = timed(lambda: order.append("work"), lambda: order.append("wait"))
    assert order == ["wait", "work", "wait"]
    assert sample.keys() == {"wall_s", "cpu_s"}


def engine_states(precision: str) -> list[dict[str, Tensor]]:
    """Weights and average before and after some steps of the engine as benchmarks run it."""
    shape = workload.class_shape(**TINY_SHAPE)
    training = workload.training_config(images=4, microbatch=2, device="cpu", precision=precision)
    engine, ranks = workload.start_engine(shape, training, ParallelConfig())

    def state() -> dict[str, Tensor]:
        kinds = ("weights", engine.main_average)
        pieces: list[Piece] = list(engine.pieces(owned=True, kinds=kinds))
        return {piece.name: piece.tensor.reshape(piece.shape).clone() for piece in pieces}

    before = state()
    steps = workload.EngineSteps(engine, workload.make_batches(shape, training, ranks.device))
    for _ in range(STEPS):
        steps.gradients()
        steps.update()
    return [before, state()]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-6)])
def test_the_plain_loop_does_what_the_engine_does(precision: str, tolerance: float) -> None:
    before, after = run_ranks(engine_states, 1, precision)[0]
    cpu = torch.device("cpu")
    shape = workload.class_shape(**TINY_SHAPE)
    training = workload.training_config(images=4, microbatch=2, device="cpu", precision=precision)
    batches = workload.make_batches(shape, training, cpu)
    plain = workload.PlainSteps(shape, training, batches, cpu)
    with torch.no_grad():
        # In bf16 the engine may start from weights that were rounded.
        for (name, master), average in zip(plain.masters.items(), plain.averages, strict=True):
            torch.testing.assert_close(before[f"weights.{name}"], master, atol=1e-2, rtol=0)
            master.copy_(before[f"weights.{name}"])
            average.copy_(master)
    for _ in range(STEPS):
        plain.gradients()
        plain.update()
    moved = 0
    for (name, weight), average in zip(plain.masters.items(), plain.averages, strict=True):
        moved += int(not torch.equal(weight, before[f"weights.{name}"]))
        for kind, expected in (("weights", weight.detach()), ("ema_9999", average)):
            torch.testing.assert_close(
                after[f"{kind}.{name}"], expected, atol=tolerance, rtol=1e-5, msg=name
            )
    assert moved > 10


@pytest.mark.parametrize("layout", bubble.LAYOUTS)
def test_bubble_formula(layout: bubble.Layout) -> None:
    shape = workload.class_shape(width=8, depth=bubble.BLOCKS, heads=1, grid=2, registers=0)
    planned = pipeline_report(
        shape,
        pp=bubble.RANKS,
        virtual_stages=layout.virtual_stages,
        microbatches=layout.micro_batches,
    )
    assert layout.formula == planned.bubble
    # Two ranks of 10 s each are busy in all but the bubble, and a second of that is no sleep.
    busy_s = 2 * 10 * (1 - layout.formula)
    shares = bubble._idle({"slept_s": busy_s - 1, "worked_s": 1.0, "wall_s": 10.0})
    assert shares[bubble.IDLE] == pytest.approx(layout.formula)
    assert shares[bubble.NOT_ASLEEP] == pytest.approx(layout.formula + 1 / 20)


def test_cpu_time_is_that_of_all_processes_at_rest() -> None:
    work = "import time\nwhile time.process_time() < 0.6: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE) as process:
        clock = latent_sources._cpu_clock(process.pid)
        before_s = time.process_time()
        both_s = latent_sources._cpu_at_rest_s([clock])
        assert both_s - before_s >= 0.6
        assert both_s == pytest.approx(time.clock_gettime(clock) + time.process_time(), abs=0.05)
        process.communicate(b"\n")


@pytest.mark.parametrize(
    ("gpus", "metric", "high"), [(0, "cpu_s", 1.1), (1, "wall_s", 1.1), (2, "wall_s", 1)]
)
def test_a_server_is_to_be_no_slower_where_it_has_a_device(
    gpus: int, metric: str, high: float
) -> None:
    aims = {(each.name, each.metric): each.aim for each in latent_sources._comparisons(gpus)}
    assert {key for key, aim in aims.items() if aim} == {("cache", metric), ("service", metric)}
    assert aims["service", metric] == Aim(high=high)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    report = benchmark(name).run(Settings(rounds=1, scratch=tmp_path, tiny=True))
    assert any(row.is_twin for row in report.rows)
    assert any(row.aim is not None for row in report.rows)
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in report.rows)
    told = environment()
    content = json.loads(as_json(name, report, told, told, rounds=1))
    assert [row["ratio"] for row in content["rows"]] == [row.ratio for row in report.rows]
    assert content["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("gpu_")])
def test_gpu_benchmarks_are_refused_without_a_gpu(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        benchmark(name).run(Settings(rounds=9, scratch=tmp_path))
