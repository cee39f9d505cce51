"""What node 0 makes of all nodes' reports: which node is bad, and what is wrong with the job itself.

A failure of particular nodes names them, and the job can go on elsewhere. The same failure on every node
is no node's fault but a wrong setting, and a person has to put it right. Where two nodes disagree, such
as over a link, the one with more trouble is blamed.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsr_scale.base.errors import InputError
from dsr_scale.job.all_reduce import Outcome, bus_bandwidth
from dsr_scale.job.node_checks import Needs, Result, State
from dsr_scale.job.node_meeting import STAGES, NodeReport
from dsr_scale.job.preflight import Findings

CLOCK_WARNING_S, CLOCK_FAILURE_S = 1.0, 5.0
"""The lock on a run directory compares times of different nodes and allows for 10 s."""
SLOW_SHARE = 0.25
"""Of the median bandwidth of all links; a slower one is broken."""
LEAST_NODES_FOR_MEDIAN = 4
SHOWN_NODES = 3
"""In a message about all of them."""
NOT_ARRIVED = ("start", "loaded")
"""Stages of the all-reduce before a node is at the store."""
FAULTS_OF_A_NODE = ("GPU memory", "GPU errors", "clock")
"""Of a lone node: not due to a setting."""

_NETWORK_REMEDY = "check the node's network and firewall, or leave it out"


@dataclass(frozen=True)
class NodeVerdict:
    """All results of one node."""

    node: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """What this node may not train with."""
        return tuple(result for result in self.results if result.state == "failed")


@dataclass(frozen=True)
class Verdict:
    """What the preflight came to."""

    nodes: tuple[NodeVerdict, ...]
    """In order of rank."""
    common_checks: tuple[str, ...]
    """Names of checks that failed on all of them: a wrong setting."""
    bad_nodes: tuple[str, ...]
    """Nodes with a failure that others do not have."""
    seconds: float
    all_reduce_bytes_per_s: float | None
    """Bus bandwidth; None where no all-reduce was finished."""

    def common_problems(self) -> list[InputError]:
        """What a person has to put right before any node can train."""
        return [_common_problem(check, self.nodes) for check in self.common_checks]

    def node_problems(self) -> list[str]:
        """Other failures, then warnings, each once with the nodes that have it."""
        nodes_of: dict[Result, list[str]] = {}
        for verdict in self.nodes:
            for result in verdict.results:
                if result.state != "ok" and not (
                    result.state == "failed" and result.check in self.common_checks
                ):
                    nodes_of.setdefault(replace(result, value=""), []).append(verdict.node)
        ordered = sorted(nodes_of.items(), key=lambda item: item[0].state)
        return [
            f"{result.state}: {', '.join(nodes)}: {result.found}; required: {result.required}; "
            f"what to do: {result.remedy}"
            for result, nodes in ordered
        ]


def judge(findings: Findings, needs: Needs) -> Verdict:
    """The verdict over all nodes of the step."""
    place, reports = findings.place, findings.reports
    results: dict[int, list[Result]] = {rank: [] for rank in range(place.world)}
    for rank, report in reports.items():
        results[rank] += report.results
    for judged in (
        _presence(findings),
        _equal_gpus(reports) if needs.gpus else {},
        _clocks(reports) if place.world > 1 else {},
        _links(findings) if place.world > 1 else {},
        _encoders(reports, needs) if needs.uses_encoders else {},
        _all_reduce(findings),
    ):
        for rank, more in judged.items():
            results[rank] += more
    nodes = tuple(
        NodeVerdict(findings.name_of(rank), tuple(of_node)) for rank, of_node in results.items()
    )
    common = _common_checks(nodes)
    outcomes = [report.all_reduce for report in reports.values() if report.all_reduce]
    seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    return Verdict(
        nodes,
        common,
        tuple(node.node for node in nodes if any(r.check not in common for r in node.failed)),
        findings.seconds,
        bus_bandwidth(max(seconds), place.world) if len(seconds) == place.world else None,
    )


def _common_checks(nodes: Sequence[NodeVerdict]) -> tuple[str, ...]:
    """Checks that failed on every node that was heard of."""
    counts = Counter(
        check for node in nodes for check in dict.fromkeys(result.check for result in node.failed)
    )
    silent, number = counts["report"], len(nodes)

    def is_common(check: str) -> bool:
        if check == "report":
            # Node 0 is always heard of: when nobody else is, the directory is not shared.
            return silent == number - 1 > 1
        if number == 1:
            return check not in FAULTS_OF_A_NODE
        return counts[check] > 1 and counts[check] + silent == number

    return tuple(check for check in counts if is_common(check))


def _common_problem(check: str, nodes: Sequence[NodeVerdict]) -> InputError:
    # The first of each node.
    failed = {
        node.node: result
        for node in nodes
        for result in reversed(node.failed)
        if result.check == check
    }
    first = next(iter(failed.values()))
    if any(result.found != first.found for result in failed.values()):
        shown = [f"{node}: {result.found}" for node, result in failed.items()]
        more = len(shown) - SHOWN_NODES
        found = "; ".join(shown[:SHOWN_NODES] + ([f"and {more} more nodes"] if more > 0 else []))
    else:
        where = f"{len(failed)} nodes" if len(failed) > 1 else next(iter(failed))
        found = f"on {where}: {first.found}"
    return InputError(found=found, required=first.required, remedy=first.remedy)


def _presence(findings: Findings) -> dict[int, list[Result]]:
    """Nodes that were not heard of, or not to the end of their checks."""
    judged: dict[int, list[Result]] = {}
    limits = findings.limits
    for rank in range(findings.place.world):
        report = findings.reports.get(rank)
        if report is None:
            value, found = "no report", f"no report within {limits.meeting_s:.0f} s"
            remedy = "look at the node: it is down, slow to start, or does not have the run directory's disk"
        elif STAGES.index(report.stage) < STAGES.index("measured"):
            value = "hangs"
            found = f"its checks did not end within {limits.measured_s:.0f} s"
            remedy = "look at the node: its driver, its disks or its network hang"
        else:
            continue
        judged[rank] = [Result("report", "failed", value, found, "a report of every node", remedy)]
    return judged


def _equal_gpus(reports: Mapping[int, NodeReport]) -> dict[int, list[Result]]:
    """Other models than most nodes have fail, other drivers are a warning."""
    judged: dict[int, list[Result]] = {}
    known = {rank: report for rank, report in reports.items() if report.gpu_model}
    kinds: tuple[tuple[str, State, Callable[[NodeReport], str]], ...] = (
        ("GPU model", "failed", lambda report: report.gpu_model),
        ("driver", "warning", lambda report: report.driver),
    )
    for check, state, value_of in kinds:
        values = Counter(value_of(report) for report in known.values()).most_common()
        if len(values) < 2:
            continue
        (usual, count), (_, next_count) = values[:2]
        for rank, report in known.items():
            # Without a majority nobody knows who is right.
            if value_of(report) == usual and count > next_count:
                continue
            result = Result(
                check,
                state,
                value_of(report),
                f"{check} {value_of(report)}",
                f"the same on all nodes; {count} of {len(known)} have {usual}",
                "leave the node out, or have it set up like the others",
            )
            judged.setdefault(rank, []).append(result)
    return judged


def _clocks(reports: Mapping[int, NodeReport]) -> dict[int, list[Result]]:
    """Each node's clock against the median; against node 0's where there are only two."""
    ahead_s = {0: 0.0}
    for rank, report in reports.items():
        for link in report.links:
            if link.to == 0 and not link.error:
                ahead_s[rank] = -link.clock_behind_s
    reference = statistics.median(ahead_s.values()) if len(ahead_s) > 2 else 0.0
    judged = {}
    for rank, value in ahead_s.items():
        skew_s = value - reference
        shown = f"{skew_s:+.3f} s"
        if abs(skew_s) <= CLOCK_WARNING_S:
            judged[rank] = [Result("clock", "ok", shown)]
            continue
        judged[rank] = [
            Result(
                "clock",
                "failed" if abs(skew_s) > CLOCK_FAILURE_S else "warning",
                shown,
                f"a clock {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the other nodes'",
                f"within {CLOCK_WARNING_S:.0f} s, and never more than {CLOCK_FAILURE_S:.0f} s",
                "have the node's time service (chrony, ntpd) looked at",
            )
        ]
    return judged


def _links(findings: Findings) -> dict[int, list[Result]]:
    """Broken links are put down to the end that has more of them, slow ones to their sender."""
    reports = findings.reports
    broken = [
        (rank, link) for rank, report in reports.items() for link in report.links if link.error
    ]
    trouble = Counter(end for rank, link in broken for end in (rank, link.to))
    # Then it is the network between the nodes, and every sender has its share.
    none_works = len(broken) == sum(len(report.links) for report in reports.values())
    judged: dict[int, list[Result]] = {rank: [] for rank in range(findings.place.world)}
    for rank, link in broken:
        blamed = rank if none_works or trouble[rank] > trouble[link.to] else link.to
        source, target = findings.name_of(rank), findings.name_of(link.to)
        judged[blamed].append(
            Result(
                "network",
                "failed",
                "unreachable",
                f"no connection from {source} to {target}: {link.error}",
                "every node reaches the next one and node 0",
                _NETWORK_REMEDY,
            )
        )
    speeds = {
        rank: link.bytes_per_s
        for rank, report in reports.items()
        for link in report.links
        if link.bytes_per_s is not None and not link.loopback
    }
    median = statistics.median(speeds.values()) if len(speeds) >= LEAST_NODES_FOR_MEDIAN else 0.0
    for rank, speed in speeds.items():
        if speed < SLOW_SHARE * median:
            target = next(link.to for link in reports[rank].links if link.bytes_per_s is not None)
            judged[rank].append(
                Result(
                    "network",
                    "failed",
                    _gb_per_s(speed),
                    f"{_gb_per_s(speed)} from {findings.name_of(rank)} to {findings.name_of(target)}",
                    f"{_gb_per_s(SLOW_SHARE * median)}, a quarter of the median link",
                    _NETWORK_REMEDY,
                )
            )
        elif not judged[rank]:
            judged[rank].append(Result("network", "ok", _gb_per_s(speed)))
    for rank, report in reports.items():
        if not judged[rank] and report.links:
            judged[rank].append(Result("network", "ok", "reachable"))
    return judged


def _encoders(reports: Mapping[int, NodeReport], needs: Needs) -> dict[int, list[Result]]:
    """Servers that the run file names must answer every node; announced ones may be gone, but one that
    answers some nodes has to answer all."""
    answering = {
        address for report in reports.values() for address, error in report.encoders if not error
    }
    expected = answering | set(needs.named_encoders)
    judged = {}
    for rank, report in reports.items():
        missed = [(a, error) for a, error in report.encoders if error and a in expected]
        reached = sum(not error for _, error in report.encoders)
        if missed:
            shown = "; ".join(f"{address}: {error}" for address, error in missed)
            result = Result(
                "encoders",
                "failed",
                f"{reached} answer",
                f"encoder servers that cannot be reached: {shown}",
                "a connection from every node to every server",
                "start the servers, correct encoder.servers, or check the node's network",
            )
        elif reached:
            result = Result("encoders", "ok", f"{reached} answer")
        else:
            announced = len(needs.announced_encoders)
            result = Result(
                "encoders",
                "failed" if needs.requires_encoders else "warning",
                "none yet",
                f"{announced} encoder servers have announced themselves, none answers"
                if announced
                else "no encoder server has announced itself yet",
                "a server that answers; trainers wait for one",
                "see the log of the encoders, or start them: dsr-scale serve",
            )
        judged[rank] = [result]
    return judged


def _all_reduce(findings: Findings) -> dict[int, list[Result]]:
    """Nodes that erred or did not arrive; the others only waited for them."""
    world = findings.place.world
    outcomes = {
        rank: report.all_reduce
        for rank, report in findings.reports.items()
        if report.all_reduce is not None
    }
    if not outcomes:
        return {}
    if findings.reports[0].store_port is None:
        blamed = {0}
    else:
        absent = {r for r in range(world) if r not in outcomes or outcomes[r].stage in NOT_ARRIVED}
        unfinished = {rank for rank, outcome in outcomes.items() if outcome.stage != "done"}
        blamed = absent or {rank for rank in unfinished if outcomes[rank].error} or unfinished
    judged = {}
    for rank, outcome in outcomes.items():
        if outcome.seconds is not None:
            speed = _gb_per_s(bus_bandwidth(outcome.seconds, world))
            judged[rank] = [Result("all-reduce", "ok", speed)]
        elif rank not in blamed:
            judged[rank] = [Result("all-reduce", "ok", "waited for others")]
    for rank in blamed:
        stage, found = _all_reduce_failure(outcomes.get(rank))
        judged[rank] = [
            Result(
                "all-reduce",
                "failed",
                stage,
                found,
                f"an all-reduce over {world} nodes within {findings.limits.all_reduce_s:.0f} s",
                "see the node's .all_reduce.log in the preflight directory; set NETWORK_INTERFACE, "
                "and NCCL_DEBUG=INFO to see more",
            )
        ]
    return judged


def _all_reduce_failure(outcome: Outcome | None) -> tuple[str, str]:
    """A word for the table, and what happened to a node that is to blame."""
    if outcome is None:
        return "no word", "no word about the all-reduce"
    if outcome.error:
        return "error", f"the all-reduce failed: {outcome.error}"
    match outcome.stage:
        case "start":
            return "absent", "torch was not loaded in time for the all-reduce"
        case "loaded":
            return "absent", "it did not reach the all-reduce's store on node 0"
        case _:
            return "hangs", "the all-reduce hangs, though all nodes arrived"


def _gb_per_s(bytes_per_s: float) -> str:
    return (
        f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"
    )
