"""Every cross-field rule: the problem it reports, alone, and that its remedy cures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.config.checks import check_run
from dsr_scale.config.load import load_run
from dsr_scale.config.problems import ConfigError
from dsr_scale.config.run import RunConfig

TEXT = "encoders.text={kind: transformers, model: m, channels: 8}"
CLASS = ["model.conditioning.kind=class", "encoders.text.kind=none"]
VIT = "encoders.image={kind: vit, model: google/siglip2-base-patch16-256}"
GRID = ["grid.every_steps=10", "grid.prompts=['3']"]

BASE = """
name: t
directory: runs/t
data: {shards: shards, resolution: 64}
encoders: {image: {kind: pixels, patch: 8}, text: {kind: bytes}}
model: {width: 64, depth: 4, heads: 4}
training: {global_batch_images: 32, microbatch_images: 4}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def problems_of(run: RunConfig, devices: int = 1) -> list[InputError]:
    try:
        check_run(run, devices=devices)
    except ConfigError as error:
        return list(error.problems)
    except InputError as error:
        return [error]
    return []


def test_a_sound_run_passes(base: Path) -> None:
    for overrides in ([], CLASS, [TEXT], [VIT, "encoders.decoder.kind=none"], GRID):
        assert problems_of(load_run(base, overrides), devices=8) == []


