"""Which part of a global tensor a rank holds, in integers only.

Under ZeRO a rank holds flat ranges of tensors that tensor parallelism has already cut. A checkpoint
knows neither: it holds boxes, an offset and a size in every dimension, of the tensors as one device
would have them. A flat range of a matrix is at most three boxes:

    . . . x x      the end of a row
    x x x x x      whole rows
    x x . . .      the start of a row

Every box made here is also contiguous in the flat range, so that saving and loading copy views and
gather nothing. The price is more and smaller boxes, one a row, where a range of a tensor made of
several parts (fused q, k, v) is cut along another dimension than the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Box(NamedTuple):
    """An axis-aligned part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside."""
        return math.prod(self.sizes)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The fewest boxes, in row-major order, that make up elements [start, stop) of `shape`."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        return _in_row(shape, first, head, tail)
    boxes = []
    if head:
        boxes += _in_row(shape, first, head, inner)
        first += 1
    if first < last:
        rest = tuple(shape[1:])
        boxes.append(Box((first, *(0 for _ in rest)), (last - first, *rest)))
    return boxes + _in_row(shape, last, 0, tail)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [
        Box((row, *inner.offsets), (1, *inner.sizes))
        for inner in boxes_of_range(shape[1:], start, stop)
    ]


class Split(NamedTuple):
    """How tensor parallelism cuts a tensor along one dimension.

    The dimension consists of `parts` groups of equal size (three in a fused q, k, v, two in the
    halves of SwiGLU), and `rank` of `ranks` holds its slice of each:

        global  q0 q1 | k0 k1 | v0 v1        rank 1 of 2 holds  q1 | k1 | v1
    """

    dim: int
    parts: int
    rank: int
    ranks: int

    def global_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole of which `local_shape` is one rank's shard."""
        return self._with_size(local_shape, local_shape[self.dim] * self.ranks)

    def local_shape(self, global_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one rank's shard."""
        size = global_shape[self.dim]
        assert size % (self.parts * self.ranks) == 0, f"{self} does not divide {global_shape}"
        return self._with_size(global_shape, size // self.ranks)

    def to_global(self, local_shape: tuple[int, ...], box: Box) -> list[tuple[Box, Box]]:
        """Pairs of a part of the local `box` and the box of the whole where it lies."""
        size = local_shape[self.dim] // self.parts
        start = box.offsets[self.dim]
        stop = start + box.sizes[self.dim]
        pairs = []
        for part in range(start // size, -(-stop // size)):
            begin, end = max(start, part * size), min(stop, (part + 1) * size)
            sizes = self._with_size(box.sizes, end - begin)
            shifted = begin + (part * (self.ranks - 1) + self.rank) * size
            pairs.append(
                (
                    Box(self._with_size(box.offsets, begin), sizes),
                    Box(self._with_size(box.offsets, shifted), sizes),
                )
            )
        return pairs

    def take(self, tensor: Any) -> Any:
        """This rank's shard of a whole tensor."""
        shape = tuple(tensor.shape)
        local = self.local_shape(shape)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        size = local[self.dim] // self.parts
        grouped = tensor.reshape(*before, self.parts, self.ranks, size, *after)
        return grouped.narrow(self.dim + 1, self.rank, 1).reshape(local)

    def _with_size(self, sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
        return (*sizes[: self.dim], size, *sizes[self.dim + 1 :])


class Piece(NamedTuple):
    """A box of a global tensor and the live values in it."""

    name: str
    """`kind.parameter`, such as `weights.blocks.0.attn.qkv.weight`."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    box: Box
    tensor: Any
    """fp32, flat or in the box's shape, its elements in row-major order; writing to it changes the
    state it belongs to."""


def pieces_of(
    name: str, local_shape: tuple[int, ...], split: Split | None, start: int, flat: Any
) -> Iterator[Piece]:
    """The pieces in `flat`, which holds elements [start, start + len(flat)) of a local tensor.

    Their tensors are contiguous views of `flat`. Without `split` the local tensor is the whole.
    """
    local_shape = tuple(local_shape)
    shape = local_shape if split is None else split.global_shape(local_shape)
    for box in boxes_of_range(local_shape, start, start + flat.shape[0]):
        for run in _runs(local_shape, box, split):
            offset = _flat_index(local_shape, run.offsets) - start
            whole = run if split is None else split.to_global(local_shape, run)[0][1]
            yield Piece(name, shape, whole, flat.narrow(0, offset, run.numel))


def _runs(shape: tuple[int, ...], box: Box, split: Split | None) -> Iterator[Box]:
    """The parts of `box` that stay within one group of `split` and are contiguous in `shape`."""
    if split is None:
        yield box
        return
    for part, _ in split.to_global(shape, box):
        # Contiguous: whole in the inner dimensions, partial in one, a single index before it.
        whole_from = len(shape)
        while whole_from > 0 and part.sizes[whole_from - 1] == shape[whole_from - 1]:
            whole_from -= 1
        lead = max(whole_from - 1, 0)
        rows = (
            range(offset, offset + size)
            for offset, size in zip(part.offsets[:lead], part.sizes[:lead], strict=True)
        )
        for index in itertools.product(*rows):
            yield Box((*index, *part.offsets[lead:]), (*(1 for _ in index), *part.sizes[lead:]))


def _flat_index(shape: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    index = 0
    for size, offset in zip(shape, offsets, strict=True):
        index = index * size + offset
    return index
