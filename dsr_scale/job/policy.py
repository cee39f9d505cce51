"""What a job does after an attempt: end, go back to the queue, go on in place, or stop for a person.

A pure function of the cause, of what earlier attempts of the same job came to, and of the run's
`recovery`. Its result is kept as `outcome.json`, which is all the memory there is: an attempt whose
batch script died has none, and counts neither for nor against the job.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.job.cause import Cause, Kind

OUTCOME_FILE = "outcome.json"

Action = Literal["finished", "requeue", "restart", "stop"]
"""`restart` goes on at once, in the same allocation, on the nodes that are left."""

BATCH_SCRIPT_LOST = "node of the batch script lost, or preempted"

MOST_FRUITLESS = 3
"""Attempts in a row that met the time limit and left no new checkpoint; a stop at the limit saves one."""

_NO_FAILURES: tuple[Kind, ...] = ("done", "time_limit", "preempted", "cancelled", "encoders")
_ENDS: tuple[Kind, ...] = ("cancelled", "encoders")
_BLAMES_NODE: tuple[Kind, ...] = ("hang", "signal", "exit", "error")


@dataclass(frozen=True)
class Decision:
    """What an attempt came to and what was decided."""

    action: Action
    reason: str
    """Why the job ended or why another attempt follows, on one line."""
    exclude: tuple[str, ...]
    """Nodes that the job must not use again."""
    kind: Kind
    cause: str
    """The cause on one line."""
    nodes: tuple[str, ...]
    """Nodes where the cause lies."""
    signature: str
    repeatable: bool
    step: int | None
    phase: str | None
    checkpoint_step: int | None
    """The newest complete checkpoint when the attempt had ended."""
    status: int
    failures: int
    """Failed attempts, this one included, without a new checkpoint between them."""

    @property
    def failed(self) -> bool:
        """Whether the attempt counts as a failure of the job."""
        return self.kind not in _NO_FAILURES

    def write(self, attempt: Path) -> None:
        """Keeps this in the attempt's directory."""
        atomic_files.write_json(attempt / OUTCOME_FILE, asdict(self))

    @staticmethod
    def read(attempt: Path) -> Decision | None:
        """What `write` kept; None where there is none or it is torn."""
        try:
            values = json.loads((attempt / OUTCOME_FILE).read_bytes())
            lists = {name: tuple(values[name]) for name in ("exclude", "nodes")}
            return Decision(**{**values, **lists})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def history(attempts: Sequence[Path]) -> list[Decision]:
    """Decisions after these attempts, of those that have one."""
    return [decision for path in attempts if (decision := Decision.read(path)) is not None]


def failures_since_checkpoint(earlier: Sequence[Decision], checkpoint_step: int | None) -> int:
    """Failed attempts without a checkpoint between them, if the newest is now `checkpoint_step`."""
    last = _last_failed(earlier)
    if last is None or _order(checkpoint_step) > _order(last.checkpoint_step):
        return 0
    return last.failures


def require_last_checkpoint(
    run_directory: Path, earlier: Sequence[Decision], steps: Sequence[int]
) -> None:
    """Raises InputError where the newest checkpoint that the last attempt left is not there any more.

    The job would silently train again what it had already saved.
    """
    left = earlier[-1].checkpoint_step if earlier else None
    if left is None or (steps and steps[-1] >= left):
        return
    newest = f"the newest is of step {steps[-1]}" if steps else "there is none at all"
    raise InputError(
        found=f"no checkpoint of step {left} in {run_directory}, which the job's last attempt left; {newest}",
        required="the checkpoint that the job would go on from",
        remedy="mount or restore it; or, to go on from what is there, submit a new job",
    )


def reason_to_follow(attempts: Sequence[Path]) -> str:
    """Why another attempt follows these, in a few words; empty where there is none before it."""
    if not attempts:
        return ""
    last = Decision.read(attempts[-1])
    if last is None:
        return BATCH_SCRIPT_LOST
    cause = last.cause if len(last.cause) <= 120 else last.cause[:119] + "…"
    return f"by hand, after: {cause}" if last.action in ("finished", "stop") else cause


