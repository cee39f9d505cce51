"""The preflight of nodes: what is found on a node, between nodes, and who is blamed for it."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dsr_scale.base.errors import InputError
from dsr_scale.cli import preflight as command
from dsr_scale.config.load import load_run
from dsr_scale.config.problems import ConfigError
from dsr_scale.job import node_network, preflight
from dsr_scale.job.all_reduce import Child, Outcome, Task, bus_bandwidth
from dsr_scale.job.node_checks import (
    GIB,
    GpuQueryError,
    Needs,
    Result,
    checkpoint_room,
    gpu_results,
    query_gpus,
    scratch_room,
)
from dsr_scale.job.node_meeting import Meeting, NodePlace, NodeReport, node_place
from dsr_scale.job.node_names import expand_nodes
from dsr_scale.job.node_network import Link, Listener, measure_link
from dsr_scale.job.preflight import BAD_NODES_STATUS, Findings, Limits, run_preflight
from dsr_scale.job.preflight_verdict import Verdict, judge

QUICK = Limits(meeting_s=3.0, measured_s=4.0, all_s=9.0, all_reduce_s=2.0)
"""Of nodes on a busy machine."""

# --- GPUs ------------------------------------------------------------------------------------------

LINE = "{index}, GPU-{index}a, NVIDIA H100 80GB HBM3, 81559, {used}, 550.54, {errors}"


def install_nvidia_smi(
    directory: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int = 0
) -> None:
    """A program of that name, first on PATH."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpu_lines(number: int, *, used: int = 511, errors: str = "0") -> str:
    """The last GPU has `used` MiB in use and `errors`."""
    return "\n".join(
        LINE.format(
            index=index,
            used=used if index == number - 1 else 4,
            errors=errors if index == number - 1 else "0",
        )
        for index in range(number)
    )


def needs_for(directory: Path, **changes: Any) -> Needs:
    needs = Needs(gpus=0, run_directory=directory, checkpoint_bytes=1, data_cache=None)
    return dataclasses.replace(needs, **changes)


@pytest.mark.parametrize(
    ("output", "failed", "said"),
    [
        (gpu_lines(8), [], ""),
        (gpu_lines(8, errors="[N/A]"), [], ""),
        (gpu_lines(7), ["GPUs"], "7 GPUs"),
        (gpu_lines(8, used=9216), ["GPU memory"], "GPU 7: 9.0 GiB"),
        (gpu_lines(8, errors="2"), ["GPU errors"], "GPU 7: 2"),
    ],
    ids=["good", "no_ecc", "seven_of_eight", "busy", "memory_errors"],
)
def test_gpus_of_a_node(
    output: str, failed: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, output)
    results = gpu_results(query_gpus(), needs_for(tmp_path, gpus=8))
    bad = [result for result in results if result.state != "ok"]
    assert [result.check for result in bad] == failed
    assert all(result.state == "failed" and said in result.found for result in bad)


def test_colocated_encoders_may_hold_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, gpu_lines(8, used=9216))
    results = gpu_results(query_gpus(), needs_for(tmp_path, gpus=8, colocated_encoders=True))
    assert {result.state for result in results} == {"ok"}


def test_only_gpus_that_ranks_take_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, gpu_lines(8, used=9216))
    results = gpu_results(query_gpus(), needs_for(tmp_path, gpus=4))
    assert [(r.check, r.state) for r in results if r.state != "ok"] == [("GPUs", "warning")]
    assert [gpu.index for gpu in query_gpus({"CUDA_VISIBLE_DEVICES": "6,GPU-1a,9,2"})] == [6, 1]


def test_nvidia_smi_that_cannot_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GpuQueryError, match="no nvidia-smi"):
        query_gpus()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    install_nvidia_smi(tmp_path, monkeypatch, "GPU 0000:1B:00.0 is lost", status=15)
    with pytest.raises(GpuQueryError, match=r"status 15: GPU 0000:1B:00\.0 is lost"):
        query_gpus()
    install_nvidia_smi(tmp_path, monkeypatch, "No devices were found")
    with pytest.raises(GpuQueryError, match="No devices were found"):
        query_gpus()


