"""What a run measures of itself: losses by timestep, token norms, times, against plain recomputation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import SHAPE, example, start_engine
from rank_processes import ForkedCommand, run_ranks
from tiny_runs import checkpoint_tensors, write_config
from train_driver import drive

from dsr_scale.config import costs
from dsr_scale.config.derive import ModelShape, model_shape
from dsr_scale.config.load import load_run
from dsr_scale.job.attempt import JOB_VARIABLE, Attempt
from dsr_scale.telemetry.measures import TimestepLosses, loss_metrics
from dsr_scale.telemetry.metrics import read_metrics
from dsr_scale.telemetry.token_norms import NormProbe, TokenNorms, norm_metrics
from dsr_scale.train.clock import OTHER, StepClock
from dsr_scale.train.diffusion_measures import rows_gatherer
from dsr_scale.train.objective import Example, Watched
from dsr_scale.train.report import plain_line, tracker_config

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")

BUCKETS = 3
GLOBAL_IDS = range(8)
CPU = torch.device("cpu")
BODY, HEAD = [f"blocks.{index}" for index in range(4)], ["head.0", "head.1"]

# Some tokens become outliers: a share of 0 everywhere would agree with anything.
OUTLYING = 30.0


# Losses and token norms of one step, on any layout.


def measured(
    shape_values: dict[str, Any],
    parallel: dict[str, Any],
    training: dict[str, Any],
    microbatch: int,
) -> tuple[float, dict[str, float]]:
    """The step's loss and its metrics, of all ranks together; call it on every rank."""
    shape = ModelShape.model_validate(shape_values)
    engine, ranks = start_engine(shape, parallel, training, microbatch=microbatch)
    network = engine.network
    losses = TimestepLosses(BUCKETS, CPU)
    norms = TokenNorms(
        [network.block_name(index) for index in range(network.total_blocks)],
        BUCKETS,
        CPU,
        whole_rows=rows_gatherer(ranks.tensor) if parallel.get("sp") else None,
    )
    examples = own_examples(shape, ranks.data.rank, ranks.data.size, microbatch)
    loss = engine.forward_backward(Watched(examples, losses.add), probes=norms.probe)
    losses.end_step(skipped=engine.step(loss, step=0, learning_rate=1e-2)[2])
    both = []
    for sums in (losses.take(), norms.take()):
        both.append(torch.tensor(ranks.sum_on_host(sums.flatten().tolist())).view(sums.shape))
    return float(loss), loss_metrics(both[0].tolist()) | norm_metrics(norms.blocks, both[1])


def own_examples(shape: ModelShape, rank: int, size: int, microbatch: int) -> list[Example]:
    """This replica's share of the eight samples, some of whose latent cells stand out."""
    share = len(GLOBAL_IDS) // size
    first = rank * share
    found = []
    for start in range(first, first + share, microbatch):
        made = example(shape, list(range(start, start + microbatch)))
        made.latents[:, :, 0, :2] *= OUTLYING
        found.append(made)
    return found


def expected_by_one_process(shape_values: dict[str, Any]) -> dict[str, float]:
    """The same with `NormProbe` and plain arithmetic, image by image on a whole network."""
    shape = ModelShape.model_validate(shape_values)
    engine, _ = start_engine(shape, {}, {})
    values: dict[str, list[float]] = {}
    for one in own_examples(shape, 0, 1, 1):
        latents, timesteps = one.inputs()
        probe = NormProbe()
        with torch.no_grad():
            output = engine.network(latents, timesteps, one.condition, probe=probe)
            loss = float(one.loss(output))
        bucket = min(int(float(timesteps) * BUCKETS), BUCKETS - 1)
        values.setdefault(f"loss_t{bucket}", []).append(loss)
        for name, block in probe.blocks.items():
            for statistic in ("outlier_ratio", "max_over_median", "register_over_median"):
                value = getattr(block, statistic)
                if value is not None:
                    values.setdefault(f"{statistic}/{name}/t{bucket}", []).append(value)
    means = {name: sum(each) / len(each) for name, each in values.items()}
    for statistic in ("outlier_ratio", "max_over_median", "register_over_median"):
        means[statistic] = max(v for name, v in means.items() if name.startswith(statistic + "/"))
    return means


