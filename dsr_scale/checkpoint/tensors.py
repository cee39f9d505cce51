"""Reading tensors of a checkpoint by global name, through torch.distributed.checkpoint (DCP).

Whatever layout saved it, a rank, or one process without a process group, reads the boxes it wants:
`load_pieces` into the fragments a training rank owns, `load` whole tensors for export. Each saved
box is read once and copied to all places that want a part of it, so host memory beside the target
is one saved box, and a rank reads little more than what it keeps.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dsr_scale.base.boxes import Box, Piece
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.agreement import described
from dsr_scale.checkpoint.planners import PiecesLoadPlanner, part_of

READ_BYTES = 1 << 30
"""Whole tensors are read in groups of about this size, which bounds host memory during an export."""


def names_and_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """What a checkpoint holds, from its metadata alone."""
    with _damage_reported(checkpoint):
        return _held(_Reader(checkpoint))


def load(
    checkpoint: Path,
    wanted: Mapping[str, torch.Size],
    receive: Callable[[str, torch.Tensor], object],
) -> None:
    """Reads the `wanted` tensors whole, in fp32, and hands each to `receive`.

    Needs no process group; every caller reads for itself. Raises InputError when the checkpoint is
    of another model or damaged.
    """
    check_fits(checkpoint, wanted)
    reader = _Reader(checkpoint)
    for names in _groups(wanted):
        tensors = {name: torch.empty(wanted[name], dtype=torch.float32) for name in names}
        pieces = [
            Piece(name, tuple(tensor.shape), Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)
            for name, tensor in tensors.items()
        ]
        _fill(reader, pieces, checkpoint)
        del pieces
        for name in names:
            receive(name, tensors.pop(name))


def load_pieces(checkpoint: Path, pieces: Iterable[Piece]) -> None:
    """Fills the tensor of every piece in place, on whatever device it is.

    No collective: each rank reads its own boxes. Raises InputError when a tensor is missing, has
    another shape, or a file is damaged. That the checkpoint holds nothing beside the whole model
    is for `check_fits`, which no single pipeline stage could tell.
    """
    pieces = list(pieces)
    reader = _Reader(checkpoint)
    with _damage_reported(checkpoint):
        held = _held(reader)
    wanted = {piece.name: torch.Size(piece.shape) for piece in pieces}
    _refuse_if_any(checkpoint, _misfits(held, wanted))
    _fill(reader, pieces, checkpoint)


def check_fits(checkpoint: Path, wanted: Mapping[str, torch.Size]) -> None:
    """Raises InputError unless the checkpoint holds every wanted name in the wanted shape.

    Of the kinds wanted (`weights`, `ema`, …) it must hold no other name.
    """
    held = names_and_shapes(checkpoint)
    kinds = {name.partition(".")[0] for name in wanted}
    foreign = [
        f"{name} belongs to no parameter of this model"
        for name in held
        if name.partition(".")[0] in kinds and name not in wanted
    ]
    _refuse_if_any(checkpoint, _misfits(held, wanted) + foreign)


def _misfits(held: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    problems = [f"{name} is missing" for name in wanted if name not in held]
    problems += [
        f"{name} is {tuple(held[name])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in held and tuple(held[name]) != tuple(shape)
    ]
    return problems


def _refuse_if_any(checkpoint: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    shown = "; ".join(problems[:5])
    if len(problems) > 5:
        shown += f"; and {len(problems) - 5} more"
    raise InputError(
        found=f"checkpoint {checkpoint} of another model: {shown}",
        required="the tensors of the model in the config",
        remedy="use the config the run was started with (config.yaml in its directory), "
        "or another run directory",
    )


class _Reader(dcp.FileSystemReader):
    """DCP's reader, which would read a saved box again for every place that wants a part of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        by_file: dict[str, list[MetadataIndex]] = {}
        for index in sorted(wanted, key=lambda index: self.storage_data[index].offset):
            by_file.setdefault(self.storage_data[index].relative_path, []).append(index)
        for name, indices in by_file.items():
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                for index in indices:
                    content = self._slice_file(stream, self.storage_data[index])
                    saved = torch.load(content, map_location="cpu", weights_only=True)
                    for item in wanted[index]:
                        part = part_of(saved, item.storage_offsets, item.lengths)
                        planner.resolve_tensor(item).detach().copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _held(reader: _Reader) -> dict[str, torch.Size]:
    return {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }


def _fill(reader: _Reader, pieces: Iterable[Piece], checkpoint: Path) -> None:
    with _damage_reported(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = PiecesLoadPlanner(pieces)
        dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)


@contextlib.contextmanager
def _damage_reported(checkpoint: Path) -> Iterator[None]:
    """Whatever a damaged file makes pickle, zip and DCP raise becomes one error."""
    try:
        yield
    # DCP's own exception is no Exception.
    except (Exception, dcp.CheckpointException) as error:
        raise InputError(
            found=f"checkpoint {checkpoint} could not be read: {described(error)}",
            required="every file as it was saved",
            remedy=f"see which file is damaged: dsr-scale checkpoint verify {checkpoint}",
        ) from error


def _groups(wanted: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    group: list[str] = []
    group_bytes = 0
    for name, shape in wanted.items():
        tensor_bytes = 4 * math.prod(shape)
        if group and group_bytes + tensor_bytes > READ_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += tensor_bytes
    if group:
        yield group