# --- rooms, names, places --------------------------------------------------------------------------


def test_disks_too_small(tmp_path: Path) -> None:
    # A directory that does not exist yet is judged by the disk it will be on.
    place = tmp_path / "not" / "there"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert checkpoint_room(place, free // 2).state == "ok"
    full = checkpoint_room(place, 2 * free)
    assert full.state == "failed"
    assert str(place) in full.found and f"{2 * free / GIB:.1f} GiB" in full.required
    states = [
        scratch_room("shared memory", tmp_path, least_bytes=least, comfortable_bytes=much).state
        for least, much in ((2 * free, 4 * free), (1, 2 * free), (1, 2))
    ]
    assert states == ["failed", "warning", "ok"]


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("gpu07", ["gpu07"]),
        ("node[1-3,7],b", ["node1", "node2", "node3", "node7", "b"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("r[1-2]n[3-4]-ib", ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]),
        ("", []),
    ],
)
def test_node_names_of_slurm(short: str, names: list[str]) -> None:
    assert list(expand_nodes(short)) == names


def test_place_in_a_step() -> None:
    variables = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURMD_NODENAME": "node4",
        "DSR_NODE_ADDRESSES": "node3=10.0.0.3 node4=10.0.0.4 ",
    }
    place = node_place(variables)
    assert (place.node, place.rank, place.world, place.host) == ("node4", 1, 2, "10.0.0.4")
    assert place.names == ("node3", "node4")
    other = node_place(variables | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "node3"})
    assert other.meeting == place.meeting
    assert node_place(variables | {"SLURM_RESTART_COUNT": "1"}).meeting != place.meeting
    assert node_place({}).world == 1
    with pytest.raises(InputError, match="ntasks-per-node=1"):
        node_place(variables | {"SLURM_STEP_NUM_TASKS": "4"})


# --- links -----------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("meeting", 3, clock=lambda: time.time() + 7.0)
    yield listener
    listener.close()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_link_has_a_clock_and_a_bandwidth(listener: Listener) -> None:
    link = measure_link(3, "127.0.0.1", listener.port, "meeting", transfer=True)
    assert link.error == ""
    assert link.clock_behind_s == pytest.approx(7.0, abs=0.5)
    assert link.bytes_per_s and link.loopback
    assert measure_link(3, "127.0.0.1", listener.port, "meeting", transfer=False).bytes_per_s is None  # fmt: skip


def test_a_link_knows_whom_it_found(listener: Listener) -> None:
    def error(to: int, port: int, meeting: str = "meeting", host: str = "127.0.0.1") -> str:
        return measure_link(to, host, port, meeting, transfer=False).error

    assert "leads to another node, rank 3" in error(2, listener.port)
    assert "something else answers" in error(3, listener.port, "another meeting")
    assert "connection refused" in error(3, closed_port())
    assert "does not resolve" in error(3, 1, host="no-such-node.invalid")
    port = listener.port
    listener.close()
    assert "connection refused" in error(3, port)


def test_a_slow_link_is_measured_in_bounded_time(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_network, "TRANSFER_LIMIT_S", 0.5)
    discard = node_network._discard

    def slowly(connection: socket.socket, size: int) -> None:
        time.sleep(0.2)
        discard(connection, size)

    monkeypatch.setattr(node_network, "_discard", slowly)
    began = time.monotonic()
    link = measure_link(3, "127.0.0.1", listener.port, "meeting", transfer=True)
    assert link.bytes_per_s is not None
    assert 0.2 * node_network.PIECE_BYTES < link.bytes_per_s < node_network.PIECE_BYTES / 0.2
    assert time.monotonic() - began < 5


# --- nodes that meet -------------------------------------------------------------------------------


def place(rank: int, world: int, meeting: str = "m") -> NodePlace:
    names = tuple(f"n{number}" for number in range(world))
    return NodePlace(names[rank], rank, world, "127.0.0.1", names, meeting)


