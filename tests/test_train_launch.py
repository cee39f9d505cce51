"""srun starts the same command; a signal that reaches one rank stops all after the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rank_processes import free_port
from tiny_runs import DRIVER, consumed, run_training, write_config

from dsr_scale.checkpoint import directory
from dsr_scale.telemetry.metrics import METRICS_FILE, read_metrics


def start_srun_ranks(folder: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Two processes with the variables srun gives to two tasks on one node."""
    config, port = write_config(folder), free_port()
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "4711",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(DRIVER), str(config), str(folder / "ids.jsonl"), "0"]
        processes.append(
            subprocess.Popen(
                [*command, *overrides], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    return processes


def test_srun_trains_like_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_training(one, "training.steps=2")
    for process in start_srun_ranks(two, "training.steps=2"):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    losses = [[r["loss"] for r in read_metrics(folder / "run")] for folder in (one, two)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert directory.complete_steps(two / "run") == [2]
    # Both ranks trained, each its half: the driver names ranks by torchrun's variable, absent here.
    lines = (two / "ids.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert len(consumed(one)[1]) == 8


def test_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    processes = start_srun_ranks(tmp_path, "training.steps=100000", "checkpoint.every_steps=100000")
    metrics = tmp_path / "run" / METRICS_FILE
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    (step,) = directory.complete_steps(tmp_path / "run")
    assert step == len(metrics.read_text().splitlines())
