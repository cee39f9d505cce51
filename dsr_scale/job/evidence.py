"""What an attempt leaves behind, read in one place and never failing: files may be torn or missing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsr_scale.job.failures import Failure, RankEnd, read_ends, read_failures

Stopped = Literal["time_limit", "preempted", "cancelled", "encoders"]

FULL_BYTES = 64 << 20
"""A disk with less room than this is full."""
TAIL_LINES = 40
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class Evidence:
    """All that is known when an attempt has ended."""

    status: int
    """Exit status of the trainers' `srun`."""
    stopped: Stopped | None = None
    """What Slurm asked for."""
    lost_nodes: tuple[str, ...] = ()
    bad_nodes: tuple[str, ...] = ()
    """Nodes that failed the preflight."""
    failures: Sequence[Failure] = ()
    ends: Sequence[RankEnd] = ()
    ranks: frozenset[int] = frozenset()
    """Ranks of which anything is known."""
    stacks: frozenset[int] = frozenset()
    """Ranks that wrote their stacks."""
    last_lines: tuple[tuple[int, str], ...] = ()
    """(rank, last line of its log) of ranks that ended without an account."""
    launcher_lines: tuple[str, ...] = ()
    """Last lines of the launcher's own log, of the preflight and of `srun`."""
    full_disk: str = ""
    """The run directory, where its disk is full."""

    @property
    def nodes(self) -> dict[int, str]:
        """Node of each rank that left an account or an end."""
        return {end.rank: end.node for end in self.ends} | {f.rank: f.node for f in self.failures}


def gather(
    attempt: Path,
    run_directory: Path,
    *,
    status: int,
    stopped: Stopped | None = None,
    lost_nodes: tuple[str, ...] = (),
    bad_nodes: tuple[str, ...] = (),
    launcher_log: Path | None = None,
) -> Evidence:
    """Reads what ranks left in the directory `attempt`."""
    failures, ends = read_failures(attempt), read_ends(attempt)
    accounts = {failure.rank for failure in failures}
    ended = {end.rank for end in ends}
    stacks = {rank for rank in _ranks_with(attempt, "stacks") if _has_content(attempt, rank)}
    tails = {rank: tail(rank_log(attempt, rank), 1) for rank in sorted(ended - accounts)}
    return Evidence(
        status=status,
        stopped=stopped,
        lost_nodes=lost_nodes,
        bad_nodes=bad_nodes,
        failures=failures,
        ends=ends,
        ranks=frozenset(accounts | ended | _ranks_with(attempt, "log")),
        stacks=frozenset(stacks),
        last_lines=tuple((rank, lines[-1]) for rank, lines in tails.items() if lines),
        launcher_lines=() if launcher_log is None else tuple(tail(launcher_log, TAIL_LINES)),
        full_disk=str(run_directory) if _is_full(run_directory) else "",
    )


def rank_log(attempt: Path, rank: int) -> Path:
    """Where a rank's output is kept."""
    return attempt / f"rank_{rank:05d}.log"


def rank_stacks(attempt: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads."""
    return attempt / f"rank_{rank:05d}.stacks"


def tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines of a file that are not empty; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def _is_full(directory: Path) -> bool:
    try:
        return shutil.disk_usage(directory).free < FULL_BYTES
    except OSError:
        return False


def _ranks_with(attempt: Path, suffix: str) -> set[int]:
    names = [path.stem.removeprefix("rank_") for path in attempt.glob(f"rank_*.{suffix}")]
    return {int(name) for name in names if name.isdigit()}


def _has_content(attempt: Path, rank: int) -> bool:
    return rank_stacks(attempt, rank).stat().st_size > 0