def blocks_with(metrics: dict[str, Any], statistic: str) -> set[str]:
    """Blocks of which this statistic is told."""
    return {name.split("/")[1] for name in metrics if name.startswith(statistic + "/")}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    return run_ranks(expected_by_one_process, 1, SHAPE)[0]


def test_the_reference_has_outliers_registers_and_every_bucket(expected: dict[str, float]) -> None:
    assert 0 < expected["outlier_ratio"] < 1
    assert {f"loss_t{bucket}" for bucket in range(BUCKETS)} < expected.keys()
    # Registers enter at block 2 of the body and are in all of the head.
    assert blocks_with(expected, "max_over_median") == {*BODY, *HEAD}
    assert blocks_with(expected, "register_over_median") == {"blocks.2", "blocks.3", *HEAD}


@pytest.mark.parametrize(
    ("ranks", "parallel", "training", "microbatch"),
    [
        (1, {}, {}, 1),
        (1, {}, {"recompute": "full"}, 4),
        (1, {}, {"recompute": "selective"}, 2),
        (2, {"zero": 1}, {}, 2),
        (2, {"zero": 3}, {}, 1),
        (2, {"tp": 2}, {}, 2),
        (2, {"tp": 2, "sp": True}, {}, 2),
        (2, {"pp": 2}, {}, 2),
        (2, {"pp": 2, "virtual_stages": 2}, {"recompute": "full"}, 1),
        (8, {"tp": 2, "sp": True, "pp": 2}, {}, 1),
    ],
    ids=str,
)
def test_every_layout_measures_what_one_process_does(
    ranks: int,
    parallel: dict[str, Any],
    training: dict[str, Any],
    microbatch: int,
    expected: dict[str, float],
) -> None:
    for loss, metrics in run_ranks(measured, ranks, SHAPE, parallel, training, microbatch):
        assert metrics == pytest.approx(expected, rel=1e-4)
        assert loss == pytest.approx(weighted_mean_by_samples(metrics), rel=1e-5)


def weighted_mean_by_samples(metrics: dict[str, float]) -> float:
    """The mean of bucket losses, weighted by how many of the eight samples lie in each."""
    shape = ModelShape.model_validate(SHAPE)
    _, timesteps = example(shape, list(GLOBAL_IDS)).inputs()
    counts = [0] * BUCKETS
    for t in timesteps.tolist():
        counts[min(int(t * BUCKETS), BUCKETS - 1)] += 1
    return sum(n * metrics[f"loss_t{k}"] for k, n in enumerate(counts) if n) / len(GLOBAL_IDS)


def test_text_in_context_is_no_image_token() -> None:
    shape = {**SHAPE, "conditioning": {"kind": "in_context"}}
    reference = run_ranks(expected_by_one_process, 1, shape)[0]
    (_, metrics), *_ = run_ranks(measured, 2, shape, {"tp": 2, "sp": True}, {}, 2)
    assert metrics == pytest.approx(reference, rel=1e-4)


def test_a_skipped_step_leaves_no_loss_behind() -> None:
    losses = TimestepLosses(2, CPU)
    for value, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        losses.add(torch.tensor([0.2, 1.0]), torch.tensor([value, 10 * value]))
        losses.end_step(torch.tensor(skipped))
    assert losses.take().tolist() == [[2.0, 4.0], [2.0, 40.0]]
    assert losses.take().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_bucket_without_samples_is_left_out() -> None:
    losses = TimestepLosses(3, CPU)
    losses.add(torch.tensor([0.5]), torch.tensor([2.0]))
    losses.end_step(torch.tensor(0.0))
    assert loss_metrics(losses.take().tolist()) == {"loss_t1": 2.0}


# Times.


