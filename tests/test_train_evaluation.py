"""Evaluation while training: the numbers of the command, on any ranks, and nothing else changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from evaluated_runs import ALL_METRICS, Data, drive_judged, evaluated, offline, stand_in, write_data
from rank_processes import run_ranks
from test_train_resume import assert_same_tensors
from tiny_judges import save_random_inception, save_tiny_clip
from tiny_runs import consumed, run_training, write_config
from train_driver import drive

from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.export.bundle import export_run
from dsr_scale.parallel import groups
from dsr_scale.telemetry.metrics import read_metrics
from dsr_scale.train.agreement import Agreement, Stopped
from dsr_scale.train.watch import FIRST_STEPS, StepTimes

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")

PREFIX = "evaluation/"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data"))


def train(
    folder: Path, overrides: list[str], *, ranks: int = 1, event: str = "none"
) -> list[tuple[str, int]]:
    """What became of each rank, and how many batches it judged."""
    config = write_config(folder)
    return run_ranks(drive_judged, ranks, config, folder / "ids.jsonl", overrides, event)


def numbers(folder: Path, step: int) -> dict[str, float]:
    """What metrics.jsonl says of the evaluation after a step."""
    return {
        name.removeprefix(PREFIX): value
        for record in read_metrics(folder / "run")
        if record["step"] == step
        for name, value in record.items()
        if name.startswith(PREFIX)
    }


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "run")]


@pytest.fixture(scope="module")
def alone(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in one process, evaluated after two steps and after four."""
    folder = tmp_path_factory.mktemp("alone")
    [(outcome, batches)] = train(folder, evaluated(data))
    assert outcome == "done"
    # Two at a time: five of the reference, once; six of the images, twice.
    assert batches == 5 + 2 * 6
    return folder


def as_offline(folder: Path, data: Data, step: int, metrics: str, *more: object) -> None:
    """Compares a run's numbers after a step with the command's for the bundle of that step.

    The size of a batch rounds the network's output, and with it now and then a pixel.
    """
    bundle = folder / f"bundle_{step}"
    export_run(folder / "run", bundle, step=step)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        expected = offline(bundle, data, metrics, *more)
    assert numbers(folder, step) == pytest.approx(expected, rel=1e-3)


