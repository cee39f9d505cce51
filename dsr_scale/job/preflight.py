"""Every trainer node is looked at before a GPU works: one process per node, led by the first.

A node checks itself, then its links to others, then all take part in a small all-reduce, unless their
addresses say that they are one machine: loading torch for each would take long and tell nothing. Every
wait has an end, and node 0 judges what it has by then (`preflight_verdict`). Nodes tell each other through files
(`node_meeting`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError
from dsr_scale.config.addresses import parse_address
from dsr_scale.job import node_network
from dsr_scale.job.all_reduce import Backend, Child, Task
from dsr_scale.job.node_checks import (
    Gpu,
    GpuQueryError,
    Needs,
    Result,
    gpu_model,
    gpu_results,
    place_results,
    query_gpus,
)
from dsr_scale.job.node_meeting import Meeting, NodePlace, NodeReport
from dsr_scale.job.node_network import Link, Listener, is_loopback

BAD_NODES_STATUS = 3
"""Particular nodes are bad; the job may go on without them."""
BAD_NODES_FILE = "bad_nodes"
"""Their names, one a line."""
MEASURE_TIMEOUT_S = 16.0
"""For a node's own checks and its links, once the others are there."""
HUNG_DISK = Result(
    "run directory",
    "failed",
    "hangs",
    f"a disk that did not answer within {MEASURE_TIMEOUT_S:.0f} s",
    "disks that answer: of the run directory, data.cache_directory and TMPDIR",
    "have the node's mounts looked at, or leave it out",
)


@dataclass(frozen=True)
class Limits:
    """Seconds since a node's start at which it stops waiting."""

    meeting_s: float = 20.0
    """For the others to be there."""
    measured_s: float = 38.0
    """For their measurements; `MEASURE_TIMEOUT_S` after the above, and a little."""
    all_s: float = 50.0
    """For everything."""
    all_reduce_s: float = 30.0
    """That long the all-reduce itself may take, within the above."""


@dataclass(frozen=True)
class Findings:
    """What node 0 knows at the end."""

    place: NodePlace
    limits: Limits
    reports: dict[int, NodeReport]
    """By rank; nodes that were never heard of are missing."""
    seconds: float

    def name_of(self, rank: int) -> str:
        """A node's name in its own words, or as the step knows it."""
        report = self.reports.get(rank)
        return self.place.name_of(rank) if report is None else report.node


def run_preflight(
    directory: Path,
    place: NodePlace,
    needs: Needs,
    backend: Backend,
    *,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.time,
) -> Findings | None:
    """Checks this node together with the others; on node 0 all that was found, elsewhere None.

    Every node calls it with its own `place`. Raises InputError or OSError when `directory` cannot be
    written, and InputError on other nodes when node 0 is not heard of.
    """
    return _Preflight(directory, place, needs, backend, limits or Limits(), clock).run()


