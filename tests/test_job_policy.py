"""What follows an attempt, over whole jobs: each case is a history and the decision after its last part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.config.load import load_run
from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.config.run import RunConfig
from dsr_scale.job import policy
from dsr_scale.job.attempt import Attempt, attempt_directory, attempts_of
from dsr_scale.job.cause import Cause
from dsr_scale.job.layouts import nodes_to_use, valid_nodes
from dsr_scale.job.policy import Decision, decide

NODES = ("n0", "n1", "n2", "n3")


def error(step: int | None = 1203, node: str = "n1", signature: str = "ValueError: #") -> Cause:
    """An exception of one rank."""
    return Cause(
        "error",
        "ValueError: 7",
        f"rank 1 on {node}",
        (1,),
        (node,),
        step,
        "start" if step is None else "forward_backward",
        signature,
        repeatable=True,
    )


def killed(name: str = "SIGKILL", step: int | None = 1203, node: str = "n1") -> Cause:
    """One rank ended by a signal; the step is unknown where it is None."""
    phase = None if step is None else "forward_backward"
    own = name == "SIGSEGV"
    return Cause("signal", name, "rank 1", (1,), (node,), step, phase, name, repeatable=own)


HUNG = Cause("hang", "hang in data", "rank 1 on n1", (1,), ("n1",), 7, "data", "hang in data")
STARTING = replace(killed("SIGSEGV", None), phase="start")
OUTAGE = Cause("outage", "servers are away", step=7, phase="data", signature="Outage")
LOST = Cause("lost_node", "node n2 lost, says Slurm", nodes=("n2",))
BAD = Cause("bad_node", "nodes n0, n3 failed the preflight", nodes=("n0", "n3"))
INPUT = Cause("input", "found: a\nrequired: b\nwhat to do: c", signature="InputError: a")
UNKNOWN = Cause("unknown", "the trainers ended with status 1 and left no account")
DONE = Cause("done", "all steps are done")
PREEMPTED = Cause("preempted", "preempted")
TIME_LIMIT = Cause("time_limit", "the time limit came near")
CANCELLED = Cause("cancelled", "cancelled")
ENCODERS = Cause("encoders", "the encoder servers cannot start")

Past = list[tuple[Cause, int | None]]


def job(past: Past, *, nodes: tuple[str, ...] = NODES, most: int = 10) -> list[Decision]:
    """Decisions of a job whose attempts ended so, each with the newest checkpoint at that time."""
    decisions: list[Decision] = []
    for cause, checkpoint_step in past:
        decisions.append(
            decide(
                cause,
                status=1,
                nodes=nodes,
                checkpoint_step=checkpoint_step,
                earlier=list(decisions),
                recovery=RecoveryConfig(most_failures=most),
            )
        )
    return decisions


@pytest.mark.parametrize(
    ("cause", "action", "exclude", "failures"),
    [
        (DONE, "finished", (), 0),
        (ENCODERS, "stop", (), 0),
        (TIME_LIMIT, "requeue", (), 0),
        (PREEMPTED, "requeue", (), 0),
        (CANCELLED, "stop", (), 0),
        (INPUT, "stop", (), 1),
        (OUTAGE, "requeue", (), 1),
        (HUNG, "requeue", (), 1),
        (error(), "requeue", (), 1),
        (killed(), "requeue", (), 1),
        (LOST, "requeue", ("n2",), 1),
        (BAD, "requeue", ("n0", "n3"), 1),
        (UNKNOWN, "requeue", (), 1),
    ],
    ids=lambda value: value.kind if isinstance(value, Cause) else "",
)
def test_the_first_attempt(
    cause: Cause, action: str, exclude: tuple[str, ...], failures: int
) -> None:
    (decision,) = job([(cause, None)])
    assert (decision.action, decision.exclude, decision.failures) == (action, exclude, failures)


@pytest.mark.parametrize(
    ("past", "action"),
    [
        ([(error(), 1200), (error(), 1200)], "stop"),
        # It saved on the way: the second attempt began later and met it again.
        ([(error(), None), (error(), 1200)], "stop"),
        ([(error(), 1200), (PREEMPTED, 1200), (error(), 1200)], "stop"),
        ([(error(step=None), None), (error(step=None), None)], "stop"),
        # Before the first step again, but the job had got past it in the meantime.
        ([(error(step=None), None), (PREEMPTED, 900), (error(step=None), 900)], "requeue"),
        ([(error(), 1200), (error(step=1204), 1200)], "requeue"),
        ([(error(), 1200), (error(signature="KeyError: #"), 1200)], "requeue"),
        ([(error(), 1200), (LOST, 1200), (error(), 1200)], "requeue"),
        ([(killed("SIGSEGV"), 1200), (killed("SIGSEGV"), 1200)], "stop"),
        ([(killed("SIGSEGV", None), 1200), (killed("SIGSEGV", None), 1200)], "requeue"),
        # Once it is known to have been before the first step, once nothing is known.
        ([(killed("SIGSEGV", None), 1200), (STARTING, 1200)], "requeue"),
        ([(STARTING, 1200), (killed("SIGSEGV", None), 1200)], "requeue"),
        ([(STARTING, 1200), (STARTING, 1200)], "stop"),
        ([(killed(), 1200), (killed(), 1200)], "requeue"),
        ([(HUNG, None), (HUNG, None)], "requeue"),
        ([(OUTAGE, None), (OUTAGE, None)], "requeue"),
        ([(LOST, None), (LOST, None)], "requeue"),
        ([(UNKNOWN, None), (UNKNOWN, None)], "requeue"),
    ],
)
def test_the_same_failure_at_the_same_step_twice_stops(past: Past, action: str) -> None:
    last = job(past)[-1]
    assert last.action == action
    assert last.reason.startswith("the same failure twice") == (action == "stop")
    if action == "stop":
        assert last.exclude == ()


def test_where_the_same_failure_stopped_is_said() -> None:
    step = job([(error(), 1200), (error(), 1200)])[-1]
    assert step.reason == "the same failure twice at step 1203: a restart would meet it again"
    start = job([(error(None), None), (error(None), None)])[-1]
    assert "twice before the first step" in start.reason


def test_failures_count_until_a_new_checkpoint() -> None:
    past: Past = [
        (killed(step=1), None),
        (HUNG, None),
        (PREEMPTED, None),
        (OUTAGE, None),
        (LOST, 100),
        (killed(step=130), 100),
        # The newest checkpoint was damaged and set aside: no progress.
        (OUTAGE, 50),
        (UNKNOWN, 80),
    ]
    assert [decision.failures for decision in job(past)] == [1, 2, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(("most", "attempts"), [(0, 1), (1, 1), (3, 3)])
def test_so_many_failures_without_a_checkpoint_stop(most: int, attempts: int) -> None:
    past: Past = [(OUTAGE, 10)] * 5
    actions = [decision.action for decision in job(past, most=most)]
    assert actions.index("stop") == attempts - 1
    ended = job(past[:attempts], most=most)[-1]
    assert f"recovery.most_failures is {most}" in ended.reason
    progressing: Past = [(OUTAGE, step) for step in range(5)]
    assert "stop" not in [decision.action for decision in job(progressing, most=2)]


@pytest.mark.parametrize(
    ("past", "nodes", "exclude"),
    [
        ([(HUNG, 1), (killed(step=9), 2)], NODES, ("n1",)),
        ([(error(3), 1), (PREEMPTED, 2), (error(9), 3)], NODES, ("n1",)),
        ([(HUNG, 1), (killed(node="n2"), 2)], NODES, ()),
        ([(HUNG, 1), (OUTAGE, 2)], NODES, ()),
        ([(replace(OUTAGE, nodes=("n1",)), 1), (HUNG, 2)], NODES, ()),
        # All that goes wrong on one node goes wrong there.
        ([(HUNG, 1), (killed(step=9), 2)], ("n1",), ()),
    ],
)
def test_a_node_that_was_the_cause_twice_is_excluded(
    past: Past, nodes: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    assert job(past, nodes=nodes)[-1].exclude == exclude


def test_a_preflight_that_fails_everywhere_is_no_matter_of_nodes() -> None:
    assert job([(BAD, None)])[-1].action == "requeue"
    alone = Cause("bad_node", "node n0 failed the preflight", nodes=("n0",))
    assert job([(alone, None)], nodes=("n0",))[-1].exclude == ("n0",)
    (everywhere,) = job([(BAD, None)], nodes=("n0", "n3"))
    assert (everywhere.action, everywhere.exclude) == ("stop", ())
    assert "what they share" in everywhere.reason


@pytest.mark.parametrize(
    ("cause", "shrink", "smaller", "most", "action"),
    [
        (LOST, True, 2, 10, "restart"),
        (LOST, True, None, 10, "requeue"),
        (LOST, False, 2, 10, "requeue"),
        (LOST, True, 2, 1, "stop"),
        (HUNG, True, 2, 10, "requeue"),
    ],
)
def test_fewer_nodes_only_after_a_lost_one(
    cause: Cause, shrink: bool, smaller: int | None, most: int, action: str
) -> None:
    decision = decide(
        cause,
        status=1,
        nodes=NODES,
        checkpoint_step=None,
        earlier=[],
        recovery=RecoveryConfig(shrink=shrink, most_failures=most),
        smaller=smaller,
    )
    assert decision.action == action
    if action == "restart":
        assert decision.exclude == ("n2",)
        assert "2 of the nodes that are left" in decision.reason


def test_a_decision_survives_its_file_and_a_torn_file_is_none(tmp_path: Path) -> None:
    (decision,) = job([(BAD, 5)])
    decision.write(tmp_path)
    assert Decision.read(tmp_path) == decision
    path = tmp_path / policy.OUTCOME_FILE
    whole = path.read_text()
    for torn in ("", whole[:50], "[]", "{}", whole.replace("signature", "other")):
        path.write_text(torn)
        assert Decision.read(tmp_path) is None
    path.unlink()
    assert Decision.read(tmp_path) is None


def begun(run: Path, job_id: str, number: int, decision: Decision | None) -> None:
    """An attempt on disk, with its outcome if it has one."""
    directory = attempt_directory(run, job_id, number)
    Attempt(job_id, number, "", 0, NODES, None, "").write(directory)
    if decision is not None:
        decision.write(directory)


def test_why_an_attempt_follows(tmp_path: Path) -> None:
    failed, preempted = job([(error(), 5), (PREEMPTED, 5)])
    assert policy.reason_to_follow(attempts_of(tmp_path, "7")) == ""
    begun(tmp_path, "7", 0, failed)
    assert policy.reason_to_follow(attempts_of(tmp_path, "7")) == "rank 1 on n1: ValueError: 7"
    begun(tmp_path, "7", 1, preempted)
    assert policy.reason_to_follow(attempts_of(tmp_path, "7")) == "preempted"
    begun(tmp_path, "7", 2, None)
    assert policy.reason_to_follow(attempts_of(tmp_path, "7")) == (
        "node of the batch script lost, or preempted"
    )
    begun(tmp_path, "7", 3, job([(CANCELLED, 5)])[0])
    assert policy.reason_to_follow(attempts_of(tmp_path, "7")) == "by hand, after: cancelled"
    begun(tmp_path, "7", 4, job([(error(signature="x"), 5)])[0])
    assert len(policy.reason_to_follow(attempts_of(tmp_path, "7"))) <= 120


def test_attempts_without_an_outcome_count_neither_way(tmp_path: Path) -> None:
    (failed,) = job([(OUTAGE, 5)])
    begun(tmp_path, "7", 0, failed)
    begun(tmp_path, "7", 1, None)
    earlier = policy.history(attempts_of(tmp_path, "7"))
    assert earlier == [failed]
    assert policy.failures_since_checkpoint(earlier, 5) == 1
    assert policy.failures_since_checkpoint(earlier, 6) == 0
    # Another job of the same run has a history of its own.
    assert policy.history(attempts_of(tmp_path, "8")) == []


def tiny(tmp_path: Path, *overrides: str) -> RunConfig:
    """A run with replicas of 4 devices and a global batch for 8 of them."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: t\ndirectory: {tmp_path}/run\ndata: {{shards: s, resolution: 64}}\n"
        "encoders: {image: {kind: pixels, patch: 8}, text: {kind: bytes}}\n"
        "model: {width: 64, depth: 4, heads: 4, conditioning: {kind: cross_attention}}\n"
        "parallel: {tp: 2, pp: 2}\n"
        "training: {global_batch_images: 16, microbatch_images: 1}\n"
    )
    return load_run(path, overrides)