def meet(
    directory: Path,
    ranks: Sequence[int],
    world: int,
    *,
    needs: Callable[[int], Needs] | None = None,
    clock_offset_s: Callable[[int], float] = lambda rank: 0.0,
    limits: Limits = QUICK,
) -> Verdict:
    """The verdict of node 0 when the nodes `ranks` of `world` run, each in a thread."""
    needs = needs or (lambda rank: needs_for(directory))
    answers: dict[int, Any] = {}

    def node(rank: int) -> None:
        try:
            answers[rank] = run_preflight(
                directory,
                place(rank, world),
                needs(rank),
                "gloo",
                limits=limits,
                clock=lambda: time.time() + clock_offset_s(rank),
            )
        except InputError as error:
            answers[rank] = error

    threads = [threading.Thread(target=node, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[rank] is None for rank in ranks if rank), answers
    assert isinstance(answers[0], Findings), answers[0]
    return judge(answers[0], needs(0))


def failures(verdict: Verdict) -> list[tuple[str, str]]:
    """(node, check) of everything that failed."""
    return [(node.node, result.check) for node in verdict.nodes for result in node.failed]


def test_good_nodes_pass_at_once_and_old_files_are_passed_over(tmp_path: Path) -> None:
    old = NodeReport("yesterday", "n1", 1, "127.0.0.1", closed_port(), stage="measured")
    Meeting(tmp_path, place(1, 4, "yesterday")).write(old)
    Meeting(tmp_path, place(2, 4, "yesterday")).write(dataclasses.replace(old, node="gone"))
    (tmp_path / "torn.json").write_text('{"meeting": "m", "no')
    verdict = meet(tmp_path, range(4), 4, limits=Limits())
    assert failures(verdict) == []
    assert verdict.seconds < Limits().meeting_s
    assert [node.node for node in verdict.nodes] == ["n0", "n1", "n2", "n3"]
    checks = {result.check for node in verdict.nodes for result in node.results}
    assert {"run directory", "shared memory", "clock", "network"} <= checks


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    verdict = meet(tmp_path, [0, 1, 3], 4)
    assert failures(verdict) == [("n2", "report")]
    assert verdict.bad_nodes == ("n2",)
    assert "no report within 3 s" in verdict.node_problems()[0]


def test_a_node_that_hangs_in_its_checks_is_named(tmp_path: Path) -> None:
    stuck = Listener("m", 2)
    Meeting(tmp_path, place(2, 4)).write(NodeReport("m", "n2", 2, "127.0.0.1", stuck.port))
    verdict = meet(tmp_path, [0, 1, 3], 4)
    stuck.close()
    assert failures(verdict) == [("n2", "report")]
    assert "checks did not end within 4 s" in verdict.node_problems()[0]


def test_a_directory_that_is_not_shared(tmp_path: Path) -> None:
    # Alone with node 0's absence, a node says so; node 0 alone suspects the directory of all.
    with pytest.raises(InputError, match="n1 sees no file of node 0, n0"):
        run_preflight(tmp_path / "b", place(1, 4), needs_for(tmp_path), "gloo", limits=QUICK)
    verdict = meet(tmp_path / "a", [0], 4)
    assert verdict.bad_nodes == ()
    assert "no report" in verdict.common_problems()[0].found


def test_a_node_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    others = tuple(Link(to, bytes_per_s=1e9, loopback=True) for to in (0, 3))
    hidden = NodeReport("m", "n2", 2, "127.0.0.1", closed_port(), stage="measured", links=others)
    Meeting(tmp_path, place(2, 4)).write(hidden)
    verdict = meet(tmp_path, [0, 1, 3], 4)
    assert failures(verdict) == [("n2", "network")]
    assert "no connection from n1 to n2: 127.0.0.1:" in verdict.node_problems()[0]


@pytest.mark.parametrize("wrong", [0, 2])
def test_the_odd_clock_is_the_wrong_one(wrong: int, tmp_path: Path) -> None:
    def meet_with(offset_s: float) -> Verdict:
        return meet(
            tmp_path / str(offset_s),
            range(4),
            4,
            clock_offset_s=lambda rank: offset_s if rank == wrong else 0.0,
        )

    verdict = meet_with(-7.0)
    assert failures(verdict) == [(f"n{wrong}", "clock")]
    assert "7.0 s behind" in verdict.node_problems()[0]
    slightly = meet_with(2.0)
    assert failures(slightly) == []
    assert slightly.node_problems()[0].startswith(f"warning: n{wrong}: a clock 2.0 s ahead")


def test_encoder_servers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        up, down = f"127.0.0.1:{server.getsockname()[1]}", f"127.0.0.1:{closed_port()}"

        def verdict(name: str, **changes: Any) -> Verdict:
            needs = needs_for(tmp_path, uses_encoders=True, **changes)
            return meet(tmp_path / name, range(2), 2, needs=lambda rank: needs)

        # One that announced itself may be gone; one that is named must be there.
        assert failures(verdict("a", announced_encoders=(up, down))) == []
        named = verdict("b", named_encoders=(up, down))
        assert down in named.common_problems()[0].found and up not in named.common_problems()[0].found  # fmt: skip
        none = verdict("c")
        assert failures(none) == []
        assert "no encoder server has announced itself yet" in none.node_problems()[0]
        assert verdict("d", requires_encoders=True).common_checks == ("encoders",)


def test_a_node_that_misses_a_server_which_others_reach(tmp_path: Path) -> None:
    needs = needs_for(tmp_path, uses_encoders=True, announced_encoders=("e:1", "e:2"))
    reports = good_reports(4, encoders=(("e:1", ""), ("e:2", "no answer")))
    assert failures(judge(findings(reports, 4), needs)) == []
    reports[1] = changed(reports[1], encoders=(("e:1", "no answer"), ("e:2", "no answer")))
    assert failures(judge(findings(reports, 4), needs)) == [("n1", "encoders")]


def test_a_disk_that_hangs_or_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MEASURE_TIMEOUT_S", 0.5)
    ended = threading.Event()

    def hang(needs: Needs) -> list[Result]:
        ended.wait(20)
        return []

    monkeypatch.setattr(preflight, "place_results", hang)
    verdict = meet(tmp_path, [0], 1)
    ended.set()
    assert failures(verdict) == [("n0", "run directory")]
    assert "did not answer" in verdict.common_problems()[0].found

    def stale(path: Path) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shutil, "disk_usage", stale)
    assert "stale file handle" in checkpoint_room(tmp_path, 1).found


