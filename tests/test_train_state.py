"""What a resume may change and what it must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import write_config

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import model_shape, timestep_shift
from dsr_scale.config.load import load_run
from dsr_scale.train.state import RunState, check_resumable


def state(folder: Path, *overrides: str) -> RunState:
    run = load_run(write_config(folder), overrides)
    shape = model_shape(run)
    return RunState(
        step=3,
        samples_seen=24,
        skipped_steps=0,
        skipped_in_a_row=0,
        guard=(0.0, 0.0, 0.0, 0.0, 0.0),
        corrupt_seen=0,
        data_fingerprint="a" * 64,
        data_samples=20,
        config=run.model_dump(mode="json"),
        model_shape=shape.model_dump(mode="json"),
        timestep_shift=timestep_shift(run, shape),
        tracker_run_id=None,
        layout={"tp": 1, "pp": 1, "dp": 1, "zero": 1},
        versions={},
    )


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=99",
        "training.microbatch_images=2",
        "training.optimizer.learning_rate=1e-5",
        "data.workers=0",
        "data.shards=/moved",
        "data.cache_directory=/elsewhere",
        "checkpoint.every_steps=1",
        "encoders.decoder.kind=none",
        "directory=/other",
    ],
)
def test_may_change(tmp_path: Path, override: str) -> None:
    check_resumable(state(tmp_path), state(tmp_path, override))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=4", "seed was 3, now 4"),
        ("training.global_batch_images=16", "training.global_batch_images was 8, now 16"),
        ("data.shuffle_block_samples=7", "data.shuffle_block_samples was 262144, now 7"),
        ("data.horizontal_flip=0.0", r"data\.horizontal_flip was 0\.5, now 0\.0"),
        ("data.buckets=[[32, 64]]", "data.buckets"),
        ("data.resolution=64", "data.resolution"),
        ("diffusion.prediction=velocity", "diffusion.prediction was data, now velocity"),
        ("diffusion.timesteps.mean=1.0", r"diffusion\.timesteps\.mean"),
        ("encoders.text.max_length=32", r"encoders\.text\.max_length"),
        ("encoders.image={kind: vae, model: m}", r"encoders\.image\.kind"),
        ("model.registers.count=0", "another network: registers"),
    ],
)
def test_must_not_change(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_resumable(state(tmp_path), state(tmp_path, override))


def test_other_data_is_recognised_by_its_content(tmp_path: Path) -> None:
    saved = state(tmp_path)
    with pytest.raises(InputError, match=r"data\.fingerprint was aaaa"):
        check_resumable(saved, replace(saved, data_fingerprint="b" * 64))


def test_json_round_trip(tmp_path: Path) -> None:
    saved = state(tmp_path)
    assert RunState.from_json(saved.to_json()) == saved
