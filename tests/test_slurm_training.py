"""Real training under the launchers on a real Slurm cluster of virtual nodes, on CPUs.

Whatever a cluster does to a job, its weights are those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, needs_slurm, until
from tiny_runs import checkpoint_tensors, run_training, write_config

from dsr_scale.checkpoint.directory import complete_steps
from dsr_scale.telemetry.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
    needs_slurm(),
]

NODES = 10


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), NODES)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(booted: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, left idle for the next test."""
    yield booted
    booted.clear()


class Job:
    """A launcher with a tiny run; `t2i_1node.sh` on as many nodes as asked for, without servers."""

    def __init__(
        self,
        cluster: SlurmCluster,
        folder: Path,
        *overrides: str,
        nodes: int = 2,
        launcher: str = "t2i_1node.sh",
        name: str = "job",
        **variables: str,
    ) -> None:
        self.cluster = cluster
        self.log = folder / f"{name}.log"
        self.run = folder / "run"
        self.restarts = 0
        whole = launcher == "t2i_8node.sh"
        self.id = cluster.submit(
            f"launchers/{launcher}",
            self.log,
            *([] if whole else [f"--nodes={nodes}"]),
            "--ntasks-per-node=1",
            variables={
                "SITE": "/nonexistent",
                "CONFIG": str(write_config(folder)),
                "OVERRIDES": " ".join(overrides),
                "ENCODERS": "hetjob" if whole else "external",
                "ENCODER_LISTEN": "127.0.0.1:0",
                "OMP_NUM_THREADS": "1",
                **variables,
            },
        )

    def story(self) -> str:
        told = [self.cluster.story(self.id, self.log)]
        for path in sorted(self.run.glob(f"jobs/{self.id}/*/*.log")):
            told.append(f"{path.name} of attempt {path.parent.name}:\n{path.read_text()[-1500:]}")
        return "\n".join(told)

    def wait(self, *states: str, timeout_s: float = 180) -> None:
        until(lambda: self.cluster.state(self.id) in states, timeout_s, self.story)

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        def reached() -> bool:
            assert self.cluster.state(self.id) != "FAILED", self.story()
            if not (self.run / "metrics.jsonl").exists():
                return False
            records = read_metrics(self.run)
            return bool(records) and records[-1]["step"] >= step

        until(reached, timeout_s, self.story)

    def trainer(self, rank: int) -> int:
        """Process of a rank: the child of its wrapper."""
        for wrapper in self.cluster.processes("launchers/rank.sh"):
            for child in wrapper.children():
                if child.environ().get("SLURM_PROCID") == str(rank) and child.name() != "tee":
                    return child.pid
        raise AssertionError(f"no rank {rank}\n{self.story()}")

    def finish(self) -> None:
        """Until the job is complete, however often it is queued again.

        Slurm's controller sends a signal once more that a stopped process did not take, a minute later,
        and by then may hit the step of the same number in the job's next start.
        """
        deadline = time.monotonic() + 240
        while self.cluster.state(self.id) != "COMPLETED":
            assert time.monotonic() < deadline, self.story()
            if self.cluster.field(self.id, "Restarts") == str(self.restarts + 1):
                self.start_now()
            time.sleep(0.2)

    def start_now(self) -> None:
        het = 2 if self.cluster.field(self.id, "HetJobId") else 1
        self.restarts += 1
        self.cluster.start_now(self.id, self.log, restart=self.restarts, components=het)

    def summary(self, attempt: int) -> str:
        return (self.run / "jobs" / self.id / str(attempt) / "summary.txt").read_text()


def same_weights(one: Path, other: Path, step: int, tolerance: float = 0.0) -> None:
    """Every tensor of two checkpoints agrees, relative to its largest value."""
    first, second = checkpoint_tensors(one, step), checkpoint_tensors(other, step)
    assert first.keys() == second.keys()
    for name, values in first.items():
        scale = float(values.abs().max()) or 1.0
        difference = float((values - second[name]).abs().max()) / scale
        assert difference <= tolerance, f"{name} differs by {difference}"