def test_the_same_failure_everywhere_is_a_setting(tmp_path: Path) -> None:
    huge = needs_for(tmp_path, checkpoint_bytes=2**60)
    verdict = meet(tmp_path / "a", range(3), 3, needs=lambda rank: huge)
    assert (verdict.common_checks, verdict.bad_nodes) == (("run directory",), ())
    assert "3 nodes" in verdict.common_problems()[0].found
    with pytest.raises(InputError, match="for the checkpoints to come"):
        command.conclude(verdict, tmp_path / "a")
    one = meet(
        tmp_path / "b", range(3), 3, needs=lambda rank: huge if rank == 1 else needs_for(tmp_path)
    )
    assert (one.common_checks, one.bad_nodes) == ((), ("n1",))


# --- who is blamed ---------------------------------------------------------------------------------


def findings(reports: dict[int, NodeReport], world: int) -> Findings:
    return Findings(place(0, world), Limits(), reports, 1.0)


def good_reports(world: int, **changes: Any) -> dict[int, NodeReport]:
    """Nodes with links of 10 GB/s in a ring."""

    def report(rank: int) -> NodeReport:
        following = (rank + 1) % world
        links = [Link(following, bytes_per_s=1e10)]
        if rank and following:
            links.append(Link(0))
        return NodeReport(
            "m", f"n{rank}", rank, "h", 1, stage="measured", links=tuple(links), **changes
        )

    return {rank: report(rank) for rank in range(world)}


def changed(report: NodeReport, **changes: Any) -> NodeReport:
    return dataclasses.replace(report, **changes)


