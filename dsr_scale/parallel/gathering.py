"""All ranks' pieces on the first rank, for samples while training: rare, so simple and small.

Every rank sends its pieces as messages of bounded size, one rank after the other, through the host.
Nothing is held whole anywhere but where the receiver puts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from dsr_scale.base.boxes import Piece
from dsr_scale.parallel.groups import Ranks

MESSAGE_ELEMENTS = 1 << 26
"""256 MiB of float32."""


def gather_on_first(
    pieces: Iterable[Piece], ranks: Ranks, receive: Callable[[Piece], object]
) -> None:
    """Hands every rank's pieces to `receive` on the first rank. A collective."""
    batches = list(_batches(pieces))
    described = [[piece._replace(tensor=None) for piece in batch] for batch in batches]
    everyone: list[Any] | None = [None] * ranks.world_size if ranks.is_first else None
    if ranks.world_size > 1:
        dist.gather_object(described, everyone, dst=0, group=ranks.host_group)
    if not ranks.is_first:
        for batch in batches:
            dist.send(_flat(batch), dst=0, group=ranks.host_group)
        return
    for batch in batches:
        for piece in batch:
            receive(piece)
    assert everyone is not None
    for source in range(1, ranks.world_size):
        for batch in everyone[source]:
            flat = torch.empty(sum(piece.box.numel for piece in batch))
            dist.recv(flat, src=source, group=ranks.host_group)
            parts = flat.split([piece.box.numel for piece in batch])
            for piece, part in zip(batch, parts, strict=True):
                receive(piece._replace(tensor=part))


def write_into(tensor: torch.Tensor, piece: Piece) -> None:
    """Writes a piece where it belongs in the whole tensor, in the tensor's precision."""
    for dim, (offset, size) in enumerate(zip(piece.box.offsets, piece.box.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    tensor.copy_(piece.tensor.view(tensor.shape))


def _batches(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    batch: list[Piece] = []
    elements = 0
    for piece in pieces:
        if batch and elements + piece.box.numel > MESSAGE_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(piece)
        elements += piece.box.numel
    if batch:
        yield batch


def _flat(batch: list[Piece]) -> torch.Tensor:
    return torch.cat([piece.tensor.reshape(-1).to("cpu", torch.float32) for piece in batch])
