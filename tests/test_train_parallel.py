"""Whole runs on layouts of ranks: data, checkpoints, samples and skipped steps equal one process's.

Ranks are forks of a server that has everything imported, so a run of four takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import run_ranks
from test_train_resume import assert_same_tensors
from tiny_runs import DRIVER, checkpoint_tensors, consumed, run_training, write_config
from train_driver import drive

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.checkpoint.verification import verify
from dsr_scale.config.load import load_run
from dsr_scale.export.bundle import export_run
from dsr_scale.telemetry.metrics import read_metrics
from dsr_scale.train.loop import train

# Tests of many ranks run one after the other: side by side they would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")

MODEL = (
    "model.heads=4",
    "model.head={width: 48, depth: 2, heads: 4}",
    "data.workers=0",
    "training.microbatch_images=2",
    "training.ema_decays=[0.9, 0.5]",
    "checkpoint.every_steps=2",
)
TP_PP = ("parallel.tp=2", "parallel.pp=2")


def train_on(folder: Path, ranks: int, *overrides: str) -> Path:
    """Trains the model above on so many ranks; returns the run directory."""
    config = write_config(folder)
    run_ranks(drive, ranks, config, folder / "ids.jsonl", 0, [*MODEL, *overrides])
    return folder / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of six steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_on(folder, 1)
    return folder


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "run")]


def test_one_process_under_torchrun_is_bit_identical(tmp_path: Path) -> None:
    plain, torchrun = tmp_path / "plain", tmp_path / "torchrun"
    plain.mkdir()
    torchrun.mkdir()
    run_training(plain, "training.steps=3")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    arguments = [str(write_config(torchrun)), str(torchrun / "ids.jsonl"), "0", "training.steps=3"]
    done = subprocess.run(
        [*launcher, str(DRIVER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same_tensors(plain / "run", torchrun / "run", 3)
    assert losses(plain) == losses(torchrun)


def test_a_run_moves_between_layouts_and_continues_with_the_next_samples(
    alone: Path, tmp_path: Path
) -> None:
    train_on(tmp_path, 4, *TP_PP, "training.steps=2")
    train_on(tmp_path, 4, "training.steps=4")
    train_on(tmp_path, 4, "parallel.tp=4", "parallel.sp=true", "training.steps=5")
    train_on(tmp_path, 2, "parallel.zero=3", "training.steps=6")
    assert consumed(tmp_path) == consumed(alone)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    ours, whole = (checkpoint_tensors(folder / "run", 6) for folder in (tmp_path, alone))
    assert ours.keys() == whole.keys()
    for name, expected in whole.items():
        bound = 1e-4 * expected.abs().max() + 1e-7
        assert (ours[name] - expected).abs().max() <= bound, name
    layout = directory.read_run_state(directory.step_directory(tmp_path / "run", 6))["layout"]
    assert layout == {"tp": 1, "pp": 1, "dp": 2, "zero": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(4, TP_PP), (2, ("parallel.zero=3",))], ids=str)
def test_the_same_layout_resumes_bit_identically(
    ranks: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    """Some steps are skipped as spikes: their counters and statistics travel as well."""
    spiking = ("training.skip={spike_deviations: 0.5, window_steps: 2}", "checkpoint.every_steps=5")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    train_on(whole, ranks, *layout, *spiking, "training.steps=8")
    train_on(halves, ranks, *layout, *spiking, "training.steps=5")
    train_on(halves, ranks, *layout, *spiking, "training.steps=8")
    ours, expected = (checkpoint_tensors(folder / "run", 8) for folder in (halves, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    states = [
        directory.read_run_state(directory.step_directory(folder / "run", 8))
        for folder in (halves, whole)
    ]
    counters = ("skipped_steps", "skipped_in_a_row", "guard", "samples_seen")
    assert [states[0][key] for key in counters] == [states[1][key] for key in counters]
    assert states[0]["skipped_steps"] > 0
    assert consumed(halves) == consumed(whole)
    assert losses(halves) == losses(whole)


def test_samples_drawn_while_training_are_those_of_one_process(tmp_path: Path) -> None:
    grid = "grid={every_steps: 2, prompts: [a red car, a dog], sampling: {steps: 2}}"
    pictures = []
    for name, ranks, layout in (("one", 1, ()), ("many", 4, TP_PP)):
        folder = tmp_path / name
        folder.mkdir()
        train_on(folder, ranks, *layout, grid, "training.steps=2")
        (path,) = (folder / "run" / "grids").iterdir()
        pictures.append(np.asarray(Image.open(path).convert("RGB"), dtype=np.int16))
    assert pictures[0].std() > 5, "the picture is blank"
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_an_export_of_any_layout_is_the_export_of_one_process(alone: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train_on(tmp_path, 4, *TP_PP)
    for weights in ("ema", "ema_5", "raw"):
        exported = []
        for folder in (tmp_path, alone):
            out = tmp_path / f"{folder.name}-{weights}"
            export_run(folder / "run", out, weights=weights)
            exported.append(load_file(out / "model.safetensors"))
        for name, expected in exported[1].items():
            bound = 1e-4 * expected.abs().max() + 1e-7
            assert (exported[0][name] - expected).abs().max() <= bound, name
    with pytest.raises(InputError, match="one of raw, ema, ema_9, ema_5"):
        export_run(alone / "run", tmp_path / "no", weights="ema_7")


def test_a_run_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    alone: Path, tmp_path: Path
) -> None:
    """A save after every step is nearly always under way; what it leaves must never be half."""
    config = write_config(tmp_path)
    arguments = (config, tmp_path / "ids.jsonl")
    frequent = [*MODEL, "checkpoint.every_steps=1", "checkpoint.keep_last=2"]
    for kill_after in (2, 3, 5):
        with pytest.raises(AssertionError, match="died"):
            run_ranks(killed_at_once, 1, *arguments, kill_after, frequent)
        for step in directory.complete_steps(tmp_path / "run"):
            assert verify(directory.step_directory(tmp_path / "run", step)) == []
    run_ranks(drive, 1, *arguments, 0, frequent)
    ours, whole = (checkpoint_tensors(folder / "run", 6) for folder in (tmp_path, alone))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert consumed(tmp_path) == consumed(alone)


def killed_at_once(config: Path, ids_file: Path, kill_after: int, overrides: list[str]) -> None:
    """Like `drive`, but dies without waiting for the save of the step before."""
    import train_driver

    train_driver.wait_for_saves = lambda directory: None
    drive(config, ids_file, kill_after, overrides)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    alone: Path, tmp_path: Path
) -> None:
    train_on(tmp_path, 2, "parallel.tp=2", "training.steps=4")
    (damaged,) = directory.step_directory(tmp_path / "run", 4).glob("__1_0.distcp")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    train_on(tmp_path, 2, "parallel.tp=2")
    assert consumed(tmp_path) == consumed(alone)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    kept = sorted(path.name for path in directory.checkpoints_directory(tmp_path / "run").iterdir())
    assert "step_00000004.damaged" in kept


def test_another_objective_is_refused_unless_named(alone: Path, tmp_path: Path) -> None:
    changed = ["training.steps=8", "diffusion.weighting=min_snr"]
    config = write_config(alone)
    message = refusal(config, [*MODEL, *changed])
    assert "diffusion.weighting was none, now min_snr" in message
    assert "checkpoint.allow_changed=[diffusion.weighting]" in message
    other = tmp_path / "copy"
    other.mkdir()
    train_on(other, 1, "training.steps=2")
    allowed = ("checkpoint.allow_changed=[diffusion.weighting]",)
    train_on(other, 1, *changed, *allowed, "training.steps=3")
    assert directory.complete_steps(other / "run")[-1] == 3


def refusal(config: Path, overrides: list[str]) -> str:
    with pytest.raises(AssertionError) as refused:
        run_ranks(drive, 1, config, config.with_name("ids_of_refused.jsonl"), 0, overrides)
    return str(refused.value)


def refused_here(config: Path, overrides: list[str]) -> str:
    try:
        drive(config, config.with_name("ids_of_refused.jsonl"), 0, overrides)
    except InputError as error:
        return str(error)
    return "nothing"


def test_what_the_reading_rank_cannot_use_ends_its_whole_replica(tmp_path: Path) -> None:
    """Samples without a class: found by the one rank of four that reads, told to the others."""
    classes = ["model.conditioning={kind: class, num_classes: 3}", "encoders.text={kind: none}"]
    messages = run_ranks(refused_here, 4, write_config(tmp_path), [*MODEL, *TP_PP, *classes])
    assert len(set(messages)) == 1
    assert "label = None" in messages[0]


@pytest.mark.parametrize(
    ("ranks", "overrides", "found"),
    [
        ("3", ("parallel.tp=2",), "3 devices, parallel.tp = 2"),
        ("4", ("parallel.tp=4",), "model.heads = 2"),
        ("2", ("parallel.pp=2", "parallel.zero=2"), "parallel.zero = 2"),
        ("8", ("parallel.pp=8",), "parallel.pp"),
        ("2", ("parallel.pp=2", "training.microbatch_images=8"), "micro-batch"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: str,
    overrides: tuple[str, ...],
    found: str,
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(InputError, match=found):
        train(load_run(write_config(tmp_path), overrides))
    assert not (tmp_path / "run").exists()


def test_a_lost_run_ends_on_all_ranks_with_its_samples_named(tmp_path: Path) -> None:
    """A rate that makes everything infinite: skipped, counted, and after three in a row the end."""
    config = write_config(tmp_path)
    overrides = [
        *MODEL,
        *TP_PP,
        "training.optimizer.learning_rate=1e30",
        "training.optimizer.gradient_clip=null",
        "training.skip.most_in_a_row=3",
        "training.steps=50",
    ]
    with pytest.raises(AssertionError, match="3 steps in a row skipped"):
        run_ranks(drive, 4, config, tmp_path / "ids.jsonl", 0, overrides)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    skipped = [record for record in records if record.get("skipped")]
    assert len(skipped) == 3
    assert all(len(record["skipped_samples"]) == 8 for record in skipped)