CASES: dict[str, tuple[list[str], str, str, list[str]]] = {
    # name: (overrides, in found, in remedy, what the remedy says to do)
    "heads divide the width": (
        ["model.heads=5"],
        "model.width = 64, model.heads = 5",
        "model.heads to one of 1, 2, 4, 8, 16",
        ["model.heads=8"],
    ),
    "channels per head": (
        ["model.heads=32"],
        "2 channels per head",
        "multiple of 128",
        ["model.width=128"],
    ),
    "head heads": (
        ["model.head={width: 64, heads: 3}"],
        "model.head.width = 64, model.head.heads = 3",
        "model.head.heads",
        ["model.head.heads=4"],
    ),
    "unknown preset": (
        ["model.preset=DiT-M"],
        "model.preset = 'DiT-M'",
        "choose one of these",
        ["model.preset=DiT-S"],
    ),
    "no sizes": (["model.width=0"], "no model.width", "preset", ["model.width=64"]),
    "late registers": (
        ["model.registers.start=4"],
        "model.registers.start = 4 in a body of 4 blocks",
        "model.registers.start to at most 3",
        ["model.registers.start=3"],
    ),
    "late registers by default": (
        ["model.depth=1"],
        "model.registers.start = 1 in a body of 1 blocks",
        "model.registers.start to at most 0",
        ["model.registers.start=0"],
    ),
    "class with text": (
        ["model.conditioning.kind=class"],
        "model.conditioning.kind = class, encoders.text.kind = bytes",
        "encoders.text.kind to none",
        ["encoders.text.kind=none"],
    ),
    "text conditioning without text": (
        ["encoders.text.kind=none"],
        "encoders.text.kind = none",
        "transformers or bytes",
        ["encoders.text.kind=bytes"],
    ),
    "flash in context": (
        ["model.attention=flash", "model.conditioning.kind=in_context"],
        "flash, model.conditioning.kind = in_context",
        "model.attention to sdpa",
        ["model.attention=sdpa"],
    ),
    "flash fp32": (
        ["model.attention=flash", "training.precision=fp32"],
        "flash, training.precision = fp32",
        "training.precision to bf16",
        ["training.precision=bf16"],
    ),
    "flash tf32": (
        ["model.attention=flash", "training.precision=tf32"],
        "flash, training.precision = tf32",
        "training.precision to bf16",
        ["training.precision=bf16"],
    ),
    "flash cpu": (
        ["model.attention=flash", "training.device=cpu"],
        "flash, training.device = cpu",
        "model.attention to sdpa",
        ["model.attention=sdpa"],
    ),
    "decoder of other latents": (
        ["encoders.decoder={kind: vae, model: m}"],
        "encoders.image.kind = pixels, encoders.decoder.kind = vae",
        "encoders.decoder.kind to pixels",
        ["encoders.decoder={kind: pixels}"],
    ),
    "pixels decoder for a ViT": (
        [VIT],
        "encoders.image.kind = vit, encoders.decoder.kind = pixels",
        "encoders.decoder.kind to rae",
        ["encoders.decoder={kind: rae, model: m}"],
    ),
    "unknown encoder": (
        ["encoders.image={kind: vit, model: somewhere/vit}", "encoders.decoder.kind=none",
         "data.buckets=[[64, 64], [64, 32]]"],
        "encoders.image.model = 'somewhere/vit'",
        "encoders.image.channels",
        ["encoders.image.channels=8", "encoders.image.patch=8", "encoders.image.input_size=64"],
    ),
    "resolution": (
        ["data.resolution=60"],
        "data.resolution: an image of 60×60 pixels",
        "data.resolution",
        ["data.resolution=56"],
    ),
    "bucket": (
        ["data.buckets=[[64, 64], [64, 36]]"],
        "data.buckets[1]: an image of 64×36 pixels",
        "data.buckets",
        ["data.buckets=[[64, 64], [64, 32]]"],
    ),
    "a bucket twice": (
        ["data.buckets=[[64, 32], [32, 64], [64, 32]]"],
        "data.buckets[2] = [64, 32], which is there before",
        "remove data.buckets[2]",
        ["data.buckets=[[64, 32], [32, 64]]"],
    ),
    "template without a caption": (
        [TEXT, "encoders.text.template=a photo"],
        "encoders.text.template = 'a photo'",
        "add {caption}",
        ["encoders.text.template='a photo of {caption}'"],
    ),
    "patch": (
        ["model.patch=3"],
        "a latent grid of 8×8 cells, model.patch = 3",
        "model.patch",
        ["model.patch=2"],
    ),
    "remote shards": (
        ["data.shards=s3://bucket/pack"],
        "no data.cache_directory",
        "data.cache_directory",
        ["data.cache_directory=cache"],
    ),
    "warm-up": (
        ["training.steps=10", "training.schedule.warmup_steps=11"],
        "warmup_steps = 11, training.steps = 10",
        "lower training.schedule.warmup_steps",
        ["training.schedule.warmup_steps=10"],
    ),
    "decay over before it starts": (
        ["training.schedule={decay: linear, decay_start_step: 50, decay_end_step: 50}"],
        "a linear decay from step 50 to step 50",
        "decay_end_step",
        ["training.schedule.decay_end_step=51"],
    ),
    "decay within the warm-up": (
        ["training.schedule={decay: cosine, warmup_steps: 60, decay_end_step: 50}"],
        "a cosine decay from step 60 to step 50",
        "decay_end_step",
        ["training.schedule.decay_end_step=61"],
    ),
    "rising decay": (
        ["training.schedule={decay: cosine, final_learning_rate: 1.0}"],
        "final_learning_rate = 1.0",
        "lower training.schedule.final_learning_rate",
        ["training.schedule.final_learning_rate=1e-6"],
    ),
    "kept checkpoints": (
        ["checkpoint.every_steps=10", "checkpoint.keep_every_steps=15"],
        "keep_every_steps = 15, checkpoint.every_steps = 10",
        "multiple of 10",
        ["checkpoint.keep_every_steps=20"],
    ),
    "guidance interval": (
        ["grid.sampling.guidance_interval=[0.5, 0.2]"],
        "guidance_interval = [0.5, 0.2]",
        "[0, 1] is everywhere",
        ["grid.sampling.guidance_interval=[0, 1]"],
    ),
    "grids without a decoder": (
        [*GRID, "encoders.decoder.kind=none"],
        "encoders.decoder.kind = none",
        "encoders.decoder.kind to pixels",
        ["encoders.decoder.kind=pixels"],
    ),
    "grids without prompts": (
        ["grid.every_steps=10"],
        "no grid.prompts",
        "set grid.prompts",
        ["grid.prompts=[a]"],
    ),
    "untrained guidance": (
        [*GRID, "grid.sampling.guidance=2", "data.condition_dropout=0"],
        "guidance = 2.0, data.condition_dropout = 0",
        "data.condition_dropout to 0.1",
        ["data.condition_dropout=0.1"],
    ),
    "untrained guidance below one": (
        [*GRID, "grid.sampling.guidance=0.5", "data.condition_dropout=0"],
        "guidance = 0.5, data.condition_dropout = 0",
        "grid.sampling.guidance to 1",
        ["grid.sampling.guidance=1"],
    ),
    "prompts of a class model": (
        [*CLASS, "grid.every_steps=10", "grid.prompts=[7, 1000, a cat]"],
        "'1000', 'a cat'",
        "class numbers",
        ["grid.prompts=[7, 999]"],
    ),
    "one average twice": (
        ["training.ema_decays=[0.9, 0.99, 0.9]"],
        "training.ema_decays = [0.9, 0.99, 0.9]",
        "remove the repeated ones from training.ema_decays",
        ["training.ema_decays=[0.9, 0.99]"],
    ),
    "an unknown setting allowed to change": (
        ["checkpoint.allow_changed=[diffusion.predicton]"],
        "'diffusion.predicton', which is no setting",
        "did you mean diffusion.prediction?",
        ["checkpoint.allow_changed=[diffusion.prediction, data.fingerprint]"],
    ),
    "sequence parallel alone": (
        ["parallel.sp=true"],
        "parallel.sp = true, parallel.tp = 1",
        "parallel.sp to false",
        ["parallel.sp=false"],
    ),
    "virtual stages alone": (
        ["parallel.virtual_stages=2"],
        "parallel.virtual_stages = 2, parallel.pp = 1",
        "parallel.virtual_stages to 1",
        ["parallel.virtual_stages=1"],
    ),
    "compiled ZeRO-3": (
        ["parallel.zero=3", "training.compile=true"],
        "parallel.zero = 3, training.compile = true",
        "training.compile to false, or parallel.zero to 1 or 2",
        ["parallel.zero=2"],
    ),
    "batch": (
        ["training.microbatch_images=5"],
        "global_batch_images = 32, training.microbatch_images = 5",
        "microbatch_images to one of 1, 2, 4, 8, 16, 32",
        ["training.microbatch_images=8"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule_reports_its_problem_and_its_remedy_cures_it(base: Path, name: str) -> None:
    overrides, found, remedy, cure = CASES[name]
    (problem,) = problems_of(load_run(base, overrides))
    assert found in problem.found
    assert remedy in problem.remedy
    assert problem.required
    assert problems_of(load_run(base, [*overrides, *cure])) == []


def test_an_odd_width_is_two_problems_of_one_number(base: Path) -> None:
    problems = problems_of(load_run(base, ["model.width=66", "model.heads=3"]))
    assert ["22 channels per head" in p.found for p in problems] == [True, False]
    assert "set model.width to 68" in problems[1].remedy


def test_the_batch_depends_on_the_ranks(base: Path) -> None:
    run = load_run(base)
    assert problems_of(run, devices=8) == []
    (problem,) = problems_of(run, devices=16)
    assert "data-parallel ranks = 16" in problem.found
    assert "one of 1, 2" in problem.remedy
    (problem,) = problems_of(run, devices=3)
    assert "multiple of 3" in problem.remedy
    (problem,) = problems_of(run, devices=0)
    assert "0 devices" in problem.found


def test_all_problems_are_reported_together_and_each_once(base: Path) -> None:
    overrides = [o for name in ("heads divide the width", "bucket", "warm-up", "kept checkpoints",
                                "flash cpu", "batch") for o in CASES[name][0]]  # fmt: skip
    assert len(problems_of(load_run(base, overrides))) == 6
    unknown = problems_of(load_run(base, ["model.preset=DiT-M"]))
    assert len(unknown) == 1


def test_registers_start_does_not_matter_without_registers(base: Path) -> None:
    run = load_run(base, ["model.registers.count=0", "model.registers.start=9"])
    assert problems_of(run) == []
