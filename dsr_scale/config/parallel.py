"""How one model replica is spread over devices. What is learned does not depend on any of it.

Data parallelism is not a setting: it is what the devices leave over, `devices / (tp · pp)`, so that
the same file runs on any number of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsr_scale.config.section import Section


class ParallelConfig(Section):
    """Splits of the model; the remaining factor of the devices is data parallel
    (docs/parallelism.md)."""

    tp: int = Field(default=1, gt=0)
    """Tensor-parallel ranks that share every block: attention heads and hidden units are divided."""
    sp: bool = False
    """Sequence parallel: between the blocks' matrix products each tensor rank holds its share of the
    tokens instead of all of them. Needs `tp` above 1."""
    pp: int = Field(default=1, gt=0)
    """Pipeline ranks, each with a span of the blocks."""
    virtual_stages: int = Field(default=1, gt=0)
    """Stages on each pipeline rank; above 1 is the interleaved 1F1B schedule."""
    zero: Literal[1, 2, 3] = 1
    """What data-parallel ranks divide among themselves: 1 optimizer and averages, 2 gradients too,
    3 weights too."""
    offload: bool = False
    """Keep the optimizer's state in host memory and take its step on the CPU."""