def test_nodes_are_those_at_which_replicas_and_batch_divide(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    # dp = devices / 4 divides 16 images and leaves at least 2 micro-batches for 2 pipeline ranks.
    by_hand = {
        devices: [
            n for n in range(1, 33) if n * devices % 4 == 0 and n * devices // 4 in (1, 2, 4, 8)
        ]
        for devices in (1, 2, 4, 8)
    }
    assert by_hand[8] == [1, 2, 4]
    for devices, expected in by_hand.items():
        assert valid_nodes(run, 32, devices) == expected


def test_nodes_to_use_shrink_only_where_allowed(tmp_path: Path) -> None:
    assert nodes_to_use(tiny(tmp_path), 4, 8) == 4
    with pytest.raises(InputError) as refused:
        nodes_to_use(tiny(tmp_path), 3, 8)
    assert refused.value.required.endswith("divide: 1, 2, 4")
    assert "recovery.shrink" in refused.value.remedy and refused.value.remedy.endswith("with 2")
    assert nodes_to_use(tiny(tmp_path, "recovery.shrink=true"), 3, 8) == 2
    # Nothing smaller fits: shrinking cannot help, and larger numbers are named.
    with pytest.raises(InputError, match="divide: 4"):
        nodes_to_use(tiny(tmp_path, "recovery.shrink=true"), 2, 1)
    with pytest.raises(InputError, match=r"model\.heads"):
        nodes_to_use(tiny(tmp_path, "model.heads=3", "recovery.shrink=true"), 2, 8)


@pytest.mark.parametrize(
    ("past", "action"),
    [
        ([(TIME_LIMIT, None)] * 2, "requeue"),
        ([(TIME_LIMIT, None)] * 3, "stop"),
        ([(TIME_LIMIT, 10), (TIME_LIMIT, 20), (TIME_LIMIT, 30), (TIME_LIMIT, 40)], "requeue"),
        ([(TIME_LIMIT, 10)] * 3, "requeue"),
        ([(TIME_LIMIT, 10)] * 4, "stop"),
        ([(TIME_LIMIT, 10), (TIME_LIMIT, 10), (PREEMPTED, 10), (TIME_LIMIT, 10)], "requeue"),
    ],
)
def test_a_time_limit_too_short_to_save_anything_is_not_met_for_ever(
    past: Past, action: str
) -> None:
    assert job(past)[-1].action == action
