"""Rank arithmetic from launchers' variables, and ranks that do not come together; in one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NoReturn

import pytest
from rank_processes import free_port

from dsr_scale.base.errors import InputError
from dsr_scale.job.attempt import JOB_VARIABLE, Attempt
from dsr_scale.parallel import groups, rendezvous
from dsr_scale.parallel.ema import decay_at
from dsr_scale.parallel.groups import (
    Place,
    choose_device,
    place_from_environment,
    slurm_port,
)
from dsr_scale.parallel.rendezvous import RendezvousError

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
    ports = {slurm_port(str(job), attempt) for job in range(1000, 1100) for attempt in range(3)}
    assert len(ports) == 300
    # Above these Linux picks ports for outgoing connections.
    assert all(1024 < port < 32_768 for port in ports)


def test_attempts_of_a_job_meet_at_different_ports(tmp_path: Path) -> None:
    Attempt("123456", 2, "rank 3 crashed", 1, ("node1",), None, "now").write(tmp_path)
    environment = SRUN | {JOB_VARIABLE: str(tmp_path)}
    assert place_from_environment(environment).rendezvous == f"node1:{slurm_port('123456', 2)}"
    assert place_from_environment(environment | {"MASTER_PORT": "29"}).rendezvous == "node1:29"


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


def test_host_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unknown(host: str, *arguments: object, **options: object) -> NoReturn:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(rendezvous, "RESOLVE_TIMEOUT_S", 0.5)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    with pytest.raises(
        match=r"rank 5 on node7 tried node1:29000 for \d+ s: node1 has no address: Name or service",
    ):
        groups._join(Place(5, 8, 1, "node1:29000"), "gloo")
    assert asked == ["node1", "node1"], "name servers may need a moment"


def test_first_rank_names_those_that_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT_S", 1.0)
    with pytest.raises(RendezvousError, match="of 3 ranks these did not come: 1, 2\n"):
        groups._join(Place(0, 3, 0, f"127.0.0.1:{free_port()}"), "gloo")


def test_rank_whose_first_rank_is_not_there_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT_S", 1.0)
    place = Place(1, 2, 1, f"127.0.0.1:{free_port()}")
    with pytest.raises(
        RendezvousError, match=f"rank 1 on .* tried {place.rendezvous} for "
    ) as found:
        groups._join(place, "gloo")
    assert "MASTER_ADDR" in found.value.remedy