def test_a_slow_link_is_its_senders_fault(tmp_path: Path) -> None:
    reports = good_reports(5)
    assert failures(judge(findings(reports, 5), needs_for(tmp_path))) == []
    slow = [dataclasses.replace(link, bytes_per_s=2.4e9) if link.bytes_per_s else link for link in reports[3].links]  # fmt: skip
    reports[3] = changed(reports[3], links=tuple(slow))
    verdict = judge(findings(reports, 5), needs_for(tmp_path))
    assert failures(verdict) == [("n3", "network")]
    assert "2.4 GB/s from n3 to n4" in verdict.node_problems()[0]
    # Within one machine there is no link to judge.
    local = tuple(dataclasses.replace(link, loopback=True) for link in slow)
    reports[3] = changed(reports[3], links=local)
    assert failures(judge(findings(reports, 5), needs_for(tmp_path))) == []


@pytest.mark.parametrize("dead", [0, 2])
def test_a_node_without_network_is_blamed_once(dead: int, tmp_path: Path) -> None:
    reports = {
        rank: changed(
            report,
            links=tuple(
                Link(link.to, "no answer") if dead in (rank, link.to) else link
                for link in report.links
            ),
        )
        for rank, report in good_reports(6).items()
    }
    verdict = judge(findings(reports, 6), needs_for(tmp_path))
    assert verdict.bad_nodes == (f"n{dead}",)


def test_a_firewall_between_all_nodes_is_a_setting(tmp_path: Path) -> None:
    reports = {
        rank: changed(report, links=tuple(Link(link.to, "no answer") for link in report.links))
        for rank, report in good_reports(6).items()
    }
    verdict = judge(findings(reports, 6), needs_for(tmp_path))
    assert verdict.common_checks == ("network",)
    assert "and 3 more nodes" in verdict.common_problems()[0].found


def test_gpus_of_other_kinds(tmp_path: Path) -> None:
    needs = needs_for(tmp_path, gpus=8)
    reports = good_reports(4, gpu_model="H100", driver="550.54")
    reports[1] = changed(reports[1], gpu_model="A100")
    reports[2] = changed(reports[2], driver="535.1")
    verdict = judge(findings(reports, 4), needs)
    assert failures(verdict) == [("n1", "GPU model")]
    assert any(line.startswith("warning: n2: driver 535.1") for line in verdict.node_problems())
    # One of each: nobody knows which is meant.
    pair = good_reports(2, gpu_model="H100", driver="550.54")
    pair[1] = changed(pair[1], gpu_model="A100")
    problem = judge(findings(pair, 2), needs).common_problems()[0]
    assert "n0: GPU model H100" in problem.found and "n1: GPU model A100" in problem.found


def test_who_spoils_an_all_reduce(tmp_path: Path) -> None:
    def blamed(outcomes: Sequence[Outcome | None], port: int | None = 1) -> Verdict:
        reports = good_reports(len(outcomes))
        for rank, outcome in enumerate(outcomes):
            reports[rank] = changed(reports[rank], all_reduce=outcome)
        reports[0] = changed(reports[0], store_port=port)
        return judge(findings(reports, len(outcomes)), needs_for(tmp_path))

    done, waits = Outcome("done", seconds=0.5), Outcome("arrived")
    good = blamed([done] * 4)
    assert good.bad_nodes == () and good.all_reduce_bytes_per_s == bus_bandwidth(0.5, 4)
    assert blamed([waits, waits, Outcome("loaded"), waits]).bad_nodes == ("n2",)
    assert blamed([waits, None, waits, waits]).bad_nodes == ("n1",)
    assert blamed([waits, waits, waits, Outcome("group", "NCCL: no device")]).bad_nodes == ("n3",)
    # Where node 0 cannot begin, the others are not asked.
    assert blamed([Outcome("start"), None, None, None], port=None).bad_nodes == ("n0",)
    hangs = blamed([waits] * 4)
    assert hangs.bad_nodes == () and "though all nodes arrived" in hangs.common_problems()[0].found


