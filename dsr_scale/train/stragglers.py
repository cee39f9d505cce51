"""Which node is slow: step times of all ranks, compared off the critical path.

Collectives make every rank as slow as the slowest, and sums hide which one it is. At a log line each
rank puts its own times into the store of the process group, and the first rank reads those of the line
before, all in threads of their own: no collective, and nobody waits. The record is one line late.
"""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dsr_scale.train.failing import own_node

if TYPE_CHECKING:
    import torch.distributed as dist

SLOW = 1.15
"""Times the median of all nodes, from where a node counts as slow."""
LINES_IN_A_ROW = 3
"""A node that is slow for one line may be lucky the next time."""


@dataclass(frozen=True)
class RankTimes:
    """Means of one rank per step between two log lines."""

    step: int
    rank: int
    node: str
    forward_backward_s: float
    data_wait_s: float


@dataclass(frozen=True)
class Comparison:
    """All ranks at one log line."""

    step: int
    slowest_rank: int
    slowest_node: str
    slowest_over_median: float
    """Time of the slowest node over the median of nodes."""
    node_s: dict[str, float]
    """Median of forward and backward over the ranks of each node."""
    median_s: float
    """Of the nodes; of the lower half's last where they are even, so that one of two may be slow."""

    def metrics(self) -> dict[str, int | float | str]:
        """What is logged."""
        return {
            "slowest_rank": self.slowest_rank,
            "slowest_node": self.slowest_node,
            "slowest_over_median": self.slowest_over_median,
        }


def compare(times: Sequence[RankTimes]) -> Comparison:
    """The slowest among ranks and nodes; `times` has at least one, all of one step."""
    by_node: dict[str, list[float]] = {}
    for each in times:
        by_node.setdefault(each.node, []).append(each.forward_backward_s)
    node_s = {node: statistics.median(seconds) for node, seconds in by_node.items()}
    median_s = statistics.median_low(node_s.values())
    slowest = max(node_s, key=lambda node: node_s[node])
    return Comparison(
        step=times[0].step,
        slowest_rank=max(times, key=lambda each: each.forward_backward_s).rank,
        slowest_node=slowest,
        slowest_over_median=node_s[slowest] / median_s if median_s > 0 else 1.0,
        node_s=node_s,
        median_s=median_s,
    )


class SlowNodes:
    """Says once when a node has been slow for several lines in a row."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}

    def notice(self, comparison: Comparison) -> list[str]:
        """Takes in the next line; a sentence for each node that is slow for the third time."""
        median_s, said = comparison.median_s, []
        lines: dict[str, int] = {}
        for node, seconds in comparison.node_s.items():
            if seconds <= SLOW * median_s:
                continue
            lines[node] = self._lines.get(node, 0) + 1
            if lines[node] == LINES_IN_A_ROW:
                said.append(
                    f"node {node} takes {seconds / median_s:.2f} times the median of all nodes "
                    f"(forward and backward {seconds:.3g} s, others {median_s:.3g} s)"
                )
        self._lines = lines
        return said


class Stragglers:
    """Exchanges step times through the store of the process group; nothing for a single process."""

    def __init__(self, store: dist.Store | None, *, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._line = 0
        self._previous_step: int | None = None
        self._slow = SlowNodes()
        self._asked: tuple[int, RankTimes, int | None] | None = None
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._found: Comparison | None = None
        self._sentences: list[str] = []
        if store is not None and world_size > 1:
            threading.Thread(
                target=self._run, args=(store,), name="stragglers", daemon=True
            ).start()

    def put(self, step: int, *, forward_backward_s: float, data_wait_s: float) -> None:
        """Hands in this rank's times at a log line; every rank calls it at the same steps. Never waits.

        A line for which the store is too slow is left out.
        """
        times = RankTimes(step, self._rank, own_node(), forward_backward_s, data_wait_s)
        self._asked = (self._line, times, self._previous_step)
        self._line, self._previous_step = self._line + 1, step
        self._wake.set()

    def take(self) -> tuple[dict[str, int | float | str], list[str]]:
        """On the first rank: metrics of the newest line that was compared since the last call, and
        sentences about slow nodes; both empty when there is nothing new."""
        with self._lock:
            found, self._found = self._found, None
            sentences, self._sentences = self._sentences, []
        return {} if found is None else found.metrics(), sentences

    def _run(self, store: dist.Store) -> None:
        try:
            # A connection of its own, so that the main thread never waits for this one.
            store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            while True:
                self._wake.wait()
                self._wake.clear()
                asked = self._asked
                assert asked is not None
                line, times, previous_step = asked
                store.set(_key(line, self._rank), json.dumps(asdict(times)))
                if self._rank == 0 and previous_step is not None:
                    self._read(store, line - 1, previous_step)
        except RuntimeError:
            # The first rank, which keeps the store, is gone; others find out soon enough.
            return

    def _read(self, store: dist.Store, line: int, step: int) -> None:
        keys = [_key(line, rank) for rank in range(self._world_size)]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        if not keys:
            return
        times = [RankTimes(**json.loads(value)) for value in store.multi_get(keys)]
        # A rank whose thread is late has an older line there, one that is ahead a newer.
        times = [each for each in times if each.step == step]
        if not times:
            return
        comparison = compare(times)
        with self._lock:
            self._found = comparison
            self._sentences += self._slow.notice(comparison)


def _key(line: int, rank: int) -> str:
    # Two places in turn: a rank that is quick does not overwrite the line that is being read.
    return f"dsr_scale/step_times/{line % 2}/{rank}"
