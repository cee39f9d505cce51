"""How ranks failed: each writes its own words beside its log, and whoever judges the attempt reads them.

A rank that was killed writes nothing; the launcher's wrapper, which outlives it, leaves its exit status.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dsr_scale.base import atomic_files

FAILURE_VARIABLE = "DSR_FAILURE"
"""Names a file on the node's own disk; the launcher's wrapper copies it to the attempt's directory,
and to the job's log where that is full."""

INPUT_STATUS = 2
HUNG_STATUS = 75
"""EX_TEMPFAIL."""

Kind = Literal["input", "outage", "hang", "error"]
"""`input` is for a person to put right; `outage` may pass (encoder servers away, a peer that never
came); `error` is any other exception."""


@dataclass(frozen=True)
class Failure:
    """One rank's account."""

    rank: int
    node: str
    kind: Kind
    error: str
    """Name of the exception's class, or what was waited for in a hang."""
    message: str
    """First lines of the message."""
    step: int | None
    """Optimizer steps finished on this rank; None before the first was begun."""
    phase: str
    """What it was doing: start, data, forward_backward, optimizer, agree, checkpoint, grid."""
    time_s: float
    """Seconds since the epoch, by the node's clock."""
    traceback: str


@dataclass(frozen=True)
class RankEnd:
    """How a rank's process ended."""

    rank: int
    node: str
    status: int
    """Exit status as a shell sees it: 128 + signal."""
    time_s: float


def write_failure(path: Path, failure: Failure) -> None:
    """Keeps it as JSON."""
    atomic_files.write_json(path, asdict(failure))


def read_failures(attempt: Path) -> list[Failure]:
    """Accounts of all ranks that left one, in rank order; torn files are passed over."""
    found = []
    for path in sorted(attempt.glob("rank_*.failure.json")):
        try:
            found.append(Failure(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return found


_END = re.compile(r"(\d+) (\S+) (\d+) (\d+(?:\.\d+)?)\s*")
"""rank node status seconds, as launchers/rank.sh writes it."""


def read_ends(attempt: Path) -> list[RankEnd]:
    """Ends of all ranks whose wrapper wrote one, in rank order."""
    found = []
    for path in sorted(attempt.glob("rank_*.end")):
        try:
            match = _END.fullmatch(path.read_text(errors="replace"))
        except OSError:
            continue
        if match:
            found.append(RankEnd(int(match[1]), match[2], int(match[3]), float(match[4])))
    return found
