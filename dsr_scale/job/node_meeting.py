"""Where the nodes of a preflight meet: one file each, in a directory that all share.

So the meeting itself proves that the directory is shared, and a node without a network is still heard.
A node rewrites its file whenever it has got further:

    here       its address; others may connect
    measured   its own checks, its links to the next node and to node 0, the encoder servers
    decided    node 0 only: whether there is an all-reduce, and where
    done       how the all-reduce went

Files carry the name of their meeting, so those of an earlier attempt are passed over.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.job.all_reduce import Outcome
from dsr_scale.job.attempt import JOB_VARIABLE
from dsr_scale.job.node_checks import Result
from dsr_scale.job.node_names import expand_nodes
from dsr_scale.job.node_network import Link

ADDRESSES_VARIABLE = "DSR_NODE_ADDRESSES"
"""`node=address node=address`, where names of nodes need not resolve."""

STAGES = ("here", "measured", "decided", "done")

_POLL_S = 0.1
_REFRESH_S = 1.0


@dataclass(frozen=True)
class NodePlace:
    """This process among those of the step."""

    node: str
    rank: int
    world: int
    host: str
    """Under which other nodes reach it."""
    names: tuple[str, ...]
    """Of all nodes in order of rank; empty where unknown."""
    meeting: str
    """The same for all processes of this preflight and for no other."""

    def name_of(self, rank: int) -> str:
        """A node's name, as good as it is known."""
        return self.names[rank] if rank < len(self.names) else f"node of rank {rank}"


@dataclass(frozen=True)
class NodeReport:
    """What one node has found so far; its file holds this."""

    meeting: str
    node: str
    rank: int
    host: str
    port: int
    stage: str = "here"
    results: tuple[Result, ...] = ()
    gpu_model: str = ""
    driver: str = ""
    links: tuple[Link, ...] = ()
    encoders: tuple[tuple[str, str], ...] = ()
    """(host:port, why it cannot be reached or nothing)."""
    store_port: int | None = None
    """Of the all-reduce, in node 0's `decided`; None when there is none."""
    all_reduce: Outcome | None = None


def node_place(environment: Mapping[str, str] = os.environ) -> NodePlace:
    """This process's place by the variables of `srun`; alone without them.

    Raises InputError when the step has several processes on a node.
    """
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", world))
    if world != nodes:
        raise InputError(
            found=f"{world} processes of the preflight on {nodes} nodes",
            required="one process on every node",
            remedy="start it with srun --ntasks-per-node=1",
        )
    machine = socket.gethostname()
    node = environment.get("SLURMD_NODENAME", machine)
    addresses = dict(
        pair.split("=", 1)
        for pair in environment.get(ADDRESSES_VARIABLE, "").split()
        if "=" in pair
    )
    if world == 1:
        return NodePlace(node, 0, 1, machine, (node,), secrets.token_hex(8))
    step = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", JOB_VARIABLE)
    names = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""))
    return NodePlace(
        node,
        int(environment["SLURM_PROCID"]),
        world,
        addresses.get(node, machine),
        names if len(names) == world else (),
        " ".join(environment.get(name, "-") for name in step),
    )


class Meeting:
    """The nodes' files: this node writes its own and waits for others to get as far as it needs."""

    def __init__(self, directory: Path, place: NodePlace) -> None:
        self._directory, self._place = directory, place
        self._began = time.monotonic()
        self.reports: dict[int, NodeReport] = {}
        """The newest that were read, by rank."""
        self._ranks: dict[Path, int] = {}

    def elapsed_s(self) -> float:
        """Seconds since this node's start."""
        return time.monotonic() - self._began

    def left_s(self, limit_s: float) -> float:
        """Seconds until `limit_s` after this node's start, or 0."""
        return max(0.0, limit_s - self.elapsed_s())

    def write(self, report: NodeReport) -> None:
        """Shows `report` to the others. Raises InputError or OSError."""
        atomic_files.write_json(self._directory / f"{report.node}.json", asdict(report))
        self.reports[report.rank] = report

    def wait(self, ranks: Iterable[int], stage: str, limit_s: float) -> set[int]:
        """Waits until all of `ranks` have reached `stage` or `limit_s` is over; gives those that have."""
        wanted, refreshed_s = set(ranks), 0.0
        while True:
            self._read(stage)
            arrived = {rank for rank in wanted if self._has_reached(rank, stage)}
            if arrived == wanted or not self.left_s(limit_s):
                return arrived
            if self.elapsed_s() - refreshed_s > _REFRESH_S:
                refreshed_s = self.elapsed_s()
                # An NFS client keeps what it knows of a directory for half a minute, unless it changes it.
                with tempfile.TemporaryFile(dir=self._directory):
                    pass
            time.sleep(_POLL_S)

    def _read(self, stage: str) -> None:
        for path in self._directory.glob("*.json"):
            rank = self._ranks.get(path)
            if rank is not None and self._has_reached(rank, stage):
                continue
            report = _read_report(path, self._place.meeting)
            if report is not None:
                self._ranks[path] = report.rank
                self.reports[report.rank] = report

    def _has_reached(self, rank: int, stage: str) -> bool:
        report = self.reports.get(rank)
        return report is not None and STAGES.index(report.stage) >= STAGES.index(stage)


def _read_report(path: Path, meeting: str) -> NodeReport | None:
    """None for what is gone, torn, or of another meeting."""
    try:
        values = json.loads(path.read_bytes())
        if values["meeting"] != meeting:
            return None
        outcome = values["all_reduce"]
        return NodeReport(
            **{
                **values,
                "results": tuple(Result(**result) for result in values["results"]),
                "links": tuple(Link(**link) for link in values["links"]),
                "encoders": tuple((address, error) for address, error in values["encoders"]),
                "all_reduce": None if outcome is None else Outcome(**outcome),
            }
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
