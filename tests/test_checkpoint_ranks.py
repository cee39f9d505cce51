"""Checkpoints of several ranks: written by any layout, read by any other; failures told to all.

Ranks are processes with gloo. Their layout is an imitation of training under tensor, pipeline and
data parallelism: each rank owns a flat range of the tensors of its stage and its tensor shard.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_checkpoint import equal, read
from test_checkpoint_verify import flip

from dsr_scale.base.boxes import Piece, Split, pieces_of
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import tensors
from dsr_scale.checkpoint.directory import (
    checkpoints_directory,
    complete_steps,
    partial_saves,
    remove_old,
    step_directory,
)
from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.checkpoint.verification import newest_verified, verify

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed.checkpoint", "dsr_scale.checkpoint.saver"])

# Shape, then dimension and parts of the tensor-parallel cut, None where replicated.
STAGES: list[dict[str, tuple[tuple[int, ...], tuple[int, int] | None]]] = [
    {"embed": ((7, 6), None), "a.qkv": ((24, 5), (0, 3)), "a.norm": ((9,), None)},
    {"a.out": ((5, 8), (1, 1)), "b.glu": ((16, 3), (0, 2)), "scale": ((), None)},
]
KINDS = ("weights", "exp_avg", "ema")


class Layout(NamedTuple):
    """Numbers of ranks; the rank counts tensor shards fastest, then stages."""

    tp: int
    pp: int
    dp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


LAYOUTS = [Layout(1, 1, 1), Layout(2, 2, 1), Layout(1, 1, 3), Layout(4, 1, 1), Layout(2, 1, 2)]


def state(step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the model as one device would have it after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    return {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in KINDS
        for stage in STAGES
        for name, (shape, _) in stage.items()
    }


def owned(layout: Layout, rank: int, whole: dict[str, torch.Tensor]) -> Iterator[Piece]:
    """What `rank` of `layout` holds, cut like ZeRO cuts: an equal flat range for each rank."""
    tp, pp = rank % layout.tp, rank // layout.tp % layout.pp
    dp = rank // (layout.tp * layout.pp)
    for stage in [STAGES[pp]] if layout.pp == 2 else [{**STAGES[0], **STAGES[1]}]:
        splits = {
            name: Split(*cut, tp, layout.tp) if cut and layout.tp > 1 else None
            for name, (_, cut) in stage.items()
        }
        for kind in KINDS:
            local = {
                name: split.take(whole[f"{kind}.{name}"]) if split else whole[f"{kind}.{name}"]
                for name, split in splits.items()
            }
            share = -(-sum(tensor.numel() for tensor in local.values()) // layout.dp)
            begin = 0
            for name, tensor in local.items():
                start = min(max(dp * share - begin, 0), tensor.numel())
                stop = min(max((dp + 1) * share - begin, 0), tensor.numel())
                begin += tensor.numel()
                if splits[name] is None and tp > 0:
                    continue
                flat = tensor.reshape(-1)[start:stop].clone()
                yield from pieces_of(
                    f"{kind}.{name}", tuple(tensor.shape), splits[name], start, flat
                )


def run_ranks(folder: Path, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls `function(rank, group, *arguments)` on `count` ranks; their results in rank order."""
    store = folder / f"store-{time.monotonic_ns()}"
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(count)]
    processes = [
        PROCESSES.Process(
            target=_rank_main, args=(rank, count, store, pipes[rank][1], function, arguments)
        )
        for rank in range(count)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    results: list[Any] = []
    for receiver, _ in pipes:
        try:
            results.append(receiver.recv() if receiver.poll(60) else "no answer")
        except EOFError:
            results.append("died")
    for process in processes:
        process.join(20)
        assert process.exitcode is not None, "a rank hangs"
    return results


def _rank_main(
    rank: int, count: int, store: Path, sender: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), count), rank=rank, world_size=count
    )
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    sender.send(function(rank, group, *arguments))
    dist.destroy_process_group()


def outcome(action: Callable[[], object]) -> str | None:
    """What an InputError of `action` found."""
    try:
        action()
    except InputError as error:
        return error.found
    except RuntimeError as error:
        return str(error)
    return None


def save_on_rank(
    rank: int, group: dist.ProcessGroup, run: Path, step: int, layout: Layout
) -> str | None:
    writer = CheckpointWriter(group)
    writer.start(
        step_directory(run, step), owned(layout, rank, state(step)), {"step": step}, lambda: None
    )
    return outcome(writer.wait)


def read_on_rank(
    rank: int, group: dist.ProcessGroup, run: Path, layout: Layout
) -> tuple[bool, list[str]]:
    """Loads the newest into a rank's own pieces; whether they are equal, and what was reported."""
    said: list[str] = []
    found = newest_verified(run, group, said.append)
    assert found is not None
    checkpoint, run_state = found
    pieces = list(owned(layout, rank, {name: -torch.ones_like(t) for name, t in state(0).items()}))
    tensors.load_pieces(checkpoint, pieces)
    expected = owned(layout, rank, state(run_state["step"]))
    same = [torch.equal(a.tensor, b.tensor) for a, b in zip(pieces, expected, strict=True)]
    return bool(same) and all(same), said


