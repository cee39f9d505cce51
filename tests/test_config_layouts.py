"""Every rule of parallel layouts: the problem it reports, alone, and that its remedy cures it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config_checks import BASE, problems_of

from dsr_scale.config.load import load_run
from dsr_scale.config.parallel_checks import schedulable


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


LAYOUTS: dict[str, tuple[list[str], str, str, list[str]]] = {
    # On 8 devices: name: (overrides, in found, in remedy, what the remedy says to do)
    "heads over tensor ranks": (
        ["parallel.tp=8"],
        "parallel.tp = 8, model.heads = 4",
        "parallel.tp to one of 1, 2, 4",
        ["parallel.tp=4"],
    ),
    "heads of the head over tensor ranks": (
        ["parallel.tp=4", "model.head={width: 64, heads: 2}"],
        "parallel.tp = 4, model.head.heads = 2",
        "parallel.tp to one of 1, 2",
        ["parallel.tp=2"],
    ),
    "no whole replicas": (
        ["parallel.tp=2", "parallel.pp=3", "training.microbatch_images=1"],
        "8 devices, parallel.tp = 2, parallel.pp = 3",
        "start 6 or 12 processes",
        ["parallel.pp=2"],
    ),
    "a replica larger than the job": (
        ["parallel.tp=4", "parallel.pp=4", "training.microbatch_images=1"],
        "8 devices, parallel.tp = 4, parallel.pp = 4",
        "start 16 processes",
        ["parallel.pp=2"],
    ),
    "registers over the sequence": (
        ["parallel.tp=4", "parallel.sp=true", "model.registers.count=10"],
        "parallel.tp = 4, sequences of 74 (64 image tokens + 10 registers, data.resolution)",
        "model.registers.count to 8 or 12, or parallel.tp to 2,",
        ["model.registers.count=12"],
    ),
    "text in context over the sequence": (
        ["parallel.tp=4", "parallel.sp=true", "model.conditioning.kind=in_context",
         "encoders.text.max_length=30"],
        "94 (64 image tokens + 30 of text, data.resolution), 130 (64 image tokens + 30 of text + 36",
        "encoders.text.max_length to 28 or 32",
        ["encoders.text.max_length=28"],
    ),
    "registers and text over the sequence": (
        ["parallel.tp=4", "parallel.sp=true", "model.conditioning.kind=in_context",
         "encoders.text.max_length=31", "model.registers.count=10"],
        "74 (64 image tokens + 10 registers, data.resolution)",
        "model.registers.count to 8 and encoders.text.max_length to 32",
        ["model.registers.count=8", "encoders.text.max_length=32"],
    ),
    "a bucket over the sequence": (
        ["parallel.tp=4", "parallel.sp=true", "data.buckets=[[64, 64], [24, 24]]"],
        "sequences of 9 (9 image tokens, data.buckets[1]), 45 (9 image tokens + 36 registers",
        "parallel.sp to false",
        ["parallel.sp=false"],
    ),
    "more stages than blocks": (
        ["parallel.pp=8", "training.microbatch_images=1"],
        "8 pipeline stages (parallel.pp · parallel.virtual_stages), 4 blocks",
        "product of at most 4",
        ["parallel.pp=4"],
    ),
    "more virtual stages than blocks": (
        ["parallel.pp=2", "parallel.virtual_stages=3", "training.microbatch_images=1"],
        "6 pipeline stages",
        "parallel.virtual_stages to a product of at most 4",
        ["parallel.virtual_stages=2"],
    ),
    "ZeRO-2 under a pipeline": (
        ["parallel.pp=2", "parallel.zero=2"],
        "parallel.zero = 2, parallel.pp = 2",
        "parallel.zero to 1, or parallel.pp to 1",
        ["parallel.zero=1"],
    ),
    "ZeRO-3 under a pipeline": (
        ["parallel.pp=2", "parallel.zero=3"],
        "parallel.zero = 3, parallel.pp = 2",
        "parallel.zero to 1, or parallel.pp to 1",
        ["parallel.pp=1"],
    ),
    "fewer micro-batches than ranks": (
        ["parallel.pp=4", "training.microbatch_images=8"],
        "data-parallel ranks = 2: 2 micro-batches in a step",
        "microbatch_images to one of 1, 2, 4, or training.global_batch_images to 64",
        ["training.microbatch_images=4"],
    ),
    "too few, cured by the batch": (
        ["parallel.pp=4", "training.microbatch_images=8"],
        "training.global_batch_images = 32",
        "training.global_batch_images to 64",
        ["training.global_batch_images=64"],
    ),
    "micro-batches in no whole rounds": (
        ["parallel.pp=2", "parallel.virtual_stages=2", "training.global_batch_images=80"],
        "data-parallel ranks = 4: 5 micro-batches in a step, parallel.virtual_stages = 2",
        "microbatch_images to one of 1, 2, 5, 10, or training.global_batch_images to 96",
        ["training.global_batch_images=96"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rule_of_layouts_and_its_cure(base: Path, name: str) -> None:
    overrides, found, remedy, cure = LAYOUTS[name]
    (problem,) = problems_of(load_run(base, overrides), devices=8)
    assert found in problem.found
    assert remedy in problem.remedy
    assert problem.required
    assert problems_of(load_run(base, [*overrides, *cure]), devices=8) == []


def test_hidden_widths_over_tensor_ranks(base: Path) -> None:
    """12 heads divide by 3, a hidden width padded to a power of two does not."""
    run = load_run(base, ["model.width=768", "model.heads=12", "parallel.tp=3"])
    (problem,) = problems_of(run.model_copy(update={"training": run.training.model_copy(
        update={"global_batch_images": 16})}), devices=12)  # fmt: skip
    assert "the padded hidden width of model.width 768 = 2048" in problem.found
    assert "parallel.tp to one of 1, 2, 4" in problem.remedy


def test_sequences_are_those_of_the_body(base: Path) -> None:
    """As tokens enter it and with registers; text by cross-attention is in none."""
    square = ["data.resolution=40", "parallel.tp=2", "parallel.sp=true", "model.registers.count=7"]
    for start in (0, 1):
        run = load_run(base, [*square, f"model.registers.start={start}"])
        (problem,) = problems_of(run, devices=8)
        assert "sequences of 25 (25 image tokens, data.resolution)" in problem.found
        assert "registers" not in problem.found
    text = ["parallel.tp=2", "parallel.sp=true", "encoders.text.max_length=33"]
    assert problems_of(load_run(base, text), devices=8) == []


def test_micro_batches_fill_the_pipeline_in_whole_rounds() -> None:
    for pp in range(2, 6):
        for microbatches in range(1, 25):
            rounds = max(1, microbatches // pp)
            assert schedulable(microbatches, pp, 2) == (
                microbatches >= pp and microbatches % rounds == 0
            )
            assert schedulable(microbatches, pp, 1) == (microbatches >= pp)