STEPS = 80
SHORT = (f"training.steps={STEPS}", "checkpoint.every_steps=10", "training.precision=fp32")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that trained the same without a cluster."""
    return run_training(tmp_path_factory.mktemp("undisturbed"), *SHORT, ranks=2)


def test_signal_kill_and_hang_of_a_rank_leave_no_trace_in_the_weights(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: Path
):
    job = Job(cluster, tmp_path, *SHORT, "recovery.hang_least_s=6", "recovery.start_timeout_s=120")
    job.wait_for_step(5)
    cluster.signal_batch(job.id, "USR1")
    job.start_now()
    job.wait("RUNNING")
    assert complete_steps(job.run), "nothing was saved before the requeue"
    job.wait_for_step(20)
    os.kill(job.trainer(1), signal.SIGKILL)
    job.start_now()
    job.wait("RUNNING")
    job.wait_for_step(45)
    os.kill(job.trainer(1), signal.SIGSTOP)
    job.start_now()
    job.finish()
    assert "time limit" in job.summary(0)
    assert "rank 1" in job.summary(1) and "killed" in job.summary(1)
    assert "hang" in job.summary(2) and "rank 1" in job.summary(2)
    stacks = (job.run / "jobs" / job.id / "2" / "rank_00000.stacks").read_text()
    assert "loop.py" in stacks
    same_weights(job.run, undisturbed, STEPS)
    losses = {r["step"]: r["loss"] for r in read_metrics(job.run)}
    assert losses == {r["step"]: r["loss"] for r in read_metrics(undisturbed)}
    restarts = [r["restarts"] for r in read_metrics(job.run)]
    assert restarts[0] == 0 and restarts[-1] >= 3


def test_a_dead_slurmd_costs_a_requeue_and_nothing_else(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: Path
):
    long = (*SHORT[1:], "training.steps=100000", "checkpoint.every_steps=50")
    job = Job(cluster, tmp_path, *long)
    job.wait_for_step(60)
    last = cluster.nodes_of(job.id)[-1]
    cluster.kill_slurmd(last)
    # Slurm notices after SlurmdTimeout; the processes on that node go on until their peers are ended.
    until(lambda: cluster.state(job.id) == "PENDING", 180, job.story)
    outcome = json.loads((job.run / "jobs" / job.id / "0" / "outcome.json").read_text())
    assert outcome["exclude"] == [last]
    saved = complete_steps(job.run)[-1]
    assert f"node {last}" in job.summary(0)
    job.start_now()
    job.wait("RUNNING")
    job.wait_for_step(saved + 1)
    assert last not in cluster.nodes_of(job.id)
    cluster.run("scancel", job.id)
    job.wait("CANCELLED", "COMPLETED", "FAILED")
    same = run_training(tmp_path / "again", f"training.steps={saved}", *SHORT[1:], ranks=2)
    same_weights(job.run, same, saved)


def test_two_jobs_do_not_write_one_run_directory(cluster: SlurmCluster, tmp_path: Path):
    first = Job(cluster, tmp_path, "training.steps=100000")
    first.wait_for_step(1)
    second = Job(cluster, tmp_path, "training.steps=100000", name="second")
    second.wait("FAILED")
    assert "run.lock" in second.log.read_text() or "is written by" in second.log.read_text()
    assert cluster.field(second.id, "Restarts") == "0"
    assert cluster.state(first.id) == "RUNNING", first.story()
    cluster.run("scancel", first.id)
    first.wait("CANCELLED", "COMPLETED")
    assert complete_steps(first.run), "a cancelled job did not save"


def test_a_wrong_number_of_gpus_ends_the_job_in_the_preflight(
    cluster: SlurmCluster, tmp_path: Path
):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\nfor i in 0 1 2 3 4 5 6; do echo "
        '"$i, NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15, 0"; done\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    path = f"{tool.parent}:{cluster.environment['PATH']}"
    job = Job(cluster, tmp_path, "training.device=auto", PATH=path, GPUS_PER_NODE="8")
    job.wait("FAILED")
    assert "7" in job.log.read_text() and "8" in job.log.read_text()
    assert not (job.run / "metrics.jsonl").exists()


def test_a_full_disk_ends_the_job_with_what_was_needed(cluster: SlurmCluster, tmp_path: Path):
    disk = tmp_path / "run"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)])
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        job = Job(cluster, tmp_path, "training.steps=100000", "checkpoint.every_steps=20")
        job.wait_for_step(5)
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        job.wait("FAILED")
        assert "no space left" in job.log.read_text().lower(), job.story()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_eight_nodes_with_encoders_from_submission_to_samples(
    cluster: SlurmCluster, tmp_path: Path
):
    steps = 12
    settings = (
        f"training.steps={steps}",
        "checkpoint.every_steps=4",
        "training.microbatch_images=2",
    )
    layout = ("parallel.tp=2", "parallel.pp=2", "encoder.mode=service")
    job = Job(cluster, tmp_path, *settings, *layout, launcher="t2i_8node.sh")
    job.wait_for_step(2, timeout_s=300)
    cluster.processes("dsr-scale", "serve", "encoder.mode=service")[0].kill()
    job.wait("COMPLETED", timeout_s=300)
    assert "encoders ended with status" in job.log.read_text()
    alone = run_training(tmp_path / "alone", *settings)
    same_weights(job.run, alone, steps, tolerance=1e-3)

    export = cluster.submit(
        "launchers/export.sh",
        tmp_path / "export.log",
        variables={"SITE": "/nonexistent", "RUN": str(job.run)},
    )
    cluster.wait_for(export, "COMPLETED", timeout_s=90, log=tmp_path / "export.log")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("lobster\ntaxi\n")
    drawn = cluster.submit(
        "launchers/evaluate.sh",
        tmp_path / "evaluate.log",
        variables={
            "SITE": "/nonexistent",
            "BUNDLE": str(job.run / "bundle"),
            "PROMPTS": str(prompts),
            "OPTIONS": "--steps 2",
        },
    )
    cluster.wait_for(drawn, "COMPLETED", timeout_s=90, log=tmp_path / "evaluate.log")
    assert (job.run / "bundle" / "samples.png").stat().st_size > 0


def test_exporting_a_run_without_a_checkpoint_says_so(cluster: SlurmCluster, tmp_path: Path):
    (tmp_path / "run").mkdir()
    log = tmp_path / "export.log"
    job = cluster.submit(
        "launchers/export.sh", log, variables={"SITE": "/nonexistent", "RUN": str(tmp_path / "run")}
    )
    cluster.wait_for(job, "FAILED", timeout_s=60, log=log)
    assert "no complete checkpoint" in log.read_text()


def test_a_first_host_that_cannot_be_found_is_named(cluster: SlurmCluster, tmp_path: Path):
    done = subprocess.run(
        [
            *("srun", "--nodes=2", "--ntasks-per-node=1"),
            *("dsr-scale", "train", str(write_config(tmp_path))),
        ],
        env={**cluster.environment, "MASTER_ADDR": "no-such-host.invalid", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no-such-host.invalid" in done.stderr and "MASTER_ADDR" in done.stderr
    assert "rank 1" in done.stderr and "what to do" in done.stderr
