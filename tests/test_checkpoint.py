"""Checkpoints appear whole, are found, thinned out and refused."""

from __future__ import annotations

import errno
import subprocess
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
    assert directory.read_run_state(target) == {"step": 7, "format": directory.FORMAT}
    assert tensors.names_and_shapes(target) == SHAPES


def test_reading_in_groups_changes_nothing(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save(tmp_path, 1, group)
    monkeypatch.setattr(tensors, "READ_BYTES", 1)
    loaded: dict[str, torch.Tensor] = {}
    tensors.load(target, SHAPES, loaded.__setitem__)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_failed_write_leaves_no_checkpoint(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(dcp.FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = save(tmp_path, 2, group)
    monkeypatch.setattr(dcp, "FileSystemWriter", Refusing)
    with pytest.raises(InputError, match=r"step_00000003 could not be written: .*No space left"):
        save(tmp_path, 3, group)
    with pytest.raises(InputError, match="could not be written"):
        save(tmp_path, 2, group)
    # Neither failure left anything behind or took the complete one away.
    assert list(directory.checkpoints_directory(tmp_path).iterdir()) == [kept]
    tensors.load(kept, SHAPES, lambda name, tensor: None)


def test_really_full_disk(tmp_path: Path, group: dist.ProcessGroup) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        target = step_directory(tmp_path, 1)
        large = {"weights.a": torch.ones(1 << 18)}
        with pytest.raises(InputError, match="could not be written: no space left"):
            tensors.save(target, large.items(), {"step": 1}, group=group)
        assert complete_steps(tmp_path) == []
        assert partial_saves(tmp_path) == []
        save(tmp_path, 2, group)
        assert complete_steps(tmp_path) == [2]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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
    # A save and a removal that were cut off.
    step_directory(tmp_path, 4).with_suffix(".partial").mkdir()
    step_directory(tmp_path, 0).mkdir()
    assert remove_old(tmp_path, keep_last=2, keep_every_steps=3) == [1, 2, 4, 5]
    assert complete_steps(tmp_path) == [3, 6, 7]
    assert len(list(directory.checkpoints_directory(tmp_path).iterdir())) == 3


def test_damaged_or_foreign_run_state_is_refused(tmp_path: Path, group: dist.ProcessGroup) -> None:
    target = save(tmp_path, 1, group)
    (target / directory.RUN_STATE_FILE).write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0"):
        directory.read_run_state(target)
    (target / directory.RUN_STATE_FILE).write_text('{"form')
    with pytest.raises(InputError, match="is damaged"):
        directory.read_run_state(target)


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
