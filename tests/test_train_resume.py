"""A run that was killed, stopped or spread over other ranks equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rank_processes import ForkedCommand
from tiny_runs import checkpoint_tensors, consumed, run_training, write_config

from dsr_scale.checkpoint import directory
from dsr_scale.telemetry.metrics import read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of six steps."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(folder)
    return folder


def assert_same_tensors(run_a: Path, run_b: Path, step: int, tolerance: float = 0.0) -> None:
    a, b = checkpoint_tensors(run_a, step), checkpoint_tensors(run_b, step)
    assert a.keys() == b.keys()
    kinds = {name.partition(".")[0] for name in a}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq", "ema_9", "buffers"}
    for name in a:
        if tolerance == 0.0:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-3)


def test_killed_run_goes_on_bit_identically(whole: Path, tmp_path: Path) -> None:
    run_training(tmp_path, kill_after=5)
    assert directory.complete_steps(tmp_path / "run") == [3]
    run_training(tmp_path)
    assert_same_tensors(whole / "run", tmp_path / "run", 6)
    assert consumed(tmp_path) == consumed(whole)
    states = [
        directory.read_run_state(directory.find_checkpoint(f / "run")) for f in (whole, tmp_path)
    ]
    for state in states:
        state["config"]["directory"] = ""
        # Of DCP's own file, which names its folder, and of this one.
        del state["checksum"], state["files"][".metadata"]
    assert states[0] == states[1]
    losses = [[r["loss"] for r in read_metrics(f / "run")] for f in (whole, tmp_path)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_training_moves_weights_and_ema_apart(whole: Path) -> None:
    before, after = checkpoint_tensors(whole / "run", 3), checkpoint_tensors(whole / "run", 6)
    moved = [n for n in after if n.startswith("weights.") and not torch.equal(before[n], after[n])]
    assert len(moved) > 100
    name = "weights.blocks.0.attn.qkv.weight"
    assert not torch.equal(after[name], after[name.replace("weights", "ema_9")])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    config = write_config(tmp_path)
    # So slow a schedule of checkpoints that only the signal can have saved.
    settings = ["checkpoint.every_steps=1000", "training.steps=100000", "tracking.wandb=offline"]
    process = ForkedCommand("train", str(config), *settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # A terminal and Slurm signal every process of the run: data workers and the tracker as well.
    os.killpg(process.pid, stop)
    printed = process.finish(120)
    assert process.returncode == 128 + stop, printed
    (stopped,) = directory.complete_steps(tmp_path / "run")
    assert f"stopped by {stop.name}: step {stopped} of 100000 saved" in printed
    run_training(tmp_path, f"training.steps={stopped + 2}")
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run")}
    assert list(losses) == list(range(1, stopped + 3))
    for record in read_metrics(whole / "run"):
        if record["step"] in losses:
            assert losses[record["step"]] == record["loss"]


@pytest.mark.slow
def test_two_ranks_equal_one_and_may_change_between(whole: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    run_training(two, ranks=2)
    assert consumed(two) == consumed(whole)
    assert_same_tensors(whole / "run", two / "run", 6, tolerance=2e-5)

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    run_training(mixed, "training.steps=3", ranks=2)
    run_training(mixed, "training.microbatch_images=2")
    assert consumed(mixed) == consumed(whole)
    assert_same_tensors(whole / "run", mixed / "run", 6, tolerance=2e-5)


@pytest.mark.slow
def test_bf16_resumes_bit_identically(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    run_training(folders[0], "training.precision=bf16")
    run_training(folders[1], "training.precision=bf16", kill_after=4)
    run_training(folders[1], "training.precision=bf16")
    assert_same_tensors(folders[0] / "run", folders[1] / "run", 6)


def test_unfinished_save_is_never_loaded(whole: Path, tmp_path: Path) -> None:
    run_training(tmp_path, "training.steps=3")
    partial = directory.checkpoints_directory(tmp_path / "run") / "step_00000005.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    run_training(tmp_path)
    assert_same_tensors(whole / "run", tmp_path / "run", 6)
    assert json.loads((tmp_path / "ids.jsonl").read_text().splitlines()[3])["step"] == 4
