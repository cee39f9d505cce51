"""Norms of a frozen encoder's tokens after every block: where its outliers are, and how large.

Taken by hooks on the blocks, so the network's own forward and its attention stay as they are. The
token that an outlier treatment appends is counted apart from the patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsr_scale.base.token_outliers import outliers
from dsr_scale.encoders.vit import VitEncoder


class LayerNorms(NamedTuple):
    """Norms of the tokens that leave one block, over many images."""

    layer: int
    outlier_ratio: float
    """Share of patches that `base.token_outliers` calls outliers."""
    max_over_median: float
    """Largest over median patch norm of an image, averaged over images."""
    register_over_median: float | None
    """The register's norm over the median patch norm, averaged; None without register."""
    mean: float
    """Of all patch norms."""
    deviation: float
    """Standard deviation of all patch norms."""


def measure_norms(
    encoder: VitEncoder,
    batches: Iterable[Tensor],
    on_images: Callable[[int], None] = lambda _images: None,
) -> tuple[LayerNorms, ...]:
    """Norms by block over batches uint8 [N,3,S,S], with the encoder's present treatment."""
    sums = torch.zeros(len(encoder.structure.blocks), 5, dtype=torch.float64)
    images = patches = 0
    for batch in batches:
        norms = token_norms(encoder, batch).double()
        of_patches = norms[..., encoder.patch_rows]
        median = of_patches.median(dim=-1).values
        row = encoder.register_row
        extreme = outliers(of_patches.flatten(0, 1)).view_as(of_patches)
        parts = [
            extreme.sum(dim=(1, 2)),
            (of_patches.amax(dim=-1) / median).sum(dim=1),
            (norms[..., row] / median).sum(dim=1) if row is not None else median.sum(dim=1),
            of_patches.sum(dim=(1, 2)),
            of_patches.square().sum(dim=(1, 2)),
        ]
        sums += torch.stack(parts, dim=1).cpu()
        patches += of_patches[0].numel()
        images += len(batch)
        on_images(len(batch))
    measured = []
    for layer, (outlying, largest, register, total, squares) in enumerate(sums.tolist()):
        mean = total / patches
        measured.append(
            LayerNorms(
                layer,
                outlier_ratio=outlying / patches,
                max_over_median=largest / images,
                register_over_median=None if encoder.register_row is None else register / images,
                mean=mean,
                deviation=max(0.0, squares / patches - mean**2) ** 0.5,
            )
        )
    return tuple(measured)


def token_norms(encoder: VitEncoder, images: Tensor) -> Tensor:
    """L2 norms of all tokens after every block, float32 [layers,B,N]; rows as the encoder has them."""
    with recorded_norms(encoder.structure.blocks) as norms:
        encoder.tokens(images)
    return torch.stack(norms)


@contextlib.contextmanager
def recorded_norms(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, forwards leave the norms [B,N] of every block's output in the list."""
    norms: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        norms.append(tokens.float().norm(dim=-1))

    with removed([block.register_forward_hook(record) for block in blocks]):
        yield norms


@contextlib.contextmanager
def removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
