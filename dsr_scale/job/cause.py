"""Why an attempt ended: one root cause out of what the cluster and all ranks left behind.

One rank's death ends all others, and most accounts are of that: a connection closed by a peer, a
process killed by `srun`. They are told apart by their words and by time. Clocks of nodes differ by
milliseconds and a wrapper writes a little later than a peer notices, so a killed process is preferred
to accounts of up to `SLACK_S` before it. A root cause in the words of a consequence is missed where
anything else is known.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsr_scale.job.evidence import Evidence, Stopped
from dsr_scale.job.failures import HUNG_STATUS, INPUT_STATUS, Failure, RankEnd

Kind = Literal[
    "done",
    "time_limit",
    "preempted",
    "cancelled",
    "encoders",
    "lost_node",
    "bad_node",
    "hang",
    "signal",
    "exit",
    "input",
    "outage",
    "error",
    "unknown",
]
"""`signal` is a process that was killed, `exit` one that ended by itself without an account, `input`
what a person must put right; `outage` and `error` are as in `failures.Kind`."""

SLACK_S = 5.0

_STOPS: dict[Stopped, str] = {
    "time_limit": "the time limit came near",
    "preempted": "preempted",
    "cancelled": "cancelled",
    "encoders": "the encoder servers cannot start, the job's log says why",
}
_SIGNALS = {
    signal.SIGKILL: "killed (SIGKILL): out of host memory, or by hand",
    signal.SIGSEGV: "segmentation fault (SIGSEGV)",
    signal.SIGBUS: "bus error (SIGBUS): /dev/shm is full, or a mapped file was cut short",
    signal.SIGABRT: "aborted by a library (SIGABRT): the reason stands in its log",
    signal.SIGTERM: "terminated (SIGTERM): by hand, or by Slurm",
}
_OWN_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""Signals that a process brings on itself, and would again."""

_COLLECTIVE_ERRORS = {
    "RuntimeError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "DistError",
}
_PEER_GONE = re.compile(
    r"connection closed by peer|connection reset|connection was likely closed|broken pipe"
    r"|nccl communicator was aborted|ncclremoteerror|remote process exited|socket closed",
    re.IGNORECASE,
)
_PART = re.compile(r"(\d+\. )?(found|required|what to do): ")
"""How the lines of an InputError begin on stderr."""


@dataclass(frozen=True)
class Cause:
    """The root cause."""

    kind: Kind
    what: str
    """In words: the three lines of an InputError where there was one, otherwise one line."""
    who: str = ""
    """Ranks and nodes, such as `rank 5 on gpu-17`; empty where it is no rank."""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    """Lost or bad nodes, or the one node where it happened; empty where none is to blame."""
    step: int | None = None
    """Steps finished; None before the first."""
    phase: str | None = None
    """None when unknown; the step is then unknown too."""
    signature: str = ""
    """Equal for equal failures: class and message with numbers replaced."""
    repeatable: bool = False
    """Whether a restart that comes to the same step may be expected to fail again."""
    others: int = 0
    """Ranks that ended because of it."""

    @property
    def line(self) -> str:
        """The cause on one line."""
        what = self.what.strip().partition("\n")[0]
        return f"{self.who}: {what}" if self.who else what


def find_cause(evidence: Evidence) -> Cause:
    """The one cause that the evidence speaks for."""
    if evidence.status == 0:
        return Cause("done", "all steps are done")
    if evidence.stopped is not None:
        return _stop(evidence, evidence.stopped)
    asked = {end.status for end in evidence.ends} == {128 + signal.SIGTERM}
    if asked and not evidence.failures and not evidence.lost_nodes:
        # Slurm's notice of a preemption goes to tasks alone; they have saved.
        return Cause("preempted", "preempted: all trainers were sent SIGTERM")
    # A preflight that ends with this status has found what no other nodes would cure.
    misused = evidence.status == INPUT_STATUS and not evidence.ranks
    if evidence.lost_nodes or (evidence.bad_nodes and not misused):
        return _nodes_cause(evidence)
    event = _first_event(evidence)
    # Processes that end by themselves give an account, if there is room for it.
    untold = event is None or event.kind in ("exit", "input")
    if evidence.full_disk and not evidence.failures and untold:
        return _full_disk(evidence)
    if event is not None:
        return event
    if evidence.failures:
        return _peers_gone(evidence)
    if misused and (parts := [line for line in evidence.launcher_lines if _PART.match(line)]):
        return Cause("input", "\n".join(parts))
    last = f"; last line: {evidence.launcher_lines[-1]}" if evidence.launcher_lines else ""
    what = f"srun {_how(evidence.status)} and no rank left an account{last}"
    return Cause("input" if misused else "unknown", what, others=len(evidence.ranks))


def is_consequence(failure: Failure) -> bool:
    """Whether an account says no more than that another rank has gone."""
    return (
        failure.kind == "error"
        and failure.error.rpartition(".")[2] in _COLLECTIVE_ERRORS
        and _PEER_GONE.search(failure.message) is not None
    )


