"""Boxes, splits and pieces against scattering and reassembling real tensors element by element."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dsr_scale.base.boxes import Box, Piece, Split, boxes_of_range, pieces_of


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def counted(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize("shape", [(), (7,), (1, 5), (5, 1), (3, 4), (2, 3, 4), (2, 1, 2, 3)])
def test_boxes_of_every_range_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = counted(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        boxes = boxes_of_range(shape, start, stop)
        found = [value for box in boxes for value in whole[region(box)].reshape(-1).tolist()]
        assert found == list(range(start, stop))
        assert [box.numel for box in boxes] == [whole[region(box)].numel() for box in boxes]
        assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_fewest_boxes() -> None:
    assert boxes_of_range((4, 5), 3, 17) == [
        Box((0, 3), (1, 2)),
        Box((1, 0), (2, 5)),
        Box((3, 0), (1, 2)),
    ]
    assert boxes_of_range((4, 5), 5, 15) == [Box((1, 0), (2, 5))]
    assert boxes_of_range((4, 5), 6, 8) == [Box((1, 1), (1, 2))]
    assert boxes_of_range((0, 5), 0, 0) == []


def test_split_takes_its_slice_of_every_part() -> None:
    fused = torch.cat([torch.full((4, 2), float(part)) for part in range(3)])
    fused = fused + torch.arange(4.0).repeat(3)[:, None] / 10
    split = Split(dim=0, parts=3, rank=1, ranks=2)
    expected = torch.cat([part[2:] for part in fused.chunk(3)])
    assert torch.equal(split.take(fused), expected)
    assert split.local_shape((12, 2)) == (6, 2)
    assert split.global_shape((6, 2)) == (12, 2)


@pytest.mark.parametrize(
    ("shape", "dim", "parts"),
    [
        ((12,), 0, 1),
        ((12,), 0, 3),
        ((8, 3), 0, 2),
        ((3, 8), 1, 1),
        ((3, 8), 1, 2),
        ((2, 12, 3), 1, 3),
        ((2, 2, 8), 2, 2),
    ],
)
def test_to_global_names_where_local_elements_lie(
    shape: tuple[int, ...], dim: int, parts: int
) -> None:
    whole = counted(shape)
    for rank in range(2):
        split = Split(dim, parts, rank, 2)
        local = split.take(whole)
        for start, stop in itertools.combinations(range(local.numel() + 1), 2):
            for box in boxes_of_range(tuple(local.shape), start, stop):
                pairs = split.to_global(tuple(local.shape), box)
                assert sum(part.numel for part, _ in pairs) == box.numel
                for part, where in pairs:
                    assert torch.equal(local[region(part)], whole[region(where)])


def scattered(
    name: str, whole: torch.Tensor, split: tuple[int, int], tp: int, chooser: random.Random
) -> list[Piece]:
    """Pieces of `whole` on `tp` ranks, each cut at random into the fragments of a few owners."""
    pieces = []
    for rank in range(tp):
        cut = Split(*split, rank, tp) if tp > 1 else None
        local = whole if cut is None else cut.take(whole)
        numel = local.numel()
        borders = sorted(chooser.randint(0, numel) for _ in range(chooser.randint(0, 4)))
        for start, stop in itertools.pairwise([0, *borders, numel]):
            flat = local.reshape(-1)[start:stop].clone()
            pieces += pieces_of(name, tuple(local.shape), cut, start, flat)
    return pieces


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((), (0, 1)),
        ((24,), (0, 3)),
        ((16, 5), (0, 2)),
        ((24, 3), (0, 3)),
        ((5, 8), (1, 1)),
        ((5, 16), (1, 2)),
        ((3, 12, 2), (1, 3)),
        ((2, 3, 8), (2, 2)),
    ],
)
def test_pieces_cover_the_whole_once(
    shape: tuple[int, ...], split: tuple[int, int], tp: int
) -> None:
    if not shape and tp > 1:
        pytest.skip("a number cannot be cut")
    chooser = random.Random(0)
    whole = counted(shape)
    for _ in range(30):
        found = torch.full(shape, -1.0)
        elements = 0
        for piece in scattered("weights.a", whole, split, tp, chooser):
            assert piece.name == "weights.a" and piece.shape == shape
            assert piece.tensor.is_contiguous() and piece.tensor.numel() == piece.box.numel > 0
            found[region(piece.box)] = piece.tensor.reshape(piece.box.sizes)
            elements += piece.box.numel
        assert torch.equal(found, whole)
        assert elements == whole.numel()


def test_writing_to_a_piece_changes_the_fragment() -> None:
    flat = torch.zeros(7)
    for piece in pieces_of("weights.a", (4, 4), Split(1, 2, 0, 2), 3, flat):
        piece.tensor.add_(1)
    assert torch.equal(flat, torch.ones(7))