def test_sections_sum_to_the_elapsed_time_and_the_innermost_counts() -> None:
    begun: list[str] = []
    clock = StepClock(CPU, on_section=begun.append)
    started_s = time.perf_counter()
    time.sleep(0.02)
    with clock.section("forward"):
        time.sleep(0.03)
        with clock.section("encode"):
            time.sleep(0.05)
        time.sleep(0.01)
    with clock.section("encode"):
        time.sleep(0.04)
    times_s = clock.take()
    elapsed_s = time.perf_counter() - started_s
    assert begun == ["forward", "encode", "encode"]
    assert times_s.keys() == {"forward", "encode", OTHER}
    assert sum(times_s.values()) == pytest.approx(elapsed_s, abs=2e-3)
    assert 0.02 <= times_s[OTHER] < times_s["forward"] < times_s["encode"]
    assert times_s["forward"] >= 0.04 and times_s["encode"] >= 0.09
    assert clock.take()[OTHER] < 0.01, "what was taken counts again"


def test_a_section_that_fails_is_closed() -> None:
    clock = StepClock(CPU)
    with pytest.raises(ValueError, match="x"), clock.section("grid"):
        raise ValueError("x")
    clock.take()
    time.sleep(0.01)
    assert clock.take().keys() == {OTHER}


class QueuedEvent:
    """A CUDA event on a GPU whose queue is `behind` the host; time is counted in milliseconds."""

    now_ms = 0.0
    done_ms = 0.0
    synchronized = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at_ms = QueuedEvent.now_ms

    def query(self) -> bool:
        return self.at_ms <= QueuedEvent.done_ms

    def synchronize(self) -> None:
        QueuedEvent.synchronized += 1
        QueuedEvent.done_ms = max(QueuedEvent.done_ms, self.at_ms)

    def elapsed_time(self, end: QueuedEvent) -> float:
        assert end.query(), "read before it happened"
        return end.at_ms - self.at_ms


def test_on_a_gpu_nothing_waits_before_the_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", QueuedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = StepClock(torch.device("cuda", 0))

    def work(milliseconds: float) -> None:
        QueuedEvent.now_ms += milliseconds

    for _ in range(50):
        with clock.section("forward"):
            work(3)
        work(1)
        QueuedEvent.done_ms = QueuedEvent.now_ms - 10  # the queue is ten milliseconds behind
    assert QueuedEvent.synchronized == 0
    assert len(clock._unread) < 10, "events pile up"
    assert clock.take() == pytest.approx({"forward": 0.15, OTHER: 0.05})
    assert QueuedEvent.synchronized == 1


@pytest.mark.gpu
def test_on_a_real_gpu_work_counts_where_it_was_queued() -> None:
    device = torch.device("cuda", 0)
    matrix = torch.randn(4096, 4096, device=device)
    torch.mm(matrix, matrix)
    torch.cuda.synchronize()
    clock = StepClock(device)
    started_s = time.perf_counter()
    with clock.section("forward"):
        for _ in range(50):
            torch.mm(matrix, matrix)
    with clock.section("data"):
        pass
    times_s = clock.take()
    assert sum(times_s.values()) == pytest.approx(time.perf_counter() - started_s, rel=0.1)
    assert times_s["data"] < 0.05 * times_s["forward"]


# Whole runs.


TIMES = ("data_wait", "encode", "optimizer", "agree", "checkpoint", "grid", "other")
RUN = (
    "model.heads=4",
    "model.head={width: 48, depth: 2, heads: 4}",
    "data.workers=0",
    "training.microbatch_images=2",
    "training.steps=4",
    "checkpoint.every_steps=2",
    "tracking.log_every_steps=2",
    "tracking.norms_every_steps=4",
    "tracking.timestep_buckets=2",
)