def signature_of(error: str, message: str) -> str:
    """Class and message without numbers, addresses and times: equal where the failure is the same."""
    text = re.sub(r"0x[0-9a-fA-F]+", "#", f"{error}: {message.strip()}")
    return re.sub(r"\d+", "#", text)[:400]


def _own_accounts(evidence: Evidence) -> list[Failure]:
    return [f for f in evidence.failures if f.kind != "hang" and not is_consequence(f)]


def _stop(evidence: Evidence, stopped: Stopped) -> Cause:
    """A stop that was asked for, and what went wrong on the way."""
    own, what = _own_accounts(evidence), _STOPS[stopped]
    if own:
        failed = _from_accounts(evidence, own)
        what += f"; while stopping, {failed.who}: " + failed.what.replace("\n", "; ")
    return Cause(stopped, what)


def _nodes_cause(evidence: Evidence) -> Cause:
    lost, bad = evidence.lost_nodes, evidence.bad_nodes
    parts = [f"{_nodes_named(lost)} lost, says Slurm"] if lost else []
    parts += [f"{_nodes_named(bad)} failed the preflight"] if bad else []
    return Cause(
        "lost_node" if lost else "bad_node",
        "; ".join(parts),
        nodes=tuple(dict.fromkeys(lost + bad)),
        others=len(evidence.ranks),
    )


def _full_disk(evidence: Evidence) -> Cause:
    what = (
        f"found: no space left on the disk of {evidence.full_disk}, and no account of any rank\n"
        "required: room for checkpoints and logs\n"
        "what to do: free space there, then requeue the job"
    )
    return Cause("input", what, signature="full disk", others=len(evidence.ranks))


def _first_event(evidence: Evidence) -> Cause | None:
    """The earliest of what follows from nothing else: an account, a death, a hang."""
    own, end, never = _own_accounts(evidence), _first_silent_end(evidence), float("inf")
    hung = [failure.time_s for failure in evidence.failures if failure.kind == "hang"]
    failed_s = min((failure.time_s for failure in own), default=never)
    died_s = never
    if end is not None and end.status == HUNG_STATUS:
        hung.append(end.time_s)
    elif end is not None:
        # Libraries abort when a peer has failed, so that a death by SIGABRT must truly come first.
        aborted = _signal(end.status) == signal.SIGABRT
        died_s = end.time_s - (0.0 if aborted else SLACK_S)
    hung_s = min(hung, default=never)
    first_s = min(died_s, failed_s, hung_s)
    if first_s == never:
        return None
    if end is not None and first_s == died_s:
        return _killed(evidence, end) if _signal(end.status) else _exited(evidence, end)
    return _from_accounts(evidence, own) if first_s == failed_s else _hang(evidence)


def _first_silent_end(evidence: Evidence) -> RankEnd | None:
    """The end of the first rank to go, where it left no account; who went later was killed for it."""
    consequences = {f.rank for f in evidence.failures if is_consequence(f)}
    accounts = {failure.rank for failure in evidence.failures}
    ends = [end for end in evidence.ends if end.status and end.rank not in consequences]
    first = min(ends, key=lambda end: (end.time_s, end.rank), default=None)
    return None if first is None or first.rank in accounts else first


def _from_accounts(evidence: Evidence, failures: Sequence[Failure]) -> Cause:
    """The earliest of these accounts, with the ranks that say the same."""
    first = min(failures, key=lambda failure: (failure.time_s, failure.rank))
    signature = signature_of(first.error, first.message)
    ranks = [
        failure.rank
        for failure in failures
        if failure.kind == first.kind and signature_of(failure.error, failure.message) == signature
    ]
    message = first.message.strip()
    line = f"{first.error}: {message.partition(chr(10))[0]}"
    cause = Cause(
        kind=first.kind,
        what=message if first.kind == "input" or _PART.match(message) else line,
        step=first.step,
        phase=first.phase,
        signature=signature,
        repeatable=first.kind == "error",
    )
    return _placed(cause, evidence, ranks, first.rank)


def _peers_gone(evidence: Evidence) -> Cause:
    """Every account is of a peer that has gone; who that was can only be told by its silence."""
    cause = _from_accounts(evidence, evidence.failures)
    accounts = {failure.rank for failure in evidence.failures}
    silent = sorted(evidence.ranks - accounts)
    whose = _ranks_named(silent, evidence.nodes) if silent else "the rank that was first"
    gone = f"no account of {whose}"
    return replace(cause, what=f"{cause.what} ({gone})", nodes=(), repeatable=False)


