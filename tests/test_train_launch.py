"""srun starts the same command; a signal, a lost rank and a mistake end all ranks as they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_processes import ForkedCommand, free_port
from tiny_runs import DRIVER, consumed, run_training, write_config

from dsr_scale.checkpoint import directory
from dsr_scale.job import run_lock
from dsr_scale.telemetry.metrics import METRICS_FILE, read_metrics
from dsr_scale.train import signals
from dsr_scale.train.signals import StopRequest, grace_warning

pytestmark = pytest.mark.xdist_group("ranks")


def srun_environments(folder: Path) -> list[dict[str, str]]:
    """The variables that srun and the launcher give to two tasks on one node."""
    port = free_port()
    return [
        {
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "4711",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURMD_NODENAME": f"node{rank}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DSR_FAILURE": str(folder / f"failure_{rank}.json"),
        }
        for rank in range(2)
    ]


def start_srun_ranks(folder: Path, *overrides: str) -> list[ForkedCommand]:
    """`dsr-scale train` as two tasks of srun."""
    config = str(write_config(folder))
    return [
        ForkedCommand("train", config, *overrides, environment=environment)
        for environment in srun_environments(folder)
    ]


def wait_for_steps(folder: Path, processes: list[ForkedCommand], steps: int = 2) -> None:
    """Until so many steps are logged."""
    metrics = folder / "run" / METRICS_FILE
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def failure_of(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"failure_{rank}.json").read_text())


def test_srun_trains_like_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_training(one, "training.steps=2")
    arguments = [str(write_config(two)), str(two / "ids.jsonl"), "0", "training.steps=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), *arguments],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in srun_environments(two)
    ]
    for process in processes:
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
    wait_for_steps(tmp_path, processes)
    # What Slurm sends before the time limit.
    processes[1].send_signal(signal.SIGUSR1)
    errors = [process.finish(200) for process in processes]
    statuses = [process.returncode for process in processes]
    # A rank that heard nothing itself ends like one that was asked to.
    assert statuses == [128 + signal.SIGTERM, 128 + signal.SIGUSR1], errors
    (step,) = directory.complete_steps(tmp_path / "run")
    assert step == len((tmp_path / "run" / METRICS_FILE).read_text().splitlines())
    assert list(tmp_path.glob("failure_*")) == []
    assert not (tmp_path / "run" / run_lock.LOCK_FILE).exists()


def test_death_of_one_rank_ends_the_other_with_an_account(tmp_path: Path) -> None:
    processes = start_srun_ranks(tmp_path, "training.steps=100000", "checkpoint.every_steps=1")
    wait_for_steps(tmp_path, processes)
    processes[0].kill()
    began = time.monotonic()
    errors = processes[1].finish(60)
    # Not held up by the thread that writes checkpoints, nor by a collective's half an hour.
    assert time.monotonic() - began < 30
    assert processes[1].returncode == 1, errors
    failure = failure_of(tmp_path, 1)
    assert (failure["rank"], failure["node"], failure["kind"]) == (1, "node1", "error")
    assert failure["step"] >= 1
    assert failure["phase"] != "start"
    assert failure["error"] in failure["traceback"]
    assert failure["message"].splitlines()[0] in errors


def test_mistake_in_the_run_file_is_an_account_of_every_rank(tmp_path: Path) -> None:
    processes = start_srun_ranks(tmp_path, "training.steps=-1")
    for rank, process in enumerate(processes):
        errors = process.finish(100)
        assert process.returncode == 2, errors
        failure = failure_of(tmp_path, rank)
        assert (failure["rank"], failure["kind"], failure["phase"]) == (rank, "input", "start")
        assert failure["step"] is None
        assert "training.steps" in failure["message"]


def test_run_directory_of_a_running_run_is_refused_to_all_ranks(tmp_path: Path) -> None:
    def never(error: object) -> None:
        raise AssertionError(error)

    with run_lock.held(tmp_path / "run", on_lost=never, tell=never):
        processes = start_srun_ranks(tmp_path)
        for rank, process in enumerate(processes):
            errors = process.finish(100)
            assert process.returncode == 2, errors
            assert f"is written by process {os.getpid()} on " in errors
            assert failure_of(tmp_path, rank)["kind"] == "input"
    assert not (tmp_path / "run" / METRICS_FILE).exists()


def test_signal_before_the_loop_is_found_by_it() -> None:
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with signals.remembered_early():
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopRequest() as request:
            assert request.signal_name == "SIGUSR1"
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal_name == "SIGTERM"
        with StopRequest() as request:
            assert request.signal_name is None
    # Processes forked later from this one would otherwise not heed SIGTERM.
    assert previous == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize(
    ("grace_s", "warned"),
    [(60.0, True), (98.9, True), (99.0, False), (300.0, False), (None, False)],
)
def test_grace_that_is_shorter_than_a_step_and_a_save(grace_s: float | None, warned: bool) -> None:
    warning = grace_warning(grace_s, save_s=95.0, step_s=4.0)
    assert (warning is not None) == warned
    if grace_s == 60.0:
        assert warning is not None
        assert "a save takes 95 s and a step 4 s, but the job is killed 60 s" in warning
