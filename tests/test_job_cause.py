"""One cause out of what all ranks left: each case is an attempt as it would look on disk or in memory."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.job import evidence as evidence_module
from dsr_scale.job.attempt import Attempt
from dsr_scale.job.cause import Cause, find_cause, is_consequence, signature_of
from dsr_scale.job.evidence import Evidence, gather, tail
from dsr_scale.job.failures import Failure, Kind, RankEnd, write_failure
from dsr_scale.job.policy import Decision, decide
from dsr_scale.job.summary import cause_block, log_of, summary

PEER_GONE = {
    "gloo closed": "[pair.cc:547] Connection closed by peer [10.0.0.3]:4711",
    "gloo reset": "[pair.cc:537] Read error [127.0.0.1]:40578: Connection reset by peer. This is",
    "gloo pipe": "[pair.cc:333] writev [10.0.0.3]:4711: Broken pipe",
    "nccl aborted": "NCCL communicator was aborted on rank 1.",
    "store": "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shut",
}
INPUT = "found: no shard 7\nrequired: all shards\nwhat to do: copy it again"


def failure(
    rank: int,
    message: str = "CUDA error: an illegal memory access was encountered\nCompile with DSA",
    *,
    error: str = "RuntimeError",
    kind: Kind = "error",
    step: int | None = 1203,
    phase: str = "forward_backward",
    time_s: float = 100.0,
) -> Failure:
    """An account of a rank on its own node."""
    return Failure(rank, f"n{rank}", kind, error, message, step, phase, time_s, "Traceback …")


def hung(
    rank: int, step: int = 7, phase: str = "forward_backward", time_s: float = 100.0
) -> Failure:
    """A rank's account of a hang."""
    return failure(rank, "", error="collective", kind="hang", step=step, phase=phase, time_s=time_s)


def peer_gone(rank: int, time_s: float = 100.0) -> Failure:
    """An account of another rank's death."""
    return failure(rank, PEER_GONE["gloo reset"], time_s=time_s)


def rank_end(rank: int, status: int, time_s: float) -> RankEnd:
    """How the process of a rank on its own node ended."""
    return RankEnd(rank, f"n{rank}", status, time_s)