def _exited(evidence: Evidence, end: RankEnd) -> Cause:
    """Processes that ended by themselves and gave no account: they did not come as far as that."""
    lines = dict(evidence.last_lines)
    accounts = {failure.rank for failure in evidence.failures}

    def words(rank: int, status: int) -> str:
        return signature_of(f"status {status}", lines.get(rank, ""))

    signature = words(end.rank, end.status)
    ranks = [
        other.rank
        for other in evidence.ends
        if other.rank not in accounts
        and other.status == end.status
        and words(other.rank, other.status) == signature
    ]
    last = f"; last line: {lines[end.rank]}" if end.rank in lines else ""
    cause = Cause(
        kind="input" if end.status == INPUT_STATUS else "exit",
        what=f"{_how(end.status)} and left no account{last}",
        phase="start",
        signature=f"{end.status} {signature}",
        repeatable=True,
    )
    return _placed(cause, evidence, ranks, end.rank)


def _killed(evidence: Evidence, end: RankEnd) -> Cause:
    """A process that a signal ended. Where it was, those know who lost it in the middle of a step."""
    number = signal.Signals(end.status - 128)
    lost_by = min(evidence.failures, key=_finished, default=None)
    cause = Cause(
        kind="signal",
        what=_SIGNALS.get(number, f"ended by {number.name}"),
        step=None if lost_by is None else lost_by.step,
        phase=None if lost_by is None else lost_by.phase,
        signature=number.name,
        repeatable=number in _OWN_FAULTS,
    )
    return _placed(cause, evidence, [end.rank], end.rank)


def _hang(evidence: Evidence) -> Cause:
    """A hang, with the ranks that the others wait for, where they can be told."""
    hung = [failure for failure in evidence.failures if failure.kind == "hang"]
    ranks, why = _behind(evidence, hung)
    named = [failure for failure in hung if failure.rank in ranks] or hung
    slowest = min(named, key=_finished, default=None)
    phase = None if slowest is None else slowest.phase
    cause = Cause(
        kind="hang",
        what=f"hang{'' if slowest is None else f' in {phase} ({slowest.error})'}: {why}",
        step=None if slowest is None else slowest.step,
        phase=phase,
        signature=f"hang in {phase}",
    )
    return _placed(cause, evidence, ranks or sorted(evidence.ranks), None)


def _behind(evidence: Evidence, hung: Sequence[Failure]) -> tuple[list[int], str]:
    """Ranks without stacks, else behind in steps, else in a phase of their own; and how that shows."""
    silent = evidence.ranks - evidence.stacks - {failure.rank for failure in hung}
    # Where most wrote none they were killed before they could.
    if silent and 2 * len(silent) <= len(evidence.ranks):
        return sorted(silent), "no sign of life there, others wrote their stacks"
    if not hung:
        return [], "no rank wrote where"
    # The first to notice tells the others at once; one that was stopped can write only when it goes on.
    first_s = min(failure.time_s for failure in hung)
    late = [failure.rank for failure in hung if failure.time_s > first_s + SLACK_S]
    if late and 2 * len(late) <= len(hung):
        return late, f"the others had written their stacks {SLACK_S:.0f} s before, and more"
    steps = [_finished(failure) for failure in hung]
    if min(steps) < max(steps):
        slow = [failure.rank for failure in hung if _finished(failure) == min(steps)]
        return slow, f"others have finished step {max(steps)}"
    phases = Counter(failure.phase for failure in hung)
    rarest, count = min(phases.items(), key=lambda item: item[1])
    if 2 * count < len(hung):
        others = ", ".join(sorted(set(phases) - {rarest}))
        return [failure.rank for failure in hung if failure.phase == rarest], f"others in {others}"
    return [], "no rank behind another"


def _finished(failure: Failure) -> int:
    return -1 if failure.step is None else failure.step


def _placed(cause: Cause, evidence: Evidence, ranks: Sequence[int], first: int | None) -> Cause:
    """The cause with its ranks; `first` of them is named where there are too many, if one was."""
    node_of = evidence.nodes
    nodes = tuple(dict.fromkeys(node_of[rank] for rank in ranks if rank in node_of))
    others = len(evidence.ranks - set(ranks))
    if len(ranks) > 1 and not others:
        who = f"on all {len(ranks)} ranks"
    elif len(ranks) > 1 and first is not None:
        who = f"on {len(ranks)} of {len(evidence.ranks)} ranks, first "
        who += _ranks_named([first], node_of)
    else:
        who = _ranks_named(ranks, node_of)
    where = nodes if len(nodes) == 1 else ()
    return replace(cause, who=who, ranks=tuple(ranks), nodes=where, others=others)


def _signal(status: int) -> signal.Signals | None:
    try:
        return signal.Signals(status - 128)
    except ValueError:
        return None


def _how(status: int) -> str:
    number = _signal(status)
    return f"ended with status {status}" + (f" ({number.name})" if number is not None else "")


def _nodes_named(nodes: Sequence[str]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(nodes)}"


def _ranks_named(ranks: Sequence[int], nodes: dict[int, str], most: int = 8) -> str:
    """`rank 5 on gpu-17, rank 7 on gpu-18 and 3 more`."""
    shown = [f"rank {r} on {nodes[r]}" if r in nodes else f"rank {r}" for r in ranks[:most]]
    return ", ".join(shown) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
