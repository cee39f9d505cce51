"""Checkpoints of one process: appear whole, are found, thinned out and refused; saves go on aside."""

from __future__ import annotations

import errno
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsr_scale.base.boxes import Box, Piece, pieces_of
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory, saver, tensors
from dsr_scale.checkpoint.directory import (
    complete_steps,
    find_checkpoint,
    partial_saves,
    remove_old,
    step_directory,
)
from dsr_scale.checkpoint.saver import CheckpointWriter

TENSORS = {"weights.a": torch.arange(6.0).reshape(2, 3), "ema.a": torch.ones(2, 3)}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def whole(content: Mapping[str, torch.Tensor]) -> list[Piece]:
    return [
        piece
        for name, tensor in content.items()
        for piece in pieces_of(name, tuple(tensor.shape), None, 0, tensor.view(-1))
    ]


def save(run: Path, step: int, content: Mapping[str, torch.Tensor] = TENSORS) -> Path:
    target = step_directory(run, step)
    writer = CheckpointWriter(None)
    writer.start(target, whole(content), {"step": step})
    writer.wait()
    return target


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    tensors.load(checkpoint, tensors.names_and_shapes(checkpoint), loaded.__setitem__)
    return loaded


def equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


class Gate:
    """Holds a save at its first file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        make_empty = saver._make_empty

        def held(partial: Path) -> None:
            self.reached.set()
            assert self._opened.wait(20)
            make_empty(partial)

        monkeypatch.setattr(saver, "_make_empty", held)

    def open(self) -> None:
        self._opened.set()


def test_round_trip(tmp_path: Path) -> None:
    scalar = {**TENSORS, "buffers.shift": torch.tensor(3.0)}
    target = save(tmp_path, 7, scalar)
    assert equal(read(target), scalar)
    state = directory.read_run_state(target)
    assert (state["step"], state["format"]) == (7, directory.FORMAT)
    assert state["files"].keys() == {".metadata", "__0_0.distcp"}
    assert tensors.names_and_shapes(target) == {name: t.shape for name, t in scalar.items()}


def test_reading_in_groups_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save(tmp_path, 1)
    monkeypatch.setattr(tensors, "READ_BYTES", 1)
    assert equal(read(target), TENSORS)


def test_a_saved_box_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"weights.a": torch.randn(8, 6), "weights.b": torch.randn(5)}
    target = save(tmp_path, 1, content)
    reads = []
    torch_load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: reads.append(1) or torch_load(*a, **k))
    flat = torch.zeros(30)
    pieces = list(pieces_of("weights.a", (8, 6), None, 9, flat))
    assert len(pieces) == 3
    tensors.load_pieces(target, pieces)
    assert torch.equal(flat, content["weights.a"].view(-1)[9:39])
    assert len(reads) == 1


def test_state_that_goes_on_does_not_change_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    live = {name: tensor.clone() for name, tensor in TENSORS.items()}
    run_state = {"step": 1, "counters": {"skipped": 0}}
    writer = CheckpointWriter(None)
    writer.start(step_directory(tmp_path, 1), whole(live), run_state)
    assert gate.reached.wait(20)
    for tensor in live.values():
        tensor.fill_(-1)
    run_state["counters"] = {"skipped": 9}
    assert not writer.poll()
    gate.open()
    writer.wait()
    assert equal(read(step_directory(tmp_path, 1)), TENSORS)
    assert directory.read_run_state(step_directory(tmp_path, 1))["counters"] == {"skipped": 0}


def test_later_saves_reuse_the_buffer_and_wait_for_the_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    writer = CheckpointWriter(None)
    committed: list[int] = []
    seconds = writer.start(
        step_directory(tmp_path, 1), whole(TENSORS), {"step": 1}, lambda: committed.append(1)
    )
    assert gate.reached.wait(20) and committed == []
    threading.Timer(0.3, gate.open).start()
    buffer = writer._buffer.data_ptr()
    twice = {name: 2 * tensor for name, tensor in TENSORS.items()}
    waited = writer.start(
        step_directory(tmp_path, 2),
        whole(twice),
        {"step": 2},
        lambda: committed.append(2),
    )
    assert seconds < 0.2 < waited
    writer.wait()
    assert committed == [1, 2]
    assert (writer._buffer.data_ptr(), writer._buffer.numel()) == (buffer, 12)
    assert equal(read(step_directory(tmp_path, 1)), TENSORS)
    assert equal(read(step_directory(tmp_path, 2)), twice)
    larger = {"weights.a": torch.arange(40.0)}
    writer.start(step_directory(tmp_path, 3), whole(larger), {"step": 3})
    writer.wait()
    assert writer._buffer.numel() == 40
    assert equal(read(step_directory(tmp_path, 3)), larger)


def test_failed_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(dcp.FileSystemWriter):
        def write_data(self, plan: object, planner: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "FileSystemWriter", Refusing)
        with pytest.raises(InputError, match=r"step_00000003 could not be written: .*No space"):
            save(tmp_path, 3)
        writer = CheckpointWriter(None)
        writer.start(kept, whole(TENSORS), {"step": 2})
        while writer._thread is not None and writer._thread.is_alive():
            writer.poll()
        assert writer.poll()
    with pytest.raises(InputError, match="could not be written"):
        writer.start(step_directory(tmp_path, 4), whole(TENSORS), {"step": 4})
    # Neither failure left anything behind or took the complete one away; and told once, it is over.
    assert list(directory.checkpoints_directory(tmp_path).iterdir()) == [kept]
    assert equal(read(kept), TENSORS)
    assert not writer.poll()
    writer.start(step_directory(tmp_path, 4), whole(TENSORS), {"step": 4})
    writer.wait()
    assert complete_steps(tmp_path) == [2, 4]


def test_any_error_in_the_background_reaches_the_loop(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "step_00000001")

    writer = CheckpointWriter(None)
    writer.start(step_directory(tmp_path, 1), whole(TENSORS), {"step": 1}, refuse)
    with pytest.raises(InputError, match="is complete, but old checkpoints could not be removed"):
        writer.wait()
    assert complete_steps(tmp_path) == [1]
    writer.start(step_directory(tmp_path, 2), whole(TENSORS), {"step": object()})
    with pytest.raises(InputError, match="not JSON serializable"):
        writer.wait()
    assert complete_steps(tmp_path) == [1] and partial_saves(tmp_path) == []


@pytest.mark.gpu
def test_pieces_on_a_gpu_are_saved_from_and_read_into_its_memory(tmp_path: Path) -> None:
    live = {name: tensor.to("cuda") for name, tensor in TENSORS.items()}
    writer = CheckpointWriter(None)
    writer.start(step_directory(tmp_path, 1), whole(live), {"step": 1})
    for tensor in live.values():
        tensor.fill_(-1)
    assert writer._buffer.is_pinned()
    writer.wait()
    assert equal(read(step_directory(tmp_path, 1)), TENSORS)
    tensors.load_pieces(step_directory(tmp_path, 1), whole(live))
    assert equal({name: tensor.cpu() for name, tensor in live.items()}, TENSORS)


@pytest.mark.parametrize(
    "boxes", [[Box((0, 0), (1, 3))], [Box((0, 0), (2, 3)), Box((1, 0), (1, 3))]]
)
def test_gaps_and_overlaps_are_not_written(tmp_path: Path, boxes: list[Box]) -> None:
    pieces = [Piece("weights.a", (2, 3), box, torch.zeros(box.numel)) for box in boxes]
    writer = CheckpointWriter(None)
    writer.start(step_directory(tmp_path, 1), pieces, {"step": 1})
    with pytest.raises(InputError, match=r"weights\.a"):
        writer.wait()
    assert complete_steps(tmp_path) == []


def test_really_full_disk(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        large = {"weights.a": torch.ones(1 << 18)}
        with pytest.raises(InputError, match=r"could not be written: .*o space left"):
            save(tmp_path, 1, large)
        assert complete_steps(tmp_path) == []
        assert partial_saves(tmp_path) == []
        save(tmp_path, 2)
        assert complete_steps(tmp_path) == [2]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match="could not be written"):
        save(tmp_path, 1)


def test_another_save_of_the_same_step_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = {"weights.a": torch.zeros(4)}
    assert equal(read(save(tmp_path, 1, other)), other)
    assert len(list(directory.checkpoints_directory(tmp_path).iterdir())) == 1


def test_newest_complete_wins(tmp_path: Path) -> None:
    for step in (10, 9):
        save(tmp_path, step)
    step_directory(tmp_path, 11).mkdir()
    (step_directory(tmp_path, 12).with_suffix(".partial")).mkdir()
    assert complete_steps(tmp_path) == [9, 10]
    assert find_checkpoint(tmp_path) == step_directory(tmp_path, 10)
    assert find_checkpoint(tmp_path, 9) == step_directory(tmp_path, 9)


def test_old_ones_go_but_for_the_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
    # A save cut off before its last rename, a removal cut off, and a checkpoint set aside.
    step_directory(tmp_path, 4).rename(step_directory(tmp_path, 4).with_suffix(".partial"))
    step_directory(tmp_path, 0).mkdir()
    aside = directory.set_aside(step_directory(tmp_path, 5))
    assert len(partial_saves(tmp_path)) == 2
    assert remove_old(tmp_path, keep_last=2, keep_every_steps=3) == [1, 2]
    assert complete_steps(tmp_path) == [3, 6, 7]
    assert aside.is_dir()
    assert len(list(directory.checkpoints_directory(tmp_path).iterdir())) == 4


def test_damaged_or_foreign_run_state_is_refused(tmp_path: Path) -> None:
    target = save(tmp_path, 1)
    (target / directory.RUN_STATE_FILE).write_text('{"format": 1}')
    with pytest.raises(InputError, match="format 1"):
        directory.read_run_state(target)
    (target / directory.RUN_STATE_FILE).write_text('{"form')
    with pytest.raises(directory.DamagedError, match="is damaged"):
        directory.read_run_state(target)


def test_damaged_tensors_are_one_error_that_names_the_remedy(tmp_path: Path) -> None:
    target = save(tmp_path, 1)
    shard = target / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(InputError, match=r"could not be read(.|\n)*checkpoint verify"):
        tensors.load(target, SHAPES, lambda name, tensor: None)
    (target / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="could not be read"):
        tensors.names_and_shapes(target)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"weights.a": torch.Size([2, 3]), "weights.b": torch.Size([1])}, "weights.b is missing"),
        ({"weights.a": torch.Size([3, 2])}, r"weights\.a is \(2, 3\), not \(3, 2\)"),
        ({"ema.b": torch.Size([2, 3])}, r"ema\.a belongs to no parameter"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, wanted: dict[str, torch.Size], named: str
) -> None:
    target = save(tmp_path, 1)
    with pytest.raises(InputError, match=named):
        tensors.load(target, wanted, lambda name, tensor: pytest.fail("nothing may be handed out"))
    pieces = whole({name: torch.zeros(shape) for name, shape in wanted.items()})
    with pytest.raises(InputError, match=named if "belongs" not in named else "ema.b is missing"):
        tensors.load_pieces(target, pieces)
