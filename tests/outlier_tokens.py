"""Tokens of known norms, and their norms in float64 by a loop, for tests of outlier measures."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dsr_scale.evaluate.outlier_statistics import NO_ROWS, TokenRows

GRID = (4, 6)
TOKENS, REGISTERS, WIDTH = 24, 3, 16
ROWS = TokenRows(
    registers=slice(0, REGISTERS),
    image=slice(REGISTERS, REGISTERS + TOKENS),
    text=NO_ROWS,
    special=NO_ROWS,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ordinary_tokens(images: int = 3) -> Tensor:
    """[B,K+T,D] of norms from 3 to 5; a register is 30 long."""
    tokens = torch.nn.functional.normalize(noise(images, REGISTERS + TOKENS, WIDTH), dim=-1)
    tokens = tokens * torch.linspace(3, 5, REGISTERS + TOKENS)[:, None]
    tokens[:, 1] *= 30 / tokens[:, 1].norm(dim=-1, keepdim=True)
    return tokens


def lower_median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def expected_norms(tokens: Tensor, without: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Norms of image tokens and of registers of one image [K+T,D], in float64."""
    plain = tokens.double().numpy().copy()
    energy = (plain[REGISTERS:] ** 2).sum(axis=0)
    for channel in np.argsort(energy)[WIDTH - without :]:
        plain[:, channel] = 0
    norms = np.array([math.sqrt(sum(value * value for value in row)) for row in plain])
    return norms[REGISTERS:], norms[:REGISTERS]
