"""Rank arithmetic from launchers' variables, without processes."""

from __future__ import annotations

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.parallel.ema import decay_at
from dsr_scale.parallel.groups import Place, choose_device, place_from_environment, slurm_port

SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "MASTER_ADDR": "node1",
}


def test_one_process() -> None:
    assert place_from_environment({}) == Place(0, 1, 0, None)


def test_batch_script_of_a_larger_job_is_one_process() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "5"}
    assert place_from_environment(environment) == Place(0, 1, 0, None)


def test_srun() -> None:
    assert place_from_environment(SRUN) == Place(9, 16, 1, f"node1:{slurm_port('123456')}")


def test_ports_of_neighbouring_jobs_differ() -> None:
    ports = {slurm_port(str(job)) for job in range(1000, 1100)}
    assert len(ports) == 100
    assert all(1024 < port < 2**16 for port in ports)


def test_torchrun_wins_inside_srun() -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "29",
    }
    assert place_from_environment(SRUN | torchrun) == Place(3, 4, 1, "a:29")


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(InputError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        place_from_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_more_processes_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("auto", 1).index == 1
    with pytest.raises(InputError, match="local rank 2, but 2 visible GPUs"):
        choose_device("auto", 2)
    assert choose_device("cpu", 2).type == "cpu"


def test_ema_forgets_the_start_then_reaches_its_decay() -> None:
    assert decay_at(0, 0.9999) == pytest.approx(0.1)
    assert decay_at(90, 0.9999) == pytest.approx(0.91)
    assert decay_at(10**6, 0.9999) == 0.9999
