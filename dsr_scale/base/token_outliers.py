"""Which tokens of an image are outliers: one rule for encoders and for the diffusion transformer.

Scale-free, so that one bound holds for every layer and model. The threshold behind the paper's own
heat-map is not published; this is the robust rule of docs/method.md §5.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGMAS = 6
_MAD_TO_SIGMA = 1.4826
"""The standard deviation of normal numbers over their median absolute deviation (MAD)."""
_TIMES_MEDIAN = 2


def outliers(norms: Tensor) -> Tensor:
    """Norms [B,T] of B images → bool [B,T]: over median + 6·1.4826·MAD and over 2·median."""
    median = norms.median(1, keepdim=True).values
    deviation = (norms - median).abs().median(1, keepdim=True).values
    far = norms > median + _SIGMAS * _MAD_TO_SIGMA * deviation
    return torch.logical_and(far, norms > _TIMES_MEDIAN * median)