def decide(
    cause: Cause,
    *,
    status: int,
    nodes: Sequence[str],
    checkpoint_step: int | None,
    earlier: Sequence[Decision],
    recovery: RecoveryConfig,
    smaller: int | None = None,
) -> Decision:
    """What follows an attempt on `nodes` that ended by `cause` and `status`.

    `checkpoint_step` is the newest complete checkpoint, `earlier` the decisions after the job's
    attempts before this one, `smaller` a number of the nodes that are left on which the run can go on.
    """
    failed = cause.kind not in _NO_FAILURES
    failures = failures_since_checkpoint(earlier, checkpoint_step) + failed
    action: Action
    if cause.kind == "done":
        action, reason = "finished", cause.line
    elif cause.kind == "time_limit" and _fruitless(earlier, checkpoint_step) >= MOST_FRUITLESS:
        action = "stop"
        reason = f"{MOST_FRUITLESS} times in a row the time limit came before a save: raise --time"
    elif not failed:
        action, reason = "stop" if cause.kind in _ENDS else "requeue", cause.line
    else:
        lost = cause.kind == "lost_node" and recovery.shrink and smaller is not None
        action, reason = "restart" if lost else "requeue", cause.line
        if lost:
            reason += f"; goes on with {smaller} of the nodes that are left"
        ending = _reason_to_stop(cause, nodes, checkpoint_step, earlier)
        if ending is None and failures >= recovery.most_failures:
            ending = (
                f"{failures} failures without a new checkpoint between them, and "
                f"recovery.most_failures is {recovery.most_failures}"
            )
        if ending is not None:
            action, reason = "stop", ending
    return Decision(
        action=action,
        reason=reason,
        exclude=_excluded(cause, nodes, earlier) if action in ("requeue", "restart") else (),
        kind=cause.kind,
        cause=cause.line,
        nodes=cause.nodes,
        signature=cause.signature,
        repeatable=cause.repeatable,
        step=cause.step,
        phase=cause.phase,
        checkpoint_step=checkpoint_step,
        status=status,
        failures=failures,
    )


def _fruitless(earlier: Sequence[Decision], checkpoint_step: int | None) -> int:
    """Attempts in a row, the present one included, that met the time limit without a new checkpoint."""
    left = [None, *(past.checkpoint_step for past in earlier), checkpoint_step]
    limited = [*(past.kind == "time_limit" for past in earlier), True]
    count = 0
    for before, after, was_limited in reversed(list(zip(left, left[1:], limited, strict=False))):
        if not was_limited or after != before:
            break
        count += 1
    return count


def _reason_to_stop(
    cause: Cause, nodes: Sequence[str], checkpoint_step: int | None, earlier: Sequence[Decision]
) -> str | None:
    """Why a restart would not help."""
    if cause.kind == "input":
        return "a person must put this right first"
    if cause.kind == "bad_node" and len(nodes) > 1 and set(nodes) <= set(cause.nodes):
        return "all nodes failed the preflight: look for what they share"
    last = _last_failed(earlier)
    again = (
        last is not None
        and cause.repeatable
        and cause.phase is not None
        and (cause.signature, cause.step) == (last.signature, last.step)
        and last.phase is not None
        # Without a step, a checkpoint since then shows that the job had come past that place.
        and (cause.step is not None or last.checkpoint_step == checkpoint_step)
    )
    if not again:
        return None
    where = "before the first step" if cause.step is None else f"at step {cause.step}"
    return f"the same failure twice {where}: a restart would meet it again"


def _excluded(cause: Cause, nodes: Sequence[str], earlier: Sequence[Decision]) -> tuple[str, ...]:
    """Lost and bad nodes, and a node where things went wrong for the second time."""
    if cause.kind in ("lost_node", "bad_node"):
        return cause.nodes
    # On a single node everything goes wrong there, which says nothing about the node.
    if cause.kind not in _BLAMES_NODE or len(nodes) < 2:
        return ()
    before = [node for past in earlier if past.kind in _BLAMES_NODE for node in past.nodes]
    return tuple(node for node in cause.nodes if node in before)


def _last_failed(earlier: Sequence[Decision]) -> Decision | None:
    return next((decision for decision in reversed(earlier) if decision.failed), None)


def _order(step: int | None) -> int:
    return -1 if step is None else step