def records(folder: Path, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """The log lines of a run on so many ranks."""
    folder.mkdir()
    config = write_config(folder)
    run_ranks(drive, ranks, config, folder / "ids.jsonl", 0, [*RUN, *overrides])
    return read_metrics(folder / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records(tmp_path_factory.mktemp("measures") / "alone", 1)


def test_log_lines_of_a_run(alone: list[dict[str, Any]], tmp_path: Path) -> None:
    assert [record["step"] for record in alone] == [2, 4]
    for record in alone:
        times = [record[f"time/{name}_s"] for name in (*TIMES, "forward", "backward")]
        assert sum(times) == pytest.approx(record["step_s"])
        assert record["time/forward_s"] > 0 and record["time/backward_s"] > 0
        assert record["images_per_s"] == pytest.approx(8 / record["step_s"])
        assert record["images_per_s_per_device"] == record["images_per_s"]
        shape = model_shape(load_run(write_config(tmp_path), RUN))
        tflops = record["images_per_s"] * costs.training_flops(shape) / 1e12
        assert record["tflops_per_device"] == pytest.approx(tflops)
        assert not {"mfu_measured", "mfu_datasheet"} & record.keys(), "of a CPU"
        assert 0.05 < record["memory_gib"] < 20
        assert record["restarts"] == 0
        losses = sorted(record[f"loss_t{bucket}"] for bucket in (0, 1))
        assert losses[0] <= record["loss"] <= losses[1]
    # The save after step 2 falls into the second interval.
    assert alone[0]["time/checkpoint_s"] == 0 < alone[1]["time/checkpoint_s"]
    assert blocks_with(alone[0], "max_over_median") == set()
    assert blocks_with(alone[1], "max_over_median") == {*BODY, *HEAD}


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tp=2", "parallel.sp=true"),
        ("parallel.pp=2",),
        ("parallel.zero=2",),
    ],
    ids=str,
)
def test_a_run_on_two_ranks_logs_what_one_does(
    layout: tuple[str, ...], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = records(tmp_path / "two", 2, *layout)
    measured_names = ("loss", "outlier_ratio", "max_over_median", "register_over_median")
    for ours, theirs in zip(found, alone, strict=True):
        expected = {name: v for name, v in theirs.items() if name.startswith(measured_names)}
        assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert ours["images_per_s_per_device"] == pytest.approx(ours["images_per_s"] / 2)
        passes = ("forward_backward",) if "pp=2" in layout[0] else ("forward", "backward")
        times = {name for name in ours if name.startswith("time/")}
        assert times == {f"time/{name}_s" for name in (*TIMES, *passes)}
        assert sum(ours[name] for name in times) == pytest.approx(ours["step_s"])


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    states = []
    for name, often in (("never", "null"), ("always", "1")):
        records(tmp_path / name, 1, f"tracking.norms_every_steps={often}", "training.steps=2")
        states.append(checkpoint_tensors(tmp_path / name / "run", 2))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_plain_line_names_a_wait_for_data_over_a_tenth() -> None:
    metrics = {"loss": 0.5, "images_per_s": 12.34, "step_s": 2.0, "time/data_wait_s": 0.2}
    assert plain_line(3, 9, metrics) == "step 3/9  loss 0.5000  12.3 images/s"
    metrics["time/data_wait_s"] = 0.5
    assert plain_line(3, 9, metrics) == "step 3/9  loss 0.5000  12.3 images/s  data wait 25 %"


def test_a_restarted_job_says_so(tmp_path: Path) -> None:
    attempt = Attempt("77", 2, "node n3 lost [ok]", 1, ("n1", "n2"), None, "2026-01-01T00:00:00")
    attempt.write(tmp_path / "job")
    process = ForkedCommand(
        *("train", str(write_config(tmp_path)), *RUN, "training.steps=2"),
        environment={JOB_VARIABLE: str(tmp_path / "job")},
    )
    printed = process.finish(120)
    assert process.returncode == 0, printed
    assert printed.count("attempt 2 of job 77, after: node n3 lost [ok]") == 1
    (line,) = (line for line in printed.splitlines() if line.startswith("step 2/2"))
    assert "loss" in line and "images/s" in line
    assert read_metrics(tmp_path / "run")[-1]["restarts"] == 2
    run = load_run(write_config(tmp_path))
    expected = {"id": "77", "restarts": 2, "reason": "node n3 lost [ok]"}
    assert tracker_config(run, attempt)["job"] == expected
    assert "job" not in tracker_config(run, None)


# Ceilings.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_which_gpu_a_device_name_means(name: str, kind: str | None) -> None:
    assert costs.gpu_kind(name) == kind
    assert kind is None or kind in costs.DATASHEET_CEILING_TFLOPS


def test_measured_ceilings_are_of_known_gpus_and_below_the_data_sheet() -> None:
    for kind, measured_tflops in costs.MEASURED_CEILING_TFLOPS.items():
        assert measured_tflops < costs.DATASHEET_CEILING_TFLOPS[kind]