class _Preflight:
    """One node's part."""

    def __init__(
        self,
        directory: Path,
        place: NodePlace,
        needs: Needs,
        backend: Backend,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._directory, self._place, self._needs = directory, place, needs
        self._backend: Backend = backend
        self._limits, self._clock = limits, clock
        self._meeting = Meeting(directory, place)
        self._child: Child | None = None

    def run(self) -> Findings | None:
        place = self._place
        listener = Listener(place.meeting, place.rank, clock=self._clock)
        try:
            report = NodeReport(place.meeting, place.node, place.rank, place.host, listener.port)
            self._meeting.write(report)
            here = self._meeting.wait(range(place.world), "here", self._limits.meeting_s)
            if any(not is_loopback(self._meeting.reports[rank].host) for rank in here - {0}):
                self._child = Child(self._directory / f"{place.node}.all_reduce.log")
            report = self._measured(report, sorted(here))
            self._meeting.write(report)
            if place.rank == 0:
                return self._lead(report)
            self._follow(report)
            return None
        finally:
            listener.close()
            if self._child:
                self._child.close()

    def _measured(self, report: NodeReport, here: Sequence[int]) -> NodeReport:
        """This node's own checks, then its links to nodes that are here."""
        needs, rank = self._needs, self._place.rank
        following = here[(here.index(rank) + 1) % len(here)]
        servers = sorted({*needs.named_encoders, *needs.announced_encoders})
        others = sorted({following, here[0]} - {rank})
        # All at once and each with an end: a dead disk, driver or name service hangs.
        questions: dict[tuple[str, str | int], Callable[[], Any]] = {
            ("gpus", 0): lambda: _gpus(needs),
            ("places", 0): lambda: place_results(needs),
            **{("link", to): lambda to=to: self._link(to, to == following) for to in others},
            **{("server", at): lambda at=at: _encoder_error(at) for at in servers},
        }
        answers = node_network.all_at_once(questions, MEASURE_TIMEOUT_S)
        late = f"not measured within {MEASURE_TIMEOUT_S:.0f} s"
        gpus = answers.get(("gpus", 0), GpuQueryError(late))
        known = [] if isinstance(gpus, GpuQueryError) else gpus[: needs.gpus]
        return replace(
            report,
            stage="measured",
            results=(
                *(gpu_results(gpus, needs) if needs.gpus else ()),
                *answers.get(("places", 0), (HUNG_DISK,)),
            ),
            gpu_model=gpu_model(known),
            driver=" + ".join(sorted({gpu.driver for gpu in known})),
            links=tuple(answers.get(("link", to), Link(to, late)) for to in others),
            encoders=tuple((at, answers.get(("server", at), "no answer")) for at in servers),
        )

    def _link(self, to: int, transfer: bool) -> Link:
        other = self._meeting.reports[to]
        return node_network.measure_link(
            to, other.host, other.port, other.meeting, transfer=transfer, clock=self._clock
        )

    def _lead(self, report: NodeReport) -> Findings:
        """Node 0 waits for the others, decides about the all-reduce and gathers all that is known."""
        meeting, limits = self._meeting, self._limits
        here = meeting.wait(range(1, self._place.world), "here", limits.meeting_s)
        measured = meeting.wait(here, "measured", limits.measured_s)
        sound = len(measured) == self._place.world - 1 and all(
            _is_sound(known) for known in meeting.reports.values()
        )
        child = self._child if sound else None
        report = replace(report, stage="decided")
        if child:
            child.begin(self._task(self._place.host, 0))
            report = replace(report, store_port=child.port(self._left_s()))
        meeting.write(report)
        if child:
            meeting.write(replace(report, stage="done", all_reduce=child.outcome(self._left_s())))
            meeting.wait(measured if report.store_port else (), "done", limits.all_s)
        return Findings(self._place, limits, dict(meeting.reports), meeting.elapsed_s())

    def _follow(self, report: NodeReport) -> None:
        """Other nodes do as node 0 decides. Raises InputError when it is not heard of."""
        meeting, place, child = self._meeting, self._place, self._child
        if 0 not in meeting.reports:
            raise InputError(
                found=f"{place.node} sees no file of node 0, {place.name_of(0)}, in "
                f"{self._directory} after {self._limits.meeting_s:.0f} s",
                required="a run directory on a disk that all nodes share",
                remedy="check that the disk is mounted on both nodes, and that node 0 started",
            )
        meeting.wait([0], "decided", self._limits.all_s)
        leader = meeting.reports[0]
        if child and leader.store_port:
            child.begin(self._task(leader.host, leader.store_port))
            outcome = child.outcome(self._left_s())
            meeting.write(replace(report, stage="done", all_reduce=outcome))

    def _task(self, host: str, port: int) -> Task:
        place = self._place
        return Task(self._backend, place.rank, place.world, host, port, self._left_s())

    def _left_s(self) -> float:
        """For the all-reduce; some of the time is left to write down how it went."""
        left = self._meeting.left_s(self._limits.all_s - 4.0)
        return min(self._limits.all_reduce_s, max(1.0, left))


def _gpus(needs: Needs) -> list[Gpu] | GpuQueryError:
    try:
        return query_gpus() if needs.gpus else []
    except GpuQueryError as error:
        return error


def _encoder_error(address: str) -> str:
    parsed = parse_address(address)
    return node_network.connection_error(*parsed) if parsed else "not host:port"


def _is_sound(report: NodeReport) -> bool:
    """Whether an all-reduce with this node could teach something new."""
    gpus = (result for result in report.results if result.check.startswith("GPU"))
    return all(r.state != "failed" for r in gpus) and not any(link.error for link in report.links)
