"""A rank that gets nowhere says where it is stuck and ends; one that is slow goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_processes import free_port

from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.job.failures import HUNG_STATUS
from dsr_scale.train import hang_report
from dsr_scale.train.watch import FIRST_STEPS, StepTimes

BEFORE = """
import os, sys, time
from pathlib import Path
from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.train.failing import Account
from dsr_scale.train.watch import FIRST_STEPS, HangWatch, Timing

account = Account()
timing = Timing(look_s=0.05, ask_s=0.1, report_s=5.0, grace_s=0.2)
recovery = RecoveryConfig(hang_multiple=2.0, hang_least_s=0.5, start_timeout_s=30.0)
attempt = Path(os.environ["ATTEMPT"]) if "ATTEMPT" in os.environ else None

def watch(**changes):
    return HangWatch(account, recovery, attempt=attempt, timing=timing, **changes)

def step_through(watch, steps=FIRST_STEPS, seconds=0.01):
    for step in range(steps):
        watch.touch("forward_backward")
        time.sleep(seconds)
        watch.finish_step(step + 1)
"""


def run(
    program: str, folder: Path, *, attempt: bool = True
) -> tuple[int, str, dict[str, Any], str]:
    """Exit status, errors, account of the failure and report of a process."""
    environment = {
        **os.environ,
        "DSR_FAILURE": str(folder / "failure.json"),
        "SLURM_PROCID": "3",
        "SLURMD_NODENAME": "gpu-7",
    }
    if attempt:
        environment["ATTEMPT"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    failure = folder / "failure.json"
    report = folder / "rank_00003.stacks"
    return (
        done.returncode,
        done.stderr,
        json.loads(failure.read_text()) if failure.exists() else {},
        report.read_text() if report.exists() else "",
    )


HANG = """
def stuck_in_a_driver():
    time.sleep(60)

with watch() as w:
    step_through(w)
    w.touch("optimizer")
    stuck_in_a_driver()
"""


def test_hang_leaves_stacks_an_account_and_its_status(tmp_path: Path) -> None:
    status, errors, failure, report = run(HANG, tmp_path)
    assert status == HUNG_STATUS, errors
    assert "in stuck_in_a_driver" in report
    assert "is hang watch" in report
    first = report.splitlines()[0]
    assert first.startswith("rank 3 on gpu-7: ")
    assert f"s in optimizer after {FIRST_STEPS} steps, limit 0.5 s, median step 0.01" in first
    assert failure["kind"] == "hang"
    assert (failure["rank"], failure["node"]) == (3, "gpu-7")
    assert (failure["phase"], failure["step"]) == ("optimizer", FIRST_STEPS)
    assert failure["error"] == "stuck_in_a_driver"
    assert "stuck_in_a_driver" in failure["traceback"]
    assert str(tmp_path / "rank_00003.stacks") in errors


def test_without_an_attempt_stacks_go_to_the_log(tmp_path: Path) -> None:
    status, errors, _, report = run(HANG, tmp_path, attempt=False)
    assert status == HUNG_STATUS
    assert report == ""
    assert "in stuck_in_a_driver" in errors


def test_slow_but_moving_start_and_a_closed_watch_live(tmp_path: Path) -> None:
    program = """
with watch() as w:
    step_through(w)
    for _ in range(8):
        w.touch("forward_backward")
        time.sleep(0.2)
    w.touch("checkpoint")
    time.sleep(1.0)
time.sleep(1.0)
print("lived")
"""
    status, errors, failure, _ = run(program, tmp_path)
    assert status == 0, errors
    assert failure == {}


def test_waiting_for_encoders_may_take_longer(tmp_path: Path) -> None:
    program = """
with watch(outage_s=1.5) as w:
    step_through(w)
    w.touch(PHASE)
    time.sleep(1.4)
    w.touch("optimizer")
"""
    for phase, expected in (("data", 0), ("agree", 0), ("forward_backward", HUNG_STATUS)):
        status, errors, _, _ = run(program.replace("PHASE", repr(phase)), tmp_path)
        assert status == expected, (phase, errors)


def test_stopped_process_is_not_hung_when_it_goes_on(tmp_path: Path) -> None:
    program = """
