"""Maps of an encoder's patch norms before and after its outliers are treated."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dsr_scale.base import atomic_files

_CELL_INCHES = 1.25
_ROWS = 3
"""Rows of the grid per image: before, after, a gap."""
_GAP = 0.08


def norm_map_picture(
    images: Tensor,
    before: Tensor,
    after: Tensor,
    columns: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Writes a PNG: each image with its norm maps before and, beneath, after.

    `images` are uint8 [N,3,S,S], `before` and `after` are norms [L,N,h,w] of the L blocks that
    `columns` names. The maps of a block share one linear colour scale, from 0 to its largest norm.
    """
    # The object interface needs no display and leaves no global figure behind.
    from matplotlib.figure import Figure

    blocks, count = before.shape[:2]
    figure = Figure(
        figsize=(_CELL_INCHES * (blocks + 1) + 0.4, 2 * _CELL_INCHES * count + 1.3),
        layout="constrained",
    )
    grid = figure.add_gridspec(_ROWS * count, blocks + 1, height_ratios=[1, 1, _GAP] * count)
    for index in range(count):
        picture = _bare(figure.add_subplot(grid[_ROWS * index : _ROWS * index + 2, 0]))
        picture.imshow(images[index].permute(1, 2, 0).cpu().numpy())
    for block in range(blocks):
        largest = float(max(before[block].max(), after[block].max()))
        cells = []
        for index in range(count):
            for below, (name, norms) in enumerate((("before", before), ("after", after))):
                cell = _bare(figure.add_subplot(grid[_ROWS * index + below, block + 1]))
                drawn = cell.imshow(
                    norms[block, index].cpu().numpy(), vmin=0, vmax=largest, cmap="magma"
                )
                if block == 0:
                    cell.set_ylabel(name, fontsize=9)
                if index == below == 0:
                    cell.set_title(columns[block], fontsize=9)
                cells.append(cell)
        bar = figure.colorbar(drawn, ax=cells, location="bottom", aspect=12, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(textwrap.fill(title, width=int(13 * figure.get_figwidth())), fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    atomic_files.write_bytes(path, content.getvalue())


def _bare(axes: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    return axes
