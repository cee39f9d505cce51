"""Comparisons by hand arithmetic, and one of two tiny runs through the commands that it is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rank_processes import ForkedCommand
from tiny_runs import CONFIG

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.outlier_findings import load_findings
from dsr_scale.export.pipeline import load
from tools.comparison.compare import compare
from tools.comparison.measures import (
    SAMPLES_FILE,
    Questions,
    check_questions,
    outlier_summary,
)
from tools.comparison.report import REPORT_FILE
from tools.comparison.runs import PlannedRun, Size, plan_runs, train
from tools.comparison.table import Comparison, Estimate

ABLATION = Path(__file__).parents[1] / "configs" / "ablation"
QUESTIONS = Questions(
    prompts=("lobster", "taxi"),
    recognition_prompts=2,
    held_out="package:emoji",
    held_out_samples=4,
    outlier_images=2,
    timesteps="0.5",
    device="cpu",
)


def write_runs(folder: Path, **variants: dict[str, object]) -> list[Path]:
    """A run file for each variant: two blocks of width 32 on eight emoji, two steps."""
    files = []
    for name, model in variants.items():
        content = {
            **CONFIG,
            "data": {**CONFIG["data"], "max_samples": 8, "workers": 0},
            "model": {**CONFIG["model"], "depth": 2, "registers": {"count": 0}, **model},
            "training": {**CONFIG["training"], "steps": 2},
            "tracking": {**CONFIG["tracking"], "norms_every_steps": None},
            "grid": {"sampling": {"steps": 2}},
        }
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    return files


class Trainer:
    """Forks `dsr-scale`, and remembers what it was asked for; a run of `failing` ends at once."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.trained: list[str] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        command, file = words
        assert command == "train"
        name = yaml.safe_load(Path(file).read_text())["name"]
        self.trained.append(name)
        if self.failing and name.startswith(self.failing):
            log.write_text("reading\nfound: no good weather\n")
            return 3
        process = ForkedCommand(*words)
        log.write_text(process.finish(timeout_s=120))
        return process.returncode or 0


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PlannedRun], Trainer]:
    folder = tmp_path_factory.mktemp("ablate")
    files = write_runs(folder, plain={}, registers={"registers": {"count": 4}})
    runs = plan_runs(files, 1, folder / "out")
    trainer = Trainer()
    with pytest.MonkeyPatch.context() as patched:
        # Its figures take longer than everything else here.
        patched.setattr(
            "dsr_scale.evaluate.outlier_report.write_report",
            lambda _found, out: out / "report.html",
        )
        assert compare(runs, QUESTIONS, folder / "out", title="tiny", trainer=trainer) == {}
    return folder, runs, trainer