def cause_of(
    failures: list[Failure] | None = None,
    ends: list[RankEnd] | None = None,
    *,
    ranks: int = 4,
    status: int = 1,
    **more: object,
) -> Cause:
    """The cause that accounts and ends of `ranks` ranks speak for."""
    known = frozenset(range(ranks))
    more = {"ranks": known, **more}
    return find_cause(Evidence(status, failures=failures or [], ends=ends or [], **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("message", PEER_GONE.values(), ids=PEER_GONE)
def test_an_account_of_a_lost_peer_is_never_the_cause(message: str) -> None:
    lost = [failure(rank, message, time_s=100.0 + rank) for rank in (0, 1, 3)]
    cause = cause_of([*lost, failure(2, time_s=104.0)])
    assert cause.line == "rank 2 on n2: RuntimeError: CUDA error: an illegal memory access was " + (
        "encountered"
    )
    assert (cause.ranks, cause.nodes, cause.step, cause.others) == ((2,), ("n2",), 1203, 3)
    assert cause.repeatable


def test_the_same_words_outside_of_collectives_are_a_cause() -> None:
    download = failure(0, "('Connection aborted.', ConnectionResetError(104, 'Connection reset'))")
    assert is_consequence(download)
    assert not is_consequence(failure(0, download.message, error="ReadTimeoutError"))
    assert not is_consequence(failure(0, download.message, kind="outage"))


def test_the_earliest_account_wins_not_the_lowest_rank() -> None:
    first = failure(3, "boom", error="ValueError", time_s=99.0)
    cause = cause_of([failure(0, "bang", error="KeyError", time_s=99.5), first, peer_gone(1)])
    assert cause.line == "rank 3 on n3: ValueError: boom"


def test_only_accounts_of_peers_name_the_silent_rank() -> None:
    cause = cause_of([peer_gone(rank) for rank in (0, 1, 3)], ranks=4)
    assert "no account of rank 2" in cause.what
    assert cause.nodes == () and not cause.repeatable


def test_one_mistake_of_input_on_all_ranks_is_one_cause() -> None:
    told = [failure(r, INPUT, error="InputError", kind="input", time_s=100.0 + r) for r in range(4)]
    cause = cause_of(told)
    assert (cause.kind, cause.who, cause.what) == ("input", "on all 4 ranks", INPUT)
    assert (cause.others, cause.nodes) == (0, ())
    some = cause_of(told[:3], [rank_end(3, 143, 110.0)])
    assert (some.who, some.others) == ("on 3 of 4 ranks, first rank 0 on n0", 1)


@pytest.mark.parametrize(
    ("status", "words", "repeatable"),
    [
        (137, "out of host memory", False),
        (139, "segmentation fault", True),
        (135, "/dev/shm", True),
        (134, "SIGABRT", True),
        (143, "by hand, or by Slurm", False),
        (128 + signal.SIGUSR1, "ended by SIGUSR1", False),
    ],
)
def test_a_killed_rank_is_the_first_that_ended(status: int, words: str, repeatable: bool) -> None:
    # srun ends the others afterwards, by the same signals.
    ends = [rank_end(0, 137, 103.0), rank_end(1, status, 100.0), rank_end(2, 143, 102.0)]
    cause = cause_of(ends=ends)
    assert (cause.kind, cause.who, cause.others) == ("signal", "rank 1 on n1", 3)
    assert words in cause.what
    assert cause.repeatable is repeatable
    assert cause.phase is None


def test_where_a_killed_rank_was_is_told_by_those_who_lost_it() -> None:
    cause = cause_of([peer_gone(0)], [rank_end(0, 1, 101.0), rank_end(1, 139, 100.5)])
    assert (cause.who, cause.step, cause.phase) == ("rank 1 on n1", 1203, "forward_backward")


def test_peers_that_are_gone_before_the_killed_rank_is_reported_hide_nothing() -> None:
    ends = [rank_end(0, 1, 99.9), rank_end(1, 137, 100.0)]
    assert cause_of([peer_gone(0, 99.5)], ends).line.startswith("rank 1 on n1: killed")


def test_a_killed_rank_wins_over_accounts_that_its_end_was_late_for() -> None:
    odd = failure(0, "peer is not there", time_s=98.0)
    late, end = rank_end(1, 137, 100.0), rank_end(0, 1, 101.0)
    assert cause_of([odd], [late, end]).who == "rank 1 on n1"
    long_before = failure(0, "peer is not there", time_s=90.0)
    assert cause_of([long_before], [late, end]).who == "rank 0 on n0"


def test_ranks_killed_for_another_are_no_cause() -> None:
    # Rank 2 failed and left; srun killed the rest.
    ends = [rank_end(2, 1, 101.0), rank_end(0, 137, 101.2), rank_end(1, 143, 101.1)]
    assert cause_of([failure(2)], ends).line.startswith("rank 2 on n2: RuntimeError: CUDA")


def test_an_abort_after_an_account_is_its_consequence() -> None:
    # Rank 2 takes seconds to leave; libraries of others abort meanwhile.
    ends = [rank_end(0, 134, 102.0), rank_end(2, 1, 104.0)]
    assert cause_of([failure(2)], ends).who == "rank 2 on n2"


@pytest.mark.parametrize(
    ("failures", "stacks", "ranks", "who", "what"),
    [
        (
            [hung(0, 8), hung(1, 7, "data"), hung(2, 8)],
            {0, 1, 2},
            3,
            "rank 1 on n1",
            "hang in data (collective): others have finished step 8",
        ),
        (
            [hung(0), hung(1), hung(2), hung(3, phase="data")],
            {0, 1, 2, 3},
            4,
            "rank 3 on n3",
            "hang in data (collective): others in forward_backward",
        ),
        ([hung(0), hung(1), hung(3)], {0, 1, 3}, 4, "rank 2", "no sign of life there"),
        ([hung(r) for r in range(4)], set(range(4)), 4, "on all 4 ranks", "no rank behind"),
        # Killed before they could write, so that silence says nothing.
        ([hung(0)], {0}, 4, "on all 4 ranks", "no rank behind"),
    ],
    ids=["behind", "phase", "silent", "all alike", "most were killed"],
)
def test_a_hang_names_whom_the_others_wait_for(
    failures: list[Failure], stacks: set[int], ranks: int, who: str, what: str
) -> None:
    ends = [rank_end(f.rank, 75, 101.0 + f.rank) for f in failures]
    cause = cause_of(failures, ends, ranks=ranks, status=75, stacks=frozenset(stacks))
    assert (cause.kind, cause.who, cause.step, cause.repeatable) == ("hang", who, 7, False)
    assert what in cause.what


def test_of_two_ranks_the_stopped_one_is_named() -> None:
    ends = [rank_end(0, 75, 101.0), rank_end(1, 137, 102.0)]
    cause = cause_of([hung(0)], ends, ranks=2, stacks=frozenset({0}))
    assert (cause.who, cause.nodes) == ("rank 1 on n1", ("n1",))
    assert cause.what.startswith("hang in forward_backward (collective): no sign of life")


def test_a_hang_that_is_known_by_its_status_alone() -> None:
    cause = cause_of(ends=[rank_end(0, 75, 100.0), rank_end(1, 143, 101.0)], ranks=2)
    assert (cause.kind, cause.phase) == ("hang", None)


def test_a_hang_after_a_rank_has_failed_is_no_cause() -> None:
    # Rank 1 failed but could not leave; the others waited until they counted as hung.
    cause = cause_of([failure(1, time_s=100.0), hung(0, time_s=400.0), hung(2, time_s=400.0)])
    assert (cause.kind, cause.who) == ("error", "rank 1 on n1")
    # The other way round: what fails while a hang is taken apart.
    assert cause_of([failure(1, time_s=401.0), hung(0, time_s=400.0)]).kind == "hang"


def test_nodes_that_slurm_or_the_preflight_name_come_first() -> None:
    everything = [failure(0), hung(1)]
    lost = cause_of(everything, lost_nodes=("n3",), bad_nodes=("n2",))
    assert (lost.kind, lost.nodes) == ("lost_node", ("n3", "n2"))
    assert lost.line == "node n3 lost, says Slurm; node n2 failed the preflight"
    assert cause_of(everything, bad_nodes=("n1", "n2")).line == "nodes n1, n2 failed the preflight"


def test_processes_without_an_account_are_shown_by_their_last_line() -> None:
    line = "ModuleNotFoundError: No module named 'dsr_scale'"
    ends = [rank_end(rank, 1, 100.0 + rank) for rank in range(3)]
    lines = tuple((rank, line) for rank in range(3))
    cause = cause_of(ends=ends, ranks=3, last_lines=lines)
    assert (cause.kind, cause.who, cause.repeatable) == ("exit", "on all 3 ranks", True)
    assert line in cause.what
    usage = cause_of(ends=[rank_end(0, 2, 100.0)], ranks=1)
    assert usage.kind == "input"


def test_what_the_preflight_asks_of_a_person_comes_before_its_bad_nodes() -> None:
    lines = ("table", *INPUT.splitlines(), "srun: error: node1: task 0: Exited with exit code 2")
    asked = cause_of(status=2, ranks=0, launcher_lines=lines, bad_nodes=("n1",))
    assert (asked.kind, asked.what) == ("input", INPUT)
    assert cause_of(status=2, ranks=0).kind == "input"
    assert cause_of(status=3, ranks=0, launcher_lines=lines, bad_nodes=("n1",)).nodes == ("n1",)


def test_an_outage_shows_its_three_parts_too() -> None:
    away = "found: no encoder server answers\nrequired: one\nwhat to do: start it"
    cause = cause_of([failure(r, away, error="EncodersLost", kind="outage") for r in range(4)])
    assert (cause.kind, cause.who, cause.what) == ("outage", "on all 4 ranks", away)
    assert not cause.repeatable


def test_a_full_disk_is_said_where_nobody_could_write() -> None:
    ends = [rank_end(0, 2, 100.0)]
    assert "no space left on the disk of /run" in cause_of(full_disk="/run").what
    assert "no space left" in cause_of(ends=ends, full_disk="/run").what
    assert cause_of(full_disk="/run").kind == "input"
    assert cause_of([failure(0)], full_disk="/run").kind == "error"
    assert cause_of([peer_gone(0)], full_disk="/run").kind == "error"
    assert cause_of(ends=[rank_end(0, 137, 100.0)], full_disk="/run").kind == "signal"


def test_nothing_known_gives_status_and_last_line() -> None:
    cause = cause_of(status=143, ranks=0, launcher_lines=("one", "srun: error: no such step"))
    assert (cause.kind, cause.repeatable) == ("unknown", False)
    assert cause.what == (
        "srun ended with status 143 (SIGTERM) and no rank left an account; last line: srun: error: "
        "no such step"
    )


def test_what_was_asked_for_comes_before_everything() -> None:
    assert cause_of([failure(0)], status=0, lost_nodes=("n0",)).kind == "done"
    assert cause_of([], [rank_end(0, 137, 1.0)], stopped="preempted").line == "preempted"
    full = failure(1, INPUT, kind="input", error="InputError")
    late = cause_of([full, peer_gone(0)], stopped="time_limit")
    assert late.kind == "time_limit"
    assert "while stopping, rank 1 on n1: found: no shard 7; required" in late.line


def test_signatures_differ_by_words_and_not_by_numbers() -> None:
    one = signature_of("OutOfMemoryError", "Tried to allocate 2.50 GiB on GPU 3 at 0x7f3Ab0")
    assert one == signature_of("OutOfMemoryError", "Tried to allocate 12.00 GiB on GPU 7 at 0x1c")
    assert one != signature_of("RuntimeError", "Tried to allocate 2.50 GiB on GPU 3 at 0x7f3Ab0")


def test_torn_and_missing_files_are_passed_over(tmp_path: Path) -> None:
    told = asdict(failure(1))
    (tmp_path / "rank_00000.failure.json").write_text(json.dumps(told)[:40])
    (tmp_path / "rank_00002.failure.json").write_text('{"rank": 2}')
    write_failure(tmp_path / "rank_00001.failure.json", failure(1))
    (tmp_path / "rank_00000.end").write_text("")
    (tmp_path / "rank_00001.end").write_text("1 n1 1 101.5\n")
    (tmp_path / "rank_00003.log").write_text("line\n")
    (tmp_path / "rank_00002.stacks").write_text("Thread 1\n")
    (tmp_path / "rank_00003.stacks").write_text("")
    (tmp_path / "rank_00004.log").write_text("")
    found = gather(tmp_path, tmp_path, status=1, launcher_log=tmp_path / "none.log")
    assert [f.rank for f in found.failures] == [1]
    assert found.ends == [rank_end(1, 1, 101.5)]
    assert (found.ranks, found.stacks) == ({1, 3, 4}, {2})
    assert (found.launcher_lines, found.full_disk) == ((), "")
    assert find_cause(found).who == "rank 1 on n1"


def test_a_disk_without_room_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "FULL_BYTES", 1 << 60)
    assert gather(tmp_path, tmp_path, status=1).full_disk == str(tmp_path)


def test_the_tail_of_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n\n" for number in range(100_000)))
    assert tail(path, 2) == ["line 99998", "line 99999"]
    path.write_bytes(b"bar \xff\n")
    assert tail(path, 2) == ["bar \ufffd"]


def outcome(cause: Cause, checkpoint_step: int | None = 1200) -> Decision:
    """The decision after it, in a job of two nodes."""
    return decide(
        cause,
        status=1,
        nodes=("n0", "n1"),
        checkpoint_step=checkpoint_step,
        earlier=[],
        recovery=RecoveryConfig(),
    )


ATTEMPT = Attempt("1234", 2, "", 0, ("n0", "n1"), None, "")


def test_the_block_and_the_page(tmp_path: Path) -> None:
    failures = [failure(1), peer_gone(0)]
    evidence = Evidence(
        1,
        failures=failures,
        ends=[rank_end(0, 1, 102.0), rank_end(1, 1, 101.0)],
        ranks=frozenset(range(3)),
    )
    cause = find_cause(evidence)
    block = cause_block(ATTEMPT, tmp_path, cause, outcome(cause), most_failures=10)
    assert block == (
        "==== why job 1234 attempt 2 ended ====\n"
        "cause:  rank 1 on n1: RuntimeError: CUDA error: an illegal memory access was encountered\n"
        "at:     step 1203, forward_backward; newest checkpoint of step 1200\n"
        "others: 2 ranks ended because of it\n"
        f"log:    {tmp_path}/rank_00001.log\n"
        "next:   requeued, nothing excluded (failure 1 of at most 10 without a new checkpoint)\n"
    )
    page = summary(block, cause, evidence, log_of(cause, tmp_path, None))
    assert page.startswith(block)
    assert "---- rank 1 on n1 ----\nTraceback …\n" in page
    rows = [line.split(maxsplit=3) for line in page.splitlines()[-3:]]
    assert rows[0][:3] == ["0", "n0", "1"] and "step 1203, forward_backward" in rows[0][3]
    assert rows[2] == ["2", "?", "?", "none"]


def test_the_block_of_bad_input_has_its_three_parts() -> None:
    cause = cause_of([failure(r, INPUT, kind="input", step=None, phase="start") for r in range(4)])
    block = cause_block(ATTEMPT, Path("/a"), cause, outcome(cause, None), most_failures=10)
    assert block.splitlines()[1:6] == [
        "cause:  on all 4 ranks:",
        "        found: no shard 7",
        "        required: all shards",
        "        what to do: copy it again",
        "at:     before the first step, start",
    ]
    assert block.splitlines()[-1] == "next:   not started again: a person must put this right first"


def test_the_page_shows_the_end_of_a_log_where_there_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "rank_00001.log").write_text("".join(f"line {n}\n" for n in range(60)))
    evidence = Evidence(137, ends=[rank_end(1, 137, 1.0)], ranks=frozenset({1}))
    cause = find_cause(evidence)
    page = summary("block\n", cause, evidence, log_of(cause, tmp_path, None))
    assert "line 20\n" in page and "line 59\n" in page and "line 19\n" not in page


def test_trainers_that_were_all_sent_sigterm_were_preempted_and_have_saved() -> None:
    ends = [rank_end(rank, 143, 100.0 + rank) for rank in range(4)]
    assert cause_of(ends=ends, status=143).kind == "preempted"
    one_killed = [rank_end(0, 137, 99.0), *ends[1:]]
    assert cause_of(ends=one_killed, status=137).kind == "signal"
    assert cause_of([failure(2, time_s=90.0)], ends, status=1).kind == "error"


def test_a_rank_that_accounts_for_a_hang_long_after_the_others_is_behind() -> None:
    cause = cause_of([hung(0, time_s=100.0), hung(1, time_s=111.0)], ranks=2)
    assert (cause.kind, cause.ranks) == ("hang", (1,))
    prompt = cause_of([hung(0, time_s=100.0), hung(1, time_s=101.0)], ranks=2)
    assert prompt.ranks != (1,)
