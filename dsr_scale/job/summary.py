"""The end of an attempt for people: a few lines that say why, and a page with what supports them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsr_scale.job.attempt import Attempt
from dsr_scale.job.cause import Cause
from dsr_scale.job.evidence import TAIL_LINES, Evidence, rank_log, rank_stacks, tail
from dsr_scale.job.failures import Failure
from dsr_scale.job.policy import Decision

SUMMARY_FILE = "summary.txt"


def cause_block(
    attempt: Attempt,
    directory: Path,
    cause: Cause,
    decision: Decision,
    *,
    most_failures: int,
    launcher_log: Path | None = None,
) -> str:
    """Cause, place, consequences, log and what comes next, one a line."""
    first, *more = cause.what.strip().splitlines()
    if more:
        cause_lines = [*([f"{cause.who}:"] if cause.who else []), first, *more]
    else:
        cause_lines = [cause.line]
    rows = [
        ("cause", "\n        ".join(cause_lines)),
        ("at", _place(cause, decision)),
        ("others", f"{_count(cause.others, 'rank')} ended because of it" if cause.others else ""),
        ("log", str(log_of(cause, directory, launcher_log))),
        ("next", _next(decision, most_failures)),
    ]
    lines = [f"{label + ':':<8}{text}" for label, text in rows if text]
    title = f"==== why job {attempt.job_id} attempt {attempt.number} ended ===="
    return "\n".join([title, *lines]) + "\n"


def log_of(cause: Cause, directory: Path, launcher_log: Path | None) -> Path:
    """The file that says most about the cause."""
    if cause.kind == "bad_node":
        return directory / "preflight"
    if cause.ranks:
        stacks = rank_stacks(directory, cause.ranks[0])
        hung = cause.kind == "hang" and stacks.is_file()
        return stacks if hung else rank_log(directory, cause.ranks[0])
    return launcher_log or directory


def summary(block: str, cause: Cause, evidence: Evidence, log: Path) -> str:
    """The block, what the rank at fault said last, and a table of all ranks."""
    accounts = {failure.rank: failure for failure in evidence.failures}
    told = next((accounts[rank] for rank in cause.ranks if rank in accounts), None)
    parts = [block]
    if told is not None and told.traceback.strip():
        parts.append(f"---- rank {told.rank} on {told.node} ----\n{told.traceback.rstrip()}\n")
    elif lines := tail(log, TAIL_LINES):
        parts.append(f"---- end of {log} ----\n" + "\n".join(lines) + "\n")
    if evidence.ranks:
        parts.append("---- all ranks ----\n" + _table(evidence, accounts))
    return "\n".join(parts)


def _place(cause: Cause, decision: Decision) -> str:
    parts = []
    if cause.phase is not None:
        step = "before the first step" if cause.step is None else f"step {cause.step}"
        parts.append(f"{step}, {cause.phase}")
    if decision.checkpoint_step is not None:
        parts.append(f"newest checkpoint of step {decision.checkpoint_step}")
    return "; ".join(parts)


def _next(decision: Decision, most_failures: int) -> str:
    if decision.action == "finished":
        return "nothing, the run is complete"
    if decision.action == "stop":
        return f"not started again: {decision.reason}"
    follows = "requeued" if decision.action == "requeue" else "restarted on the nodes that are left"
    follows += f", {', '.join(decision.exclude) or 'nothing'} excluded"
    if decision.failed:
        of = f"failure {decision.failures} of at most {most_failures}"
        follows += f" ({of} without a new checkpoint)"
    return follows


def _table(evidence: Evidence, accounts: dict[int, Failure]) -> str:
    statuses = {end.rank: str(end.status) for end in evidence.ends}
    nodes = evidence.nodes
    rows: list[Sequence[str]] = [("rank", "node", "status", "account")]
    for rank in sorted(evidence.ranks):
        told = accounts.get(rank)
        account = "none" if told is None else f"{told.error}, step {told.step}, {told.phase}"
        rows.append((str(rank), nodes.get(rank, "?"), statuses.get(rank, "?"), account))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        + "\n"
        for row in rows
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