def test_bus_bandwidth_counts_as_nccl_tests_do() -> None:
    # Each of 2 nodes sends its half and receives the other's, twice half of 64 MiB.
    assert bus_bandwidth(1.0, 2) == 64 * 2**20
    assert bus_bandwidth(2.0, 8) == 64 * 2**20 * 7 / 8


def test_a_lone_nodes_hardware_is_the_nodes_fault(tmp_path: Path) -> None:
    def verdict(check: str) -> Verdict:
        report = NodeReport("m", "n0", 0, "h", 1, stage="measured", results=(Result(check, "failed", "x"),))  # fmt: skip
        return judge(findings({0: report}, 1), needs_for(tmp_path))

    assert verdict("GPU errors").bad_nodes == ("n0",)
    assert verdict("GPUs").common_checks == ("GPUs",)


# --- the all-reduce itself -------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
def test_all_reduce_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if these addresses led to other machines.
    monkeypatch.setattr(preflight, "is_loopback", lambda host: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    patient = Limits(meeting_s=20, measured_s=40, all_s=200, all_reduce_s=180)
    verdict = meet(tmp_path, range(3), 3, limits=patient)
    assert failures(verdict) == []
    assert verdict.all_reduce_bytes_per_s and verdict.all_reduce_bytes_per_s > 0


@pytest.mark.xdist_group("ranks")
def test_an_all_reduce_that_waits_in_vain_is_ended(tmp_path: Path) -> None:
    child = Child(tmp_path / "log")
    child.begin(Task("gloo", 0, 2, "127.0.0.1", 0, 200.0))
    assert child.port(180.0)
    assert child.outcome(0.5) == Outcome("arrived")
    began = time.monotonic()
    child.close()
    assert time.monotonic() - began < 5
    # One that dies says what of.
    broken = Child(tmp_path / "log")
    broken.begin(Task("gloo", 1, 2, "127.0.0.1", closed_port(), 1.0))
    outcome = broken.outcome(180.0)
    broken.close()
    assert outcome.stage == "loaded" and outcome.error


# --- the command -----------------------------------------------------------------------------------

RUN = {
    "name": "t",
    "data": {"shards": "package:emoji", "resolution": 32},
    "encoders": {"image": {"kind": "pixels", "patch": 8}, "text": {"kind": "bytes"}},
    "model": {"width": 32, "depth": 4, "heads": 2, "conditioning": {"kind": "cross_attention"}},
    "training": {"device": "cuda", "ema_decays": [0.9, 0.99]},
    "checkpoint": {"keep_last": 2},
}
START = (
    "import sys; sys.modules['torch'] = None\n"
    "from dsr_scale.cli import main, preflight\n"
    "main.app.command('check')(preflight.preflight)\nmain.run()"
)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | {"directory": str(tmp_path / "run")}))
    return path


