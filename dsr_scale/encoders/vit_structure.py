"""Where the parts of a vision transformer are, whatever its family calls them.

Outlier treatments and probes are hooks on these modules; the network's own forward, its attention
above all, stays as the library wrote it. Parts are found by the last word of their name, since the
families, and versions 4 and 5 of the library, agree on little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

EMBEDDINGS = ("embeddings",)
BLOCKS = ("layer", "layers")
KEYS = ("k_proj", "key")
VALUES = ("v_proj", "value")
MLP_OUTPUTS = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")
"""Whole names inside a block: the last word alone would not tell the MLP from the attention."""

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True)
class Structure:
    """Modules of one vision transformer; sequences are in the order of its blocks."""

    embeddings: nn.Module
    """Pixels to the tokens that enter the first block."""
    blocks: tuple[nn.Module, ...]
    """What a block returns is the residual stream after it."""
    mlp_outputs: tuple[nn.Linear, ...]
    """Each block's last linear: its input [B,N,hidden] are the activations of the MLP's units."""
    keys: tuple[nn.Linear, ...]
    """Each block's projection to keys [B,N,C], heads side by side, before any rotation."""
    values: tuple[nn.Linear, ...]
    """Each block's projection to values [B,N,C]."""

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """MLP units of each block."""
        return tuple(linear.in_features for linear in self.mlp_outputs)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.keys[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the tokens."""
        return self.keys[0].weight.dtype


def structure_of(model: nn.Module, family: str) -> Structure:
    """The parts of `model`, a vision transformer of the transformers library without its heads.

    `family` is the type its config names. The assertion that a part is found once fails when the
    library has moved it.
    """
    blocks = tuple(_by_last_word(model, BLOCKS, nn.ModuleList, family))
    return Structure(
        embeddings=_by_last_word(model, EMBEDDINGS, nn.Module, family),
        blocks=blocks,
        mlp_outputs=tuple(_mlp_output(block, family) for block in blocks),
        keys=tuple(_by_last_word(block, KEYS, nn.Linear, family) for block in blocks),
        values=tuple(_by_last_word(block, VALUES, nn.Linear, family) for block in blocks),
    )


def _by_last_word(parent: nn.Module, words: Sequence[str], kind: type[Kind], family: str) -> Kind:
    found = [
        module
        for name, module in parent.named_modules()
        if isinstance(module, kind) and name.split(".")[-1] in words
    ]
    assert len(found) == 1, f"{family}: {len(found)} modules called {' or '.join(words)}"
    return found[0]


def _mlp_output(block: nn.Module, family: str) -> nn.Linear:
    found = [module for name, module in block.named_modules() if name in MLP_OUTPUTS]
    assert len(found) == 1, f"{family}: {len(found)} modules called {' or '.join(MLP_OUTPUTS)}"
    assert isinstance(found[0], nn.Linear)
    return found[0]
