"""Whole runs: wherever latents come from, and whatever happens to servers, training is the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_processes import ForkedCommand, rank_environments
from serving_processes import COMMAND, entries, kill, serving, until
from tiny_runs import checkpoint_tensors, consumed, run_training, write_config

from dsr_scale.checkpoint import directory
from dsr_scale.telemetry.metrics import METRICS_FILE, read_metrics
from dsr_scale.train.failing import OUTAGE_STATUS

pytestmark = pytest.mark.xdist_group("ranks")

COMMON = ("data.crop=center", "encoders.latent_dtype=bf16")

ENDLESS = ("training.steps=100000", "checkpoint.every_steps=100000")


def through(registry: Path) -> list[str]:
    return ["encoder.mode=service", f"encoder.registry={registry}"]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def in_folder(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    return run_training(folder, *COMMON, *overrides)


@contextlib.contextmanager
def training(folder: Path, *overrides: str, ranks: int = 1) -> Iterator[list[ForkedCommand]]:
    """`dsr-scale train` in the background, killed at the exit if it still runs."""
    folder.mkdir()
    config = str(write_config(folder))
    processes = [
        ForkedCommand("train", config, *COMMON, *overrides, environment=environment)
        for environment in rank_environments(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def steps_logged(run: Path) -> int:
    metrics = run / METRICS_FILE
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def assert_same_training(one: Path, other: Path, step: int) -> None:
    assert losses(one / "run") == losses(other / "run")
    assert consumed(one) == consumed(other)
    wanted, got = (checkpoint_tensors(folder / "run", step) for folder in (one, other))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.slow
def test_service_and_cache_train_bit_for_bit_as_inline(tmp_path: Path) -> None:
    inline, service, cache = (tmp_path / name for name in ("inline", "service", "cache"))
    in_folder(inline)
    registry, stored = tmp_path / "servers", tmp_path / "stored"
    config = inline / "tiny.yaml"
    with serving(config, registry, *COMMON):
        in_folder(service, *through(registry))
    assert_same_training(inline, service, 6)
    fill = [str(COMMAND), "encode", "package:emoji", str(stored), "--config", str(config), *COMMON]
    subprocess.run(fill, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    in_folder(cache, "encoder.mode=cache", f"encoder.cache={stored}")
    assert_same_training(inline, cache, 6)


@pytest.mark.slow
def test_servers_killed_one_by_one_leave_no_trace_in_the_losses(tmp_path: Path) -> None:
    longer = ("training.steps=60", "checkpoint.every_steps=60", "grid.every_steps=null")
    in_folder(tmp_path / "inline", *longer)
    registry, run = tmp_path / "servers", tmp_path / "service" / "run"
    with serving(tmp_path / "inline" / "tiny.yaml", registry, *COMMON, commands=2):
        first, second = entries(registry)
        with training(tmp_path / "service", *longer, *through(registry)) as (process,):
            until(lambda: steps_logged(run) >= 10, process)
            kill(first)
            until(lambda: steps_logged(run) >= 20, process)
            kill(second)
            until(lambda: steps_logged(run) >= 40 or process.poll() == 0)
            for server in entries(registry)[-1:]:
                kill(server)
            printed = process.finish(120)
            assert process.returncode == 0, printed
    assert losses(run) == losses(tmp_path / "inline" / "run")
    wanted, got = (checkpoint_tensors(tmp_path / n / "run", 60) for n in ("inline", "service"))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.slow
def test_without_servers_it_waits_says_so_once_and_heeds_signals(tmp_path: Path) -> None:
    registry, run = tmp_path / "servers", tmp_path / "run_it" / "run"
    (tmp_path / "config").mkdir()
    config = write_config(tmp_path / "config")
    with (
        serving(config, registry, *COMMON) as command,
        training(tmp_path / "run_it", *ENDLESS, *through(registry)) as (process,),
    ):
        until(lambda: steps_logged(run) >= 3, process)
        command.stop_for_good()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        printed = process.finish(60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert directory.complete_steps(run) == [steps_logged(run)]
    assert printed.count("no encoder server answers") == 1, printed


@pytest.mark.slow
def test_after_waiting_long_enough_all_ranks_save_and_end_with_an_error(tmp_path: Path) -> None:
    registry, run = tmp_path / "servers", tmp_path / "run_it" / "run"
    (tmp_path / "config").mkdir()
    config = write_config(tmp_path / "config")
    folder = tmp_path / "run_it"
    with (
        serving(config, registry, *COMMON) as command,
        training(
            folder, *ENDLESS, *through(registry), "encoder.give_up_after_s=2", ranks=2
        ) as processes,
    ):
        until(lambda: steps_logged(run) >= 3, *processes)
        command.stop_for_good()
        for process in processes:
            printed = process.finish(60)
            assert process.returncode == OUTAGE_STATUS, printed
            assert "no encoder server answered for 2 s" in printed
    assert directory.complete_steps(run) == [steps_logged(run)]
