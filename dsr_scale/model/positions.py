"""Fixed positions: 2-D sin-cos added to tokens, 2-D RoPE inside attention, 1-D sin-cos for bytes.

Tables are computed in float64, stored in float32 whatever the weights' dtype, and cached per grid
and device, because any grid may arrive at run time. They hold nothing learned, so they are no part
of a state dict.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from dsr_scale.model.layout import Rows

_BASE = 10000.0


def register_grid(count: int) -> tuple[int, int]:
    """The most square rows × columns = K; √K × √K for a perfect square, as published."""
    rows = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    return rows, count // rows


def _sincos_axis(positions: np.ndarray, width: int) -> np.ndarray:
    """`[sin(p·ω), cos(p·ω)]` with width/2 frequencies ω_k = 10000^(−2k/width): [N] → [N, width]."""
    omega = _BASE ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.astype(np.float64), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _grid_indices(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Row index and column index of every cell, row-major."""
    rows, columns = np.indices(grid)
    return rows.ravel(), columns.ravel()


def _store(table: np.ndarray, device: torch.device) -> Tensor:
    # A table first needed while sampling must not become an inference tensor: training reuses it.
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.float32, device=device)


@functools.cache
def sincos_2d(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Fixed positions of a grid, row-major: [rows·columns, D]; column half first, then row half."""
    rows, columns = _grid_indices(grid)
    table = np.concatenate(
        [_sincos_axis(columns, width // 2), _sincos_axis(rows, width // 2)], axis=1
    )
    return _store(table, device)


@functools.cache
def sincos_1d(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions of a sequence: [L, D]."""
    return _store(_sincos_axis(np.arange(length), width), device)


@functools.cache
def rope(
    rows: Rows, grid: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every row and adjacent channel pair: two [N, head_dim/2].

    The first half of the pairs turns with the row index, the second with the column index.
    Registers and text are not turned (cos 1, sin 0).
    """
    frequencies = _BASE ** -(np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim / 2))
    row_index, column_index = _grid_indices(grid)
    image = np.concatenate(
        [np.outer(row_index, frequencies), np.outer(column_index, frequencies)], axis=1
    )
    still = np.zeros((rows.registers + rows.text, image.shape[1]))
    angles = np.concatenate([still, image])
    return _store(np.cos(angles), device), _store(np.sin(angles), device)
