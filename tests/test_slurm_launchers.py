"""Launchers on a real Slurm cluster of virtual nodes; trainers and servers are lines of shell.

What is tested is what the launchers and `dsr-scale job` make of signals, deaths and lost nodes. That real
training survives the same is in test_slurm_training.py.
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, needs_slurm, until
from tiny_runs import write_config

pytestmark = [
    pytest.mark.xdist_group("slurm"),
    needs_slurm(),
]

NODES = 6


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


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A directory for PATH whose `dsr-scale` is the stand-in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "dsr-scale"
    script = Path(__file__).with_name("stand_in_dsr_scale.py")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(directory)


class Job:
    """A submitted launcher with two trainers and two encoder nodes."""

    def __init__(
        self,
        cluster: SlurmCluster,
        folder: Path,
        stand_in: str,
        *options: str,
        **variables: str,
    ) -> None:
        self.cluster = cluster
        self.log = folder / "job.log"
        self.run = folder / "run"
        self.restarts = 0
        self.marks = folder / "marks"
        self.marks.mkdir()
        overrides = variables.pop("OVERRIDES", "")
        self.id = cluster.submit(
            "launchers/t2i_8node.sh",
            self.log,
            *options,
            "--nodes=2",
            "--ntasks-per-node=1",
            variables={
                "PATH": f"{stand_in}:{cluster.environment['PATH']}",
                "SITE": "/nonexistent",
                "CONFIG": str(write_config(folder)),
                "OVERRIDES": f"encoder.mode=service {overrides}",
                "ENCODER_LISTEN": "127.0.0.1:0",
                "MARKS": str(self.marks),
                "RUN": str(self.run),
                **variables,
            },
        )

    def wait(self, *states: str, timeout_s: float = 40) -> str:
        return self.cluster.wait_for(self.id, *states, timeout_s=timeout_s, log=self.log)

    def wait_for_mark(self, name: str, count: int = 1) -> None:
        def there() -> bool:
            return len(list(self.marks.glob(name))) >= count

        until(there, 40, lambda: self.cluster.story(self.id, self.log))

    def wait_for_exclusion(self, node: str) -> None:
        until(
            lambda: self.cluster.field(self.id, "ExcNodeList") == node,
            60,
            lambda: self.cluster.story(self.id, self.log),
        )

    def wait_for_requeue(self, timeout_s: float = 60) -> None:
        until(
            lambda: self.cluster.field(self.id, "Restarts") == str(self.restarts + 1),
            timeout_s,
            lambda: self.cluster.story(self.id, self.log),
        )

    def start_now(self) -> None:
        self.restarts += 1
        self.cluster.start_now(self.id, self.log, restart=self.restarts, components=2)

    def attempt(self, number: int) -> Path:
        return self.run / "jobs" / self.id / str(number)

    def outcome(self, number: int) -> dict[str, object]:
        return json.loads((self.attempt(number) / "outcome.json").read_text())

    def text(self) -> str:
        return self.log.read_text()


# A trainer that stops when asked, and is done at its second attempt.
PATIENT = """
trap 'touch "$MARKS/asked.$SLURM_PROCID"; exit 138' USR1
trap 'touch "$MARKS/terminated.$SLURM_PROCID"; sleep 1; touch "$MARKS/saved.$SLURM_PROCID"; exit 143' TERM
touch "$MARKS/up.$(basename "$DSR_JOB").$SLURM_PROCID"
[ "$(basename "$DSR_JOB")" = 0 ] || exit 0
while :; do sleep 0.2; done
"""


def test_a_job_trains_beside_its_encoders_and_leaves_a_record(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        TRAIN='until [ $(ls "$MARKS" | grep -c serving) = 2 ]; do sleep 0.1; done; echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS at $MASTER_ADDR, $SLURM_CPUS_PER_TASK cores"',
        SERVE='trap \'touch "$MARKS/left.$SLURMD_NODENAME"; exit 0\' TERM; touch "$MARKS/serving.$SLURMD_NODENAME"; sleep 600 & wait',
        WANDB_API_KEY="hush",
    )
    job.wait("COMPLETED")
    attempt = job.attempt(0)
    logs = [(attempt / f"rank_0000{rank}.log").read_text() for rank in range(2)]
    assert logs == [f"rank {rank} of 2 at 127.0.0.11, 12 cores\n" for rank in range(2)]
    assert "rank 0 of 2" in job.text() and "rank 1 of 2" not in job.text()
    assert len(list(job.marks.glob("left.*"))) == 2, "encoders were not asked to end"
    record = attempt / "record"
    assert "#SBATCH hetjob" in (record / "launcher.sh").read_text()
    assert "encoder:" in (record / "config.yaml").read_text()
    assert "hush" not in (record / "environment.txt").read_text()
    assert job.outcome(0)["action"] == "finished"


def test_before_the_time_limit_trainers_are_asked_and_the_job_goes_on_later(
    cluster, tmp_path, stand_in
):
    job = Job(cluster, tmp_path, stand_in, TRAIN=PATIENT)
    job.wait_for_mark("up.0.*", 2)
    cluster.signal_batch(job.id, "USR1")
    job.start_now()
    job.wait("COMPLETED")
    assert len(list(job.marks.glob("asked.*"))) == 2
    assert not list(job.marks.glob("terminated.*"))
    attempt = json.loads((job.attempt(1) / "job.json").read_text())
    assert "time limit" in attempt["reason"] and attempt["failures"] == 0
    assert attempt["grace_s"] == 300
    assert "attempt in" in job.text().split("requeued")[0], "the first start's log is gone"


@pytest.mark.parametrize("whom", [("--batch",), ()], ids=["batch script", "tasks"])
def test_a_preempted_job_is_asked_to_save_and_requeued(cluster, tmp_path, stand_in, whom):
    job = Job(cluster, tmp_path, stand_in, TRAIN=PATIENT)
    job.wait_for_mark("up.0.*", 2)
    cluster.run("scancel", *whom, "--signal=TERM", job.id)
    job.start_now()
    job.wait("COMPLETED")
    assert "preempt" in json.loads((job.attempt(1) / "job.json").read_text())["reason"]


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, TRAIN=PATIENT)
    job.wait_for_mark("up.0.*", 2)
    cluster.run("scancel", job.id)
    job.wait("CANCELLED")
    assert len(list(job.marks.glob("saved.*"))) == 2
    assert not job.attempt(1).exists()


def test_the_same_failure_twice_stops_the_job_with_its_cause(cluster, tmp_path, stand_in):
    failure = json.dumps(
        {
            "rank": 1,
            "node": "node2",
            "kind": "error",
            "error": "ZeroDivisionError",
            "message": "division by zero",
            "step": 7,
            "phase": "forward_backward",
            "time_s": 1.0,
            "traceback": "Traceback …",
        }
    )
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        TRAIN=f"""
        if [ "$SLURM_PROCID" = 1 ]; then sleep 1; printf '%s' '{failure}' > "$DSR_FAILURE"; exit 1; fi
        sleep 300
        """,
    )
    job.start_now()
    assert job.wait("FAILED") == "FAILED"
    assert job.attempt(1).exists() and not job.attempt(2).exists()
    summary = (job.attempt(1) / "summary.txt").read_text()
    for text in (summary, job.text()):
        assert "rank 1 on node2" in text and "division by zero" in text and "step 7" in text
    assert job.outcome(0)["action"] == "requeue" and job.outcome(1)["action"] == "stop"


def test_a_killed_rank_ends_all_and_the_job_is_requeued(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        TRAIN="""
        touch "$MARKS/up.$(basename "$DSR_JOB").$SLURM_PROCID"
        [ "$(basename "$DSR_JOB")" = 0 ] || exit 0
        [ "$SLURM_PROCID" = 1 ] && { sleep 1; kill -9 $$; }
        sleep 300
        """,
    )
    job.start_now()
    job.wait("COMPLETED")
    assert "killed" in json.loads((job.attempt(1) / "job.json").read_text())["reason"]
    assert "rank 1 on node2" in (job.attempt(0) / "summary.txt").read_text()


def test_what_a_person_must_put_right_is_not_tried_again(cluster, tmp_path, stand_in):
    failure = json.dumps(
        {
            "rank": 0,
            "node": "node1",
            "kind": "input",
            "error": "InputError",
            "message": "found: no shards\nrequired: shards\nwhat to do: pack them",
            "step": None,
            "phase": "start",
            "time_s": 1.0,
            "traceback": "",
        }
    )
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        TRAIN=f"printf '%s' '{failure}' > \"$DSR_FAILURE\"; exit 2",
    )
    job.wait("FAILED")
    assert "what to do: pack them" in job.text()
    assert cluster.field(job.id, "Restarts") == "0"


def test_a_layout_that_does_not_fit_ends_before_any_node_is_used(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, OVERRIDES="parallel.tp=3")
    job.wait("FAILED")
    assert "parallel.tp" in job.text()
    assert not job.run.exists()


def test_a_bad_node_is_excluded_when_the_job_is_requeued(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        PREFLIGHT="""
        [ "$(basename "$DSR_JOB")" = 0 ] || exit 0
        mkdir -p "$DSR_JOB/preflight"; echo node2 > "$DSR_JOB/preflight/bad_nodes"; exit 3
        """,
        TRAIN='touch "$MARKS/trained.$SLURMD_NODENAME"',
    )
    job.wait_for_exclusion("node2")
    job.start_now()
    job.wait("COMPLETED")
    trained = {path.suffix for path in job.marks.glob("trained.*")}
    assert len(trained) == 2 and ".node2" not in trained


LOST = """
touch "$MARKS/up.$(basename "$DSR_JOB").$SLURM_PROCID"
echo "$SLURM_STEP_NUM_TASKS" > "$MARKS/ranks.$(basename "$DSR_JOB")"
[ "$(basename "$DSR_JOB")" = 0 ] || exit 0
sleep 300
"""


def test_a_lost_node_is_excluded_and_the_job_requeued(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, TRAIN=LOST)
    job.wait_for_mark("up.0.*", 2)
    lost_node = cluster.nodes_of(job.id)[-1]
    cluster.take_down(lost_node)
    job.start_now()
    job.wait("COMPLETED")
    assert lost_node in json.loads((job.attempt(1) / "job.json").read_text())["reason"]
    assert (job.marks / "ranks.1").read_text() == "2\n"


def test_a_lost_node_that_came_back_is_left_again(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, TRAIN=LOST)
    job.wait_for_mark("up.0.*", 2)
    lost_node = cluster.nodes_of(job.id)[-1]
    others = cluster.unused_nodes()
    cluster.take_down(lost_node)
    job.wait_for_requeue()
    cluster.bring_back()
    # Slurm has no choice but to give it to the job again.
    for node in others:
        cluster.take_down(node)
    job.start_now()
    job.wait_for_requeue()
    cluster.bring_back()
    job.start_now()
    job.wait("COMPLETED")
    assert f"{lost_node} is excluded and was allocated again" in job.text()
    assert lost_node not in json.loads((job.attempt(1) / "job.json").read_text())["nodes"]


def test_a_job_that_may_shrink_goes_on_at_once_without_a_lost_node(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, TRAIN=LOST, OVERRIDES="recovery.shrink=true")
    job.wait_for_mark("up.0.*", 2)
    lost_node = cluster.nodes_of(job.id)[-1]
    cluster.take_down(lost_node)
    job.wait("COMPLETED")
    assert cluster.field(job.id, "Restarts") == "0"
    assert (job.marks / "ranks.1").read_text() == "1\n"


def test_encoders_that_die_are_started_again_while_trainers_go_on(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        SERVE='touch "$MARKS/serving.$$"; exec sleep 600',
        TRAIN="""
        echo $$ > "$MARKS/trainer.$SLURM_PROCID.$$"
        while [ "$(ls "$MARKS" | grep -c serving)" -lt 4 ]; do sleep 0.2; done
        """,
    )
    job.wait_for_mark("serving.*", 2)
    job.wait_for_mark("trainer.*", 2)
    for mark in job.marks.glob("serving.*"):
        for process in cluster.processes("sleep", "600"):
            if process.pid == int(mark.suffix[1:]):
                process.kill()
    job.wait("COMPLETED")
    assert len(list(job.marks.glob("trainer.*"))) == 2, "trainers were started again"
    assert "encoders ended with status" in job.text()


@pytest.mark.parametrize("choice", ["external", "colocated"])
def test_encoders_elsewhere_give_their_node_back(cluster, tmp_path, stand_in, choice):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        ENCODERS=choice,
        TRAIN='touch "$MARKS/up"; sleep 2',
        SERVE='touch "$MARKS/serving.$SLURMD_NODENAME"; sleep 600',
    )
    job.wait_for_mark("up")
    second = str(int(job.id) + 1)
    until(
        lambda: cluster.state(second) in ("CANCELLED", "COMPLETING", "COMPLETED"),
        20,
        lambda: cluster.story(job.id, job.log),
    )
    trainers = set(cluster.nodes_of(job.id))
    job.wait("COMPLETED")
    serving = {path.suffix[1:] for path in job.marks.glob("serving.*")}
    assert serving == (trainers if choice == "colocated" else set())


def test_without_requeue_the_job_ends_and_says_how_to_go_on(cluster, tmp_path, stand_in):
    job = Job(cluster, tmp_path, stand_in, TRAIN=PATIENT, REQUEUE="0")
    job.wait_for_mark("up.0.*", 2)
    cluster.signal_batch(job.id, "USR1")
    job.wait("FAILED")
    assert "submit again to go on" in job.text()


def test_encoders_that_cannot_start_end_the_job(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        SERVE='while ! ls "$MARKS" | grep -q up; do sleep 0.2; done; echo "found: no weights" >&2; exit 2',
        TRAIN=PATIENT,
    )
    job.wait("FAILED")
    assert "encoder servers cannot start" in job.text() and "found: no weights" in job.text()
    assert len(list(job.marks.glob("asked.*"))) == 2
    assert cluster.field(job.id, "Restarts") == "0"


@pytest.mark.extended
def test_a_save_that_outlasts_the_time_limit_costs_a_requeue(cluster, tmp_path, stand_in):
    job = Job(
        cluster,
        tmp_path,
        stand_in,
        "--time=1",
        # In place of the launcher's own signal, which comes up to a minute early: here, at any time.
        "--signal=B:CONT@1",
        TRAIN="""
        trap : TERM USR1
        touch "$MARKS/up.$(basename "$DSR_JOB")"
        [ "$(basename "$DSR_JOB")" = 0 ] || exit 0
        while :; do sleep 0.2; done
        """,
    )
    job.wait_for_mark("up.0")
    cluster.signal_batch(job.id, "USR1")
    job.wait_for_requeue(timeout_s=150)
    job.start_now()
    job.wait("COMPLETED")
    assert "time limit came before the save was done" in job.text()
    assert "time limit" in json.loads((job.attempt(1) / "job.json").read_text())["reason"]
