"""`evaluation:` in a run file: what is refused before anything starts, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.cli.plan import plan_report
from dsr_scale.config.checks import check_run
from dsr_scale.config.evaluation import IMAGES_NEEDED, OF_REFERENCE, MetricName
from dsr_scale.config.load import load_run
from dsr_scale.config.problems import ConfigError
from dsr_scale.evaluate import metrics

BASE = """
name: t
directory: runs/t
data: {shards: shards, resolution: 64}
encoders: {image: {kind: pixels, patch: 8}, text: {kind: bytes}}
model: {width: 64, depth: 4, heads: 4}
training: {global_batch_images: 32, microbatch_images: 4}
"""
ALL = "[fid, sfid, inception_score, precision_recall, clip_score, held_out_loss]"
SOUND = {
    "every_steps": "100",
    "metrics": ALL,
    "images": "2049",
    "prompts_file": "prompts.txt",
    "reference": "real",
    "held_out": "shards",
}
CLASS = ["model.conditioning.kind=class", "encoders.text.kind=none"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def overrides(**changed: str) -> list[str]:
    return [f"evaluation.{name}={value}" for name, value in (SOUND | changed).items()]


def problems(base: Path, given: list[str]) -> list[InputError]:
    try:
        check_run(load_run(base, given))
    except ConfigError as error:
        return list(error.problems)
    except InputError as error:
        return [error]
    return []


def test_counts_and_needs_are_those_of_the_command() -> None:
    assert {name: IMAGES_NEEDED[name] for name in IMAGES_NEEDED} == {
        metric: needed
        for metric, needed in metrics.IMAGES_NEEDED.items()
        if metric not in metrics.OF_BENCHMARKS
    }
    assert OF_REFERENCE == metrics.OF_REFERENCE
    names: set[MetricName] = {*IMAGES_NEEDED, "held_out_loss"}
    assert names == set(metrics.Metric) - metrics.OF_BENCHMARKS


@pytest.mark.parametrize(
    "given",
    [
        overrides(),
        overrides(every_steps="null", metrics="[]", images="1"),
        overrides(images="4", metrics="[precision_recall]", held_out="null"),
        overrides(metrics="[held_out_loss]", images="null", prompts_file="null", reference="null"),
        [*CLASS, *overrides(metrics="[fid]", prompts_file="null", held_out="null")],
        overrides(sampling="{guidance: 4.0}"),
    ],
)
def test_sound(base: Path, given: list[str]) -> None:
    assert problems(base, given) == []


@pytest.mark.parametrize(
    ("given", "found", "remedy"),
    [
        (overrides(metrics="[]"), "no evaluation.metrics", "evaluation.metrics"),
        (overrides(images="2048"), "images = 2048, .* with fid", "to 2049 or more"),
        (overrides(metrics="[sfid]", images="2023"), "with sfid", "to 2024 or more"),
        (overrides(metrics="[inception_score]", images="1007"), "with inception_score", "to 1008"),
        (overrides(metrics="[precision_recall]", images="3"), "with precision_recall", "to 4 or"),
        (overrides(metrics="[clip_score]", images="null"), "images = None", "to 1 or more"),
        (overrides(reference="null"), "fid, precision_recall, sfid, no", "evaluation.reference"),
        (overrides(held_out="null"), "no evaluation.held_out", "packed shards"),
        (overrides(prompts_file="null"), "no evaluation.prompts_file", "one caption per line"),
        (
            [*CLASS, *overrides(metrics="[fid]")],
            "prompts_file = prompts.txt, .* = class",
            "remove evaluation.prompts_file",
        ),
        (
            [*CLASS, *overrides(metrics="[clip_score]", prompts_file="null")],
            "clip_score, .* = class",
            "remove clip_score",
        ),
        ([*overrides(), "encoders.decoder.kind=none"], "decoder.kind = none", "decoder.kind"),
        (
            overrides(sampling="{guidance_interval: [0.5, 0.2]}"),
            r"evaluation.sampling.guidance_interval = \[0.5, 0.2\]",
            "correct evaluation.sampling",
        ),
        (
            [*overrides(sampling="{guidance: 2.0}"), "data.condition_dropout=0"],
            "evaluation.sampling.guidance = 2.0",
            "evaluation.sampling.guidance to 1",
        ),
    ],
)
def test_refused(base: Path, given: list[str], found: str, remedy: str) -> None:
    [problem] = problems(base, given)
    with pytest.raises(InputError, match=found):
        raise problem
    with pytest.raises(InputError, match=remedy):
        raise problem


def test_too_few_images_are_one_problem_for_each_metric(base: Path) -> None:
    assert len(problems(base, overrides(images="1000"))) == 3


def test_an_unknown_metric_and_one_of_benchmarks_are_refused(base: Path) -> None:
    for name in ("kid", "geneval"):
        with pytest.raises(InputError, match=r"evaluation\.metrics"):
            load_run(base, overrides(metrics=f"[{name}]"))


def test_the_plan_says_what_an_evaluation_takes(base: Path) -> None:
    plain = plan_report(load_run(base), devices=1)
    report = plan_report(load_run(base, overrides()), devices=1)
    gib = 4 * plain["parameters"]["total"] / 2**30
    [note] = set(report["notes"]) - set(plain["notes"])
    assert f"{gib:,.3f} GiB" in note and "fp32" in note