import signal
with watch() as w:
    step_through(w)
    w.touch("optimizer")
    if os.fork() == 0:
        time.sleep(1.5)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)
    w.touch("agree")
"""
    status, errors, _, _ = run(program, tmp_path)
    assert status == 0, errors


def test_limit_follows_the_median_of_ordinary_steps() -> None:
    recovery = RecoveryConfig(hang_multiple=10.0, hang_least_s=5.0, start_timeout_s=900.0)
    times = StepTimes()
    assert times.limit_s("optimizer", recovery, 60.0) == 900.0
    assert times.limit_s("data", recovery, 60.0) == 960.0
    for _ in range(FIRST_STEPS - 1):
        times.spend("forward_backward", 300.0)  # compiling
        times.finish()
    assert times.limit_s("optimizer", recovery, 60.0) == 900.0
    for seconds in (1.0, 1.0, 2.0, 50.0):
        times.spend("forward_backward", seconds / 2)
        times.spend("checkpoint", 100.0)
        times.spend("agree", seconds / 2)
        times.finish()
    assert times.median_s == 1.5
    assert times.limit_s("optimizer", recovery, 60.0) == 15.0
    assert times.limit_s("agree", recovery, 60.0) == 75.0
    assert times.limit_s("checkpoint", recovery, 60.0) == 900.0
    for _ in range(100):
        times.spend("forward_backward", 0.01)
        times.finish()
    assert times.limit_s("optimizer", recovery, 60.0) == 5.0


def test_record_of_collectives_names_what_did_not_end() -> None:
    entry = {
        "pg_id": 0,
        "process_group": ["0", "default_pg"],
        "profiling_name": "nccl:all_reduce",
        "is_p2p": False,
        "collective_seq_id": 7,
        "p2p_seq_id": 0,
        "input_sizes": [[3]],
        "input_dtypes": ["Float"],
        "time_created_ns": 1_000_000_000,
        "state": "started",
        "retired": False,
    }
    ended = entry | {"collective_seq_id": 6, "state": "completed"}
    status = {"last_enqueued_collective": "7", "last_completed_collective": "6"}
    record = {"entries": [ended, entry], "pg_status": {"0": status}}
    lines = list(hang_report.described(record, now_ns=3_500_000_000))
    assert lines[0] == "group 0 default_pg: last enqueued 7, last completed 6"
    assert len(lines) == 2
    assert "nccl:all_reduce number 7" in lines[1]
    assert "started, begun 2.5 s ago, inputs [[3]]" in lines[1]


RANK = """
import threading
import torch
import torch.distributed as dist
from dsr_scale.parallel import groups

ranks = groups.start("cpu")
if ranks.rank == 1:
    # As in a checkpoint, whose limit is far away.
    with watch() as w:
        w.listen(ranks.store)
        w.touch("checkpoint")
        time.sleep(60)
with watch() as w:
    w.listen(ranks.store)
    step_through(w)
    w.touch("forward_backward")
    dist.all_reduce(torch.ones(3))
"""


@pytest.mark.xdist_group("ranks")
def test_one_rank_notices_and_both_leave_their_stacks(tmp_path: Path) -> None:
    port, processes = free_port(), []
    for rank in range(2):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ATTEMPT": str(tmp_path),
            "DSR_FAILURE": str(tmp_path / f"failure_{rank}.json"),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-c", BEFORE.replace("grace_s=0.2", "grace_s=3.0") + RANK]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    deadline = time.monotonic() + 120
    for process in processes:
        _, errors = process.communicate(timeout=deadline - time.monotonic())
        assert process.returncode == HUNG_STATUS, errors
    reports = [(tmp_path / f"rank_{rank:05d}.stacks").read_text() for rank in range(2)]
    assert "in all_reduce" in reports[0]
    assert "not ended: gloo:all_reduce number" in reports[0]
    assert reports[1].startswith("ended with another rank: rank 0 on ")
    assert "s in checkpoint before the first step" in reports[1].splitlines()[0]
    failures = [json.loads((tmp_path / f"failure_{rank}.json").read_text()) for rank in range(2)]
    assert [failure["error"] for failure in failures] == ["all_reduce", "<module>"]