def test_means_errors_and_paired_differences_are_those_of_a_calculator() -> None:
    values = {"first": {0: 1.0, 1: 3.0, 2: 8.0}, "second": {0: 2.0, 2: 12.0}}
    records = [
        {"variant": variant, "seed": seed, "metrics": {"loss": value}}
        for variant, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    table = Comparison.of(records, ["first", "second"])
    first, second = table.estimates["loss"]["first"], table.estimates["loss"]["second"]
    assert (first.mean, first.n) == (4.0, 3)
    # Deviations −3, −1, 4: variance 26/2 = 13, and √(13/3).
    assert first.standard_error == pytest.approx(math.sqrt(13 / 3))
    assert (second.mean, second.n, second.standard_error) == (7.0, 2, pytest.approx(5.0))
    difference = table.difference("loss", "second")
    assert difference is not None
    # Seeds 0 and 2 differ by 1 and 4, whose mean's error is 1.5; not by the means' 3.
    assert difference.values == {0: 1.0, 2: 4.0}
    assert (difference.mean, difference.standard_error) == (2.5, pytest.approx(1.5))
    assert table.difference("loss", "first") is None
    content = json.loads(json.dumps(table.to_json()))["loss"]["second"]
    assert content["by_seed"] == {"0": 2.0, "2": 12.0}
    assert content["difference"]["standard_error"] == pytest.approx(1.5)
    row = table.markdown().splitlines()[2]
    assert row == "| `loss` | 4 ± 2.1 (n=3) | 7 ± 5 (n=2) | 2.5 ± 1.5 (n=2) |"
    assert str(Estimate({0: 0.5})) == "0.5 (n=1)" and Estimate({0: 0.5}).standard_error is None


def test_outliers_are_summed_up_over_blocks_without_the_output() -> None:
    nan = math.nan
    grid = np.array([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    measures: dict[str, np.ndarray] = {
        "outlier_ratio": grid,
        "max_over_median": grid,
        "max_over_median_without_channels": grid,
        "attention_top_norm_per_token": np.array([[nan, 4.0], [2.0, nan], [nan, nan]]),
        "register_over_median": np.full((3, 2), nan),
    }
    summary = outlier_summary(measures)
    assert summary["outlier_ratio_mean"] == 3.0
    assert summary["outlier_ratio_largest"] == 6.0
    assert summary["attention_top_norm_per_token_largest"] == 4.0
    assert "register_over_median_largest" not in summary


def test_numbers_are_those_of_the_commands_and_samples_those_of_the_bundle(
    compared: tuple[Path, list[PlannedRun], Trainer],
) -> None:
    folder, runs, _ = compared
    saved = json.loads((folder / "out" / "comparison.json").read_text())
    for one in runs:
        evaluation = json.loads((one.place / "evaluation" / "evaluation.json").read_text())
        for metric in ("held_out_loss", "held_out_loss_t7"):
            shown = saved["metrics"][metric][one.variant]["by_seed"]["0"]
            assert shown == evaluation["metrics"][metric]
        (found,) = load_findings(one.place / "outliers")
        assert found.name == f"{one.variant}_seed_0"
        largest = saved["metrics"]["max_over_median_largest"][one.variant]["mean"]
        assert largest == found.measures["max_over_median"][:-1].max()
        drawn = load(one.bundle, device="cpu").sample(["lobster", "taxi"], seed=1)
        assert torch.equal(torch.from_numpy(np.load(one.place / SAMPLES_FILE)), drawn)
    by_variant = saved["metrics"]["held_out_loss"]
    change = by_variant["registers"]["mean"] - by_variant["plain"]["mean"]
    assert by_variant["registers"]["difference"]["mean"] == pytest.approx(change)
    assert "register_over_median_largest" in saved["metrics"]
    assert set(saved["not_computed"]) == {"fid", "clip_score"}
    page = (folder / "out" / REPORT_FILE).read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 3


def test_finished_runs_are_neither_trained_nor_measured_again(
    compared: tuple[Path, list[PlannedRun], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, runs, trainer = compared
    assert trainer.trained == ["plain-0", "registers-0"]
    before = (folder / "out" / "comparison.json").read_text()
    monkeypatch.setattr("tools.comparison.measures.here", pytest.fail)
    again = Trainer()
    compare(runs, QUESTIONS, folder / "out", title="tiny", trainer=again)
    assert again.trained == []
    assert (folder / "out" / "comparison.json").read_text() == before


def test_a_run_that_fails_is_named_and_the_others_go_on(
    compared: tuple[Path, list[PlannedRun], Trainer],
) -> None:
    folder, _, _ = compared
    out = folder / "out"
    files = write_runs(folder, plain={}, broken={"heads": 4}, registers={"registers": {"count": 4}})
    trainer = Trainer(failing="broken")
    failures = compare(plan_runs(files, 1, out), QUESTIONS, out, title="tiny", trainer=trainer)
    assert trainer.trained == ["broken-0"]
    assert list(failures) == ["broken, seed 0"]
    assert "status 3" in failures["broken, seed 0"] and "no good weather" in str(failures)
    saved = json.loads((out / "comparison.json").read_text())
    assert saved["failures"] == failures
    assert set(saved["metrics"]["held_out_loss"]) == {"plain", "registers"}


def test_an_unfinished_run_is_given_to_the_trainer_again(tmp_path: Path) -> None:
    (one,) = plan_runs(write_runs(tmp_path, plain={}), 1, tmp_path / "out")
    stopped = Trainer(failing="plain")
    assert "status 3" in str(train(one, stopped))
    assert "status 3" in str(train(one, stopped))
    assert stopped.trained == ["plain-0", "plain-0"]


@pytest.mark.parametrize(
    ("variants", "named"),
    [
        ({"good": {}, "bad": {"width": 33}}, "bad.yaml"),
        ({"good": {}, "bad": {"registers": {"cuont": 4}}}, "cuont"),
        ({"good": {}, "twin": {}}, "good and twin"),
    ],
    ids=["does not fit", "unknown key", "same run"],
)
def test_what_is_wrong_with_any_file_is_told_before_training(
    tmp_path: Path, variants: dict[str, dict[str, object]], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        plan_runs(write_runs(tmp_path, **variants), 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_data_and_runs_of_other_settings_are_told_before_training(
    tmp_path: Path, compared: tuple[Path, list[PlannedRun], Trainer]
) -> None:
    files = write_runs(tmp_path, plain={})
    with pytest.raises(InputError, match="nowhere"):
        plan_runs(files, 1, tmp_path / "out", overrides=["data.shards=nowhere"])
    folder, _, _ = compared
    with pytest.raises(InputError, match="learning_rate"):
        overrides = ["training.optimizer.learning_rate=3e-3"]
        plan_runs(write_runs(folder, plain={}), 1, folder / "out", overrides=overrides)


@pytest.mark.parametrize(
    ("questions", "named"),
    [
        ({"held_out": "nowhere"}, "nowhere"),
        ({"outlier_images": 9}, "8 samples"),
        ({"reference": "images"}, "both, for FID"),
        ({"clip": "a model"}, "0 images to draw"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_questions_that_cannot_be_answered_are_told_before_training(
    tmp_path: Path, questions: dict[str, Any], named: str
) -> None:
    (one,) = plan_runs(write_runs(tmp_path, plain={}), 1, tmp_path / "out")
    check_questions(Questions(outlier_images=8), one.run)
    with pytest.raises(InputError, match=named):
        check_questions(Questions(**{"outlier_images": 8, **questions}), one.run)


def test_small_keeps_depth_and_starts_and_the_share_of_registers(tmp_path: Path) -> None:
    names = (
        "baseline",
        "deeper_baseline",
        "diffusion_registers",
        "count_4",
        "count_144",
        "start_10",
    )
    files = [ABLATION / f"{name}.yaml" for name in names]
    runs = plan_runs(files, 1, tmp_path, size=Size.small, steps=7)
    registers = {one.variant: one.run.model.registers for one in runs}
    # 256 image tokens became 64.
    assert [registers[name].count for name in names] == [0, 0, 9, 1, 36, 9]
    assert registers["start_10"].start == 10 and registers["count_144"].start is None
    depths = {one.variant: one.run.model.depth for one in runs}
    assert depths["deeper_baseline"] == 13
    assert all(one.run.model.preset == "DiT-B" for one in runs)
    assert {one.run.training.steps for one in runs} == {7}
    with pytest.raises(InputError, match="baseline and encoder_registers"):
        twin = ABLATION / "encoder_registers.yaml"
        plan_runs([files[0], twin], 1, tmp_path, size=Size.small)
