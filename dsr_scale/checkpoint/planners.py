"""Pieces of global tensors as torch.distributed.checkpoint (DCP) wants to be told of them.

DCP's default planners ask a state dict of tensors, DTensors or ShardedTensors. A ZeRO fragment is
none of these, so the planners here speak of boxes: every rank announces the boxes it holds, and a
reader finds which saved boxes overlap the ones it wants, whatever layout wrote them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsr_scale.base.boxes import Box, Piece


class PiecesSavePlanner(DefaultSavePlanner):
    """Writes the pieces of this rank; all ranks' together must cover every tensor exactly once."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {(piece.name, piece.box.offsets): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        """One item for each piece."""
        properties = TensorProperties(dtype=torch.float32)
        items = [
            WriteItem(
                index=MetadataIndex(piece.name, piece.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece.box),
                    properties=properties,
                    size=torch.Size(piece.shape),
                ),
            )
            for piece in self._pieces.values()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """All ranks' items; raises ValueError when they leave a gap, which DCP lets one rank do."""
        plans, metadata = super().create_global_plan(all_plans)
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):
                raise ValueError(f"the ranks hold {held} elements of {name} {tuple(entry.size)}")
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of an item, in its box's shape."""
        offset = write_item.index.offset
        assert offset is not None
        piece = self._pieces[write_item.index.fqn, tuple(offset)]
        return piece.tensor.view(piece.box.sizes)


class PiecesLoadPlanner(LoadPlanner):
    """Fills pieces in place, reading what overlaps them and nothing else."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.name, []).append(piece)
        self._metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Takes the checkpoint's metadata."""
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """One item for each overlap; raises ValueError when a piece would stay partly unfilled."""
        assert self._metadata is not None
        items: list[ReadItem] = []
        for name, pieces in self._pieces.items():
            entry = self._metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(
                name, entry, [_chunk(piece.box) for piece in pieces]
            )
            wanted = sum(piece.box.numel for piece in pieces)
            overlap = sum(math.prod(item.lengths) for item in found)
            if overlap != wanted:
                raise ValueError(f"{overlap} of {wanted} wanted elements of {name} are saved")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: checkpoints hold tensors only."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a piece that an item fills."""
        index = read_item.dest_index
        assert index.index is not None
        piece = self._pieces[index.fqn][index.index]
        whole = piece.tensor.view(piece.box.sizes)
        return part_of(whole, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the tensor is a view of the piece."""


def part_of(tensor: torch.Tensor, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    """A view of the box at `offsets` of size `lengths`."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