@pytest.mark.parametrize("writers", LAYOUTS, ids=str)
def test_any_layout_reads_what_any_other_wrote(tmp_path: Path, writers: Layout) -> None:
    assert (
        run_ranks(tmp_path, writers.ranks, save_on_rank, tmp_path, 5, writers)
        == [None] * writers.ranks
    )
    checkpoint = step_directory(tmp_path, 5)
    assert verify(checkpoint) == []
    assert equal(read(checkpoint), state(5))
    shards = {f"__{rank}_0.distcp" for rank in range(writers.ranks)}
    assert {path.name for path in checkpoint.iterdir()} == {
        *shards,
        ".metadata",
        "run_state.json",
    }
    # No rank needs the others to read its own, so all layouts are read here, rank after rank.
    for readers in LAYOUTS:
        for rank in range(readers.ranks):
            pieces = list(owned(readers, rank, {n: t * 0 for n, t in state(5).items()}))
            tensors.load_pieces(checkpoint, pieces)
            for found, expected in zip(pieces, owned(readers, rank, state(5)), strict=True):
                assert found[:3] == expected[:3]
                assert torch.equal(found.tensor, expected.tensor), (readers, rank, found.name)


def test_ranks_find_the_newest_undamaged_together(tmp_path: Path) -> None:
    layout = Layout(2, 1, 1)
    for step in (1, 2, 3):
        run_ranks(tmp_path, 2, save_on_rank, tmp_path, step, layout)
    flip(step_directory(tmp_path, 3) / "__1_0.distcp", 1200)
    flip(step_directory(tmp_path, 2) / "run_state.json", 30)
    (first_equal, said), *others = run_ranks(tmp_path, 3, read_on_rank, tmp_path, Layout(1, 1, 3))
    assert first_equal and others == [(True, []), (True, [])]
    assert len(said) == 2
    assert "__1_0.distcp has a wrong checksum" in said[0] and "run_state.json" in said[1]
    assert complete_steps(tmp_path) == [1]


def fail_on_second(rank: int, group: dist.ProcessGroup, run: Path) -> list[Any]:
    class Refusing(dcp.FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

    layout = Layout(2, 1, 1)
    intact = dcp.FileSystemWriter
    writer = CheckpointWriter(group)
    if rank == 1:
        dcp.FileSystemWriter = Refusing  # pyright: ignore[reportAttributeAccessIssue]
    writer.start(step_directory(run, 2), owned(layout, rank, state(2)), {"step": 2})
    while not writer.poll():
        time.sleep(0.01)
    failure = outcome(lambda: writer.start(step_directory(run, 3), [], {}))
    dcp.FileSystemWriter = intact
    # The same writer goes on once the cause is gone.
    writer.start(step_directory(run, 3), owned(layout, rank, state(3)), {"step": 3})
    return [failure, outcome(writer.wait)]


def test_failure_of_one_rank_is_told_to_both(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, fail_on_second, tmp_path)
    assert first == second
    assert "step_00000002 could not be written" in first[0]
    assert "Input/output error" in first[0] and first[1] is None
    assert complete_steps(tmp_path) == [3] and partial_saves(tmp_path) == []


def test_full_disk_is_told_to_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        found = run_ranks(tmp_path, 4, save_on_rank, disk, 1, Layout(2, 2, 1))
        assert "could not be written" in found[0] and "space left" in found[0]
        assert found == [found[0]] * 4
        assert list(checkpoints_directory(disk).iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def die_on_second(rank: int, group: dist.ProcessGroup, run: Path) -> str | None:
    class Dying(dcp.FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        dcp.FileSystemWriter = Dying  # pyright: ignore[reportAttributeAccessIssue]
    return save_on_rank(rank, group, run, 2, Layout(2, 1, 1))


def test_a_rank_that_dies_leaves_no_checkpoint_and_no_waiting(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 2, die_on_second, tmp_path)
    assert "could not be written" in found[0] and found[1] == "died"
    assert complete_steps(tmp_path) == []


def save_for_ever(run: Path, first_step: int, sender: Any) -> None:
    """Saves step after step, keeping two; says so when it has begun."""
    torch.set_num_threads(1)
    writer = CheckpointWriter(None)
    for step in range(first_step, 1_000_000):
        writer.start(
            step_directory(run, step),
            owned(Layout(1, 1, 1), 0, state(step)),
            {"step": step},
            lambda: remove_old(run, keep_last=2, keep_every_steps=None),
        )
        if step == first_step:
            sender.send("begun")


def test_killed_at_any_point_the_newest_is_whole(tmp_path: Path) -> None:
    chooser = random.Random(0)
    step = cut_off = 0
    for _ in range(16):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=save_for_ever, args=(tmp_path, step + 1, sender))
        process.start()
        assert receiver.recv() == "begun"
        time.sleep(chooser.uniform(0, 0.1))
        process.kill()
        process.join()
        cut_off += bool(partial_saves(tmp_path))
        found = newest_verified(tmp_path, None, lambda said: None)
        if found is None:
            continue
        checkpoint, run_state = found
        # Nothing that was complete is lost, and nothing is damaged.
        assert run_state["step"] >= step
        step = run_state["step"]
        assert checkpoint == step_directory(tmp_path, step)
        assert equal(read(checkpoint), state(step))
        for complete in complete_steps(tmp_path):
            assert verify(step_directory(tmp_path, complete)) == []
    assert step > 3
    assert cut_off >= 4, "the kills missed the saves"
    assert not list(checkpoints_directory(tmp_path).glob("*.damaged"))