def test_one_process_gives_the_numbers_of_the_command(alone: Path, data: Data) -> None:
    for step in (2, 4):
        as_offline(alone, data, step, ALL_METRICS, "--samples", 11, "--batch", 4)
    first, second = numbers(alone, 2), numbers(alone, 4)
    assert len(first) == 18
    changed = {name for name in first if first[name] != second[name]}
    assert {"fid", "sfid", "inception_score", "clip_score", "held_out_loss_t3"} <= changed


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.zero=3"]),
        (3, ["training.microbatch_images=2"]),
        (2, ["parallel.tp=2"]),
    ],
    ids=["two with ZeRO-3", "three, uneven", "one replica of two tensor ranks"],
)
def test_ranks_give_the_numbers_of_the_command(
    alone: Path, data: Data, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    overrides = [*evaluated(data), *layout, "training.steps=2"]
    outcomes = train(tmp_path, overrides, ranks=ranks)
    assert {outcome for outcome, _ in outcomes} == {"done"}
    # Everybody works, of 9 real images and of 11 drawn ones, two at a time.
    assert all(batches >= 9 // ranks // 2 + 11 // ranks // 2 for _, batches in outcomes)
    as_offline(tmp_path, data, 2, ALL_METRICS, "--samples", 11, "--batch", 4)
    assert numbers(tmp_path, 2) == pytest.approx(numbers(alone, 2), rel=1e-3)


@pytest.mark.extended
def test_networks_that_judge_as_the_published_ones_do(data: Data, tmp_path: Path) -> None:
    """Inception and CLIP with random weights, in files as they are published."""
    pytest.importorskip("torch_fidelity")
    judged = data._replace(weights=save_random_inception(tmp_path / "inception.pth"))
    clip = save_tiny_clip(tmp_path / "clip")
    wanted = "precision_recall, clip_score"
    overrides = [*evaluated(judged, wanted, images=7), f"evaluation.clip={clip}"]
    config = write_config(tmp_path)
    run_ranks(drive, 2, config, tmp_path / "ids.jsonl", 0, [*overrides, "training.steps=2"])
    export_run(tmp_path / "run", tmp_path / "bundle")
    expected = offline(tmp_path / "bundle", judged, wanted, "--samples", 7, "--clip", clip)
    assert expected["clip_score"] > 0
    assert numbers(tmp_path, 2) == pytest.approx(expected, rel=1e-3)


def test_ranks_with_nothing_to_do_wait_for_nobody(data: Data, tmp_path: Path) -> None:
    wanted = "clip_score, held_out_loss"
    overrides = [*evaluated(data, wanted, images=2), "evaluation.held_out_samples=1"]
    overrides += ["evaluation.seed=5", "training.microbatch_images=2", "training.steps=2"]
    outcomes = train(tmp_path, overrides, ranks=3)
    assert [outcome for outcome, _ in outcomes] == ["done"] * 3
    more = ("--samples", 2, "--held-out-samples", 1, "--seed", 5)
    as_offline(tmp_path, data, 2, wanted, *more)


def test_training_is_bit_identical_without(alone: Path, data: Data, tmp_path: Path) -> None:
    overrides = [*evaluated(data), "evaluation.every_steps=null"]
    run_training(tmp_path, *overrides)
    assert losses(tmp_path) == losses(alone)
    assert consumed(tmp_path) == consumed(alone)
    assert_same_tensors(tmp_path / "run", alone / "run", 4)


def test_a_signal_to_one_rank_ends_it_within_a_batch_and_the_run_makes_up_for_it(
    alone: Path, data: Data, tmp_path: Path
) -> None:
    """The step has no checkpoint but the one that the signal asks for."""
    overrides = [*evaluated(data), "checkpoint.every_steps=4", "evaluation.batch_images=1"]
    outcomes = train(tmp_path, overrides, ranks=2, event="signal")
    assert [outcome for outcome, _ in outcomes] == ["done", "done"]
    # Of ten batches each: rank 1 ends with its second, rank 0 as soon as it looks.
    assert outcomes[1][1] == 2 and outcomes[0][1] <= 4
    assert "stopped by a signal on another rank" in (tmp_path / "printed_0").read_text()
    assert complete_steps(tmp_path / "run") == [2]
    assert numbers(tmp_path, 2) == {}

    train(tmp_path, overrides)
    assert numbers(tmp_path, 2) == pytest.approx(numbers(alone, 2), rel=1e-3)
    assert numbers(tmp_path, 4) == pytest.approx(numbers(alone, 4), rel=1e-3)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)

    [(outcome, batches)] = train(tmp_path, overrides)
    assert (outcome, batches) == ("done", 0)


def test_a_rank_that_fails_ends_all(data: Data, tmp_path: Path) -> None:
    outcomes = train(tmp_path, evaluated(data), ranks=2, event="error")
    assert outcomes[1][0] == "ValueError: a broken judge"
    assert outcomes[0][0] == "RuntimeError: on another rank: ValueError('a broken judge')"


def test_training_goes_on_after_what_a_person_can_put_right(
    alone: Path, data: Data, tmp_path: Path
) -> None:
    """One evaluation fails on one rank; it is not logged, and the next is whole."""
    outcomes = train(tmp_path, evaluated(data), ranks=2, event="input error")
    assert [outcome for outcome, _ in outcomes] == ["done", "done"]
    assert numbers(tmp_path, 2) == {}
    assert numbers(tmp_path, 4) == pytest.approx(numbers(alone, 4), rel=1e-3)


def test_metrics_without_weights_on_a_rank_are_named_once_and_the_others_run(
    alone: Path, data: Data, tmp_path: Path
) -> None:
    outcomes = train(tmp_path, [*evaluated(data), "training.steps=2"], ranks=2, event="no weights")
    assert outcomes == [("done", 0), ("done", 0)]
    expected = {name: value for name, value in numbers(alone, 2).items() if "_" in name}
    del expected["inception_score"], expected["inception_score_std"]
    assert numbers(tmp_path, 2) == pytest.approx(expected, rel=1e-3)
    printed = (tmp_path / "printed_0").read_text()
    [line] = [line for line in printed.splitlines() if line.startswith("evaluation without")]
    assert " fid, inception_score, precision_recall, sfid: no Inception weights" in line
    assert "releases/download" in line and "evaluation.inception_weights" in line
    assert "evaluation without" not in (tmp_path / "printed_1").read_text()


def test_a_run_whose_metrics_all_lack_weights_does_not_start(data: Data, tmp_path: Path) -> None:
    [(outcome, _)] = train(tmp_path, evaluated(data, "fid, sfid"), event="no weights")
    assert outcome.startswith("InputError") and "releases/download" in outcome
    assert not (tmp_path / "ids.jsonl").exists()


def wait_and_be_asked() -> tuple[str, int]:
    """Rank 1 has nothing to do and is asked to stop while it waits; rank 0 would look 400 times."""
    ranks = groups.start("cpu")
    began_s = time.monotonic()
    looks = 0

    def asked() -> bool:
        return ranks.rank == 1 and time.monotonic() - began_s > 0.5

    def touch() -> None:
        nonlocal looks
        looks += 1

    agreement = Agreement(ranks, "waiting", asked=asked, touch=touch)

    def work() -> None:
        while ranks.rank == 0 and looks < 400:
            agreement.look()
            time.sleep(0.05)

    try:
        agreement.together(work)
    except Stopped:
        return "stopped", looks
    return "done", looks


def test_a_signal_to_a_rank_that_waits_reaches_those_that_work() -> None:
    (first, looks), (second, _) = run_ranks(wait_and_be_asked, 2)
    assert (first, second) == ("stopped", "stopped")
    assert looks < 400


def test_a_long_evaluation_is_no_hang() -> None:
    """Between two batches it may take as long as a start, and it is no part of the median step."""
    recovery = RecoveryConfig(hang_least_s=1, hang_multiple=2, start_timeout_s=50)
    times = StepTimes()
    for _ in range(FIRST_STEPS + 1):
        times.spend("forward", 0.1)
        times.spend("evaluation", 30.0)
        times.finish()
    assert times.limit_s("forward", recovery, outage_s=0) == 1
    assert times.limit_s("evaluation", recovery, outage_s=7) == 50
