"""Checkpoints appear whole, are found, thinned out and refused."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory, tensors
from dsr_scale.checkpoint.directory import (
    complete_steps,
    find_checkpoint,
    partial_saves,
    remove_old,
    step_directory,
)

TENSORS = {"weights.a": torch.arange(6.0).reshape(2, 3), "ema.a": torch.ones(2, 3)}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield world
    dist.destroy_process_group()


def save(run: Path, step: int, group: dist.ProcessGroup) -> Path:
    target = step_directory(run, step)
    tensors.save(target, TENSORS.items(), {"step": step}, group=group)
    return target


def test_round_trip(tmp_path: Path, group: dist.ProcessGroup) -> None:
    target = save(tmp_path, 7, group)
    loaded: dict[str, torch.Tensor] = {}
    tensors.load(target, SHAPES, loaded.__setitem__)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert directory.read_run_state(target) == {"step": 7}
    assert tensors.names_and_shapes(target) == SHAPES


def test_reading_in_groups_changes_nothing(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save(tmp_path, 1, group)
    monkeypatch.setattr(tensors, "READ_BYTES", 1)
    loaded: dict[str, torch.Tensor] = {}
    tensors.load(target, SHAPES, loaded.__setitem__)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_full_disk_leaves_no_checkpoint(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(dcp.FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp, "FileSystemWriter", FullDisk)
    with pytest.raises(InputError, match="no space left while writing"):
        save(tmp_path, 3, group)
    assert complete_steps(tmp_path) == []
    assert [path.name for path in partial_saves(tmp_path)] == ["step_00000003.partial"]


def test_newest_complete_wins(tmp_path: Path, group: dist.ProcessGroup) -> None:
    for step in (10, 9):
        save(tmp_path, step, group)
    step_directory(tmp_path, 11).mkdir()
    (step_directory(tmp_path, 12).with_suffix(".partial")).mkdir()
    assert complete_steps(tmp_path) == [9, 10]
    assert find_checkpoint(tmp_path) == step_directory(tmp_path, 10)
    assert find_checkpoint(tmp_path, 9) == step_directory(tmp_path, 9)


def test_old_ones_go_but_for_the_kept(tmp_path: Path, group: dist.ProcessGroup) -> None:
    for step in range(1, 8):
        save(tmp_path, step, group)
    assert remove_old(tmp_path, keep_last=2, keep_every_steps=3) == [1, 2, 4, 5]
    assert complete_steps(tmp_path) == [3, 6, 7]


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"weights.a": torch.Size([2, 3]), "weights.b": torch.Size([1])}, "weights.b is missing"),
        ({"weights.a": torch.Size([3, 2])}, r"weights\.a is \(2, 3\), not \(3, 2\)"),
        ({"ema.b": torch.Size([2, 3])}, r"ema\.a belongs to no parameter"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, group: dist.ProcessGroup, wanted: dict[str, torch.Size], named: str
) -> None:
    target = save(tmp_path, 1, group)
    with pytest.raises(InputError, match=named):
        tensors.load(target, wanted, lambda name, tensor: pytest.fail("nothing may be handed out"))