def start(run_file: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The command in a process where importing torch fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, "-c", START, "check", str(run_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | variables,
    )


def step_variables(rank: int, directory: Path, attempt: Path, smi: Path) -> dict[str, str]:
    names = ["a1", "a2"]
    return {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "a[1-2]",
        "SLURMD_NODENAME": names[rank],
        "DSR_NODE_ADDRESSES": "a1=127.0.0.1 a2=127.0.0.2",
        "DSR_JOB": str(attempt),
        "PATH": f"{smi}{os.pathsep}{os.environ['PATH']}",
    }


def run_step(
    run_file: Path, tmp_path: Path, gpus: Sequence[int]
) -> tuple[list[int | None], str, str, Path]:
    """Two nodes with that many GPUs: their statuses, what node 0 said, and the attempt's directory."""
    attempt = tmp_path / "attempt"
    processes = []
    for rank, number in enumerate(gpus):
        smi = tmp_path / f"smi{rank}"
        smi.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            install_nvidia_smi(smi, patch, gpu_lines(number))
        variables = step_variables(rank, tmp_path, attempt, smi)
        processes.append(start(run_file, "--gpus-per-node", "8", **variables))
    said = [process.communicate(timeout=60) for process in processes]
    return [process.returncode for process in processes], *said[0], attempt


def test_two_good_nodes(run_file: Path, tmp_path: Path) -> None:
    statuses, output, errors, attempt = run_step(run_file, tmp_path, [8, 8])
    assert statuses == [0, 0], errors
    assert re.search(r"^preflight passed: 2 nodes in \d+ s$", output, re.MULTILINE)
    assert "8 × NVIDIA H100 80GB HBM3" in output
    assert (attempt / "preflight" / "bad_nodes").read_text() == ""


def test_a_node_with_a_gpu_too_few(run_file: Path, tmp_path: Path) -> None:
    statuses, output, errors, attempt = run_step(run_file, tmp_path, [8, 7])
    assert statuses == [BAD_NODES_STATUS, 0], errors
    assert "failed: a2: 7 GPUs; required: 8 GPUs" in output
    assert "preflight failed: bad nodes a2" in errors
    assert (attempt / "preflight" / "bad_nodes").read_text() == "a2\n"


def test_a_wrong_number_of_gpus(run_file: Path, tmp_path: Path) -> None:
    statuses, _, errors, attempt = run_step(run_file, tmp_path, [4, 4])
    assert statuses == [2, 0]
    assert errors.splitlines()[:2] == ["found: on 2 nodes: 4 GPUs", "required: 8 GPUs"]
    assert (attempt / "preflight" / "bad_nodes").read_text() == ""


def test_a_lone_machine_without_the_drivers_tools(run_file: Path, tmp_path: Path) -> None:
    process = start(run_file, "--gpus-per-node", "1", PATH=str(tmp_path))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no nvidia-smi on PATH" in errors and "training.device=cpu" in errors
    cpu = start(run_file, "training.device=cpu", "--gpus-per-node", "1", PATH=str(tmp_path))
    output, errors = cpu.communicate(timeout=60)
    assert cpu.returncode == 0, errors
    assert "preflight passed: 1 node in" in output


def test_a_node_that_cannot_write_names_itself(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "attempt").write_text("in the way")
    variables = step_variables(1, tmp_path, tmp_path / "attempt", tmp_path)
    process = start(run_file, "training.device=cpu", "--gpus-per-node", "8", **variables)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == BAD_NODES_STATUS
    assert errors.startswith("preflight on a2: ")


def test_room_for_checkpoints_is_what_training_asks_for(run_file: Path) -> None:
    from dsr_scale.config.derive import model_shape
    from dsr_scale.model.build import build_on_meta

    run = load_run(run_file)
    needs = command.needs_of(run, gpus_per_node=8, require_encoders=False, colocated=False)
    parameters = sum(p.numel() for p in build_on_meta(model_shape(run)).parameters())
    # Two are kept and one is being written; weights, two moments and two averages in fp32.
    assert needs.checkpoint_bytes == 3 * 5 * 4 * parameters


def test_several_settings_are_told_at_once(tmp_path: Path) -> None:
    results = (Result("GPUs", "failed", "4", "4 GPUs"), Result("shared memory", "failed", "0", "0 GiB"))  # fmt: skip
    report = NodeReport("m", "n0", 0, "h", 1, stage="measured", results=results)
    verdict = judge(findings({0: report}, 1), needs_for(tmp_path))
    with pytest.raises(ConfigError) as caught:
        command.conclude(verdict, tmp_path)
    assert [problem.found for problem in caught.value.problems] == ["on n0: 4 GPUs", "on n0: 0 GiB"]


def test_bad_nodes_end_with_their_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = good_reports(3)
    del reports[1]
    with pytest.raises(typer.Exit) as caught:
        command.conclude(judge(findings(reports, 3), needs_for(tmp_path)), tmp_path)
    assert caught.value.exit_code == BAD_NODES_STATUS
    assert (tmp_path / "bad_nodes").read_text() == "n1\n"
    row = next(line for line in capsys.readouterr().out.splitlines() if "│ n1" in line)
    assert "failed: no report" in row
