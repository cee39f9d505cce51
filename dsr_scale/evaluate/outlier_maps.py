"""Maps of tokens: what the tokens of pictured images do at pictured blocks, as a mosaic beside the images.

A `MapGrid` is the maps of one target at one timestep, ready to draw; it also holds the numbers that the
report puts in words. All maps of a target are one mosaic in one pair of axes, since matplotlib takes
its time for every pair; where a token lies in it is worked out here. Values are relative, to a map's
median or to uniform attention, so that blocks, timesteps and targets can share a colour scale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from dsr_scale.evaluate.outlier_figures import colour_bar, style
from dsr_scale.evaluate.outlier_findings import Findings
from dsr_scale.evaluate.outlier_wording import block_name, plain, time_name

_COMPONENT_COLOURS = np.array([[0.42, 0.42, 0.42], [0.22, 0.16, -0.40], [0.20, -0.12, 0.0]])
"""Red, green and blue that one unit of each principal component adds: lightness, yellow against
blue, red against green, so that a colour-blind reader loses the least of the three."""
_CELL_INCHES = 0.85
_TOKEN, _GAP = 8, 2
"""Side of a token in a mosaic of maps, and the margin around each map, in pixels of the array."""
_REGISTER_PICTURES = 2
"""Pictures whose registers' attention is drawn, a row per register."""


@dataclass(frozen=True)
class MapGrid:
    """Maps of one target, in rows and columns."""

    title: str
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    maps: np.ndarray
    """[rows, columns, h, w], or [rows, columns, h, w, 3] of colours in [0, 1]."""
    pictures: np.ndarray | None = None
    """uint8 [rows, H, W, 3], drawn before the first column."""
    marks: np.ndarray | None = None
    """int [rows, columns, 2], row and column of a token to circle."""


def norm_maps(found: Findings, step: int) -> MapGrid:
    """Norms over each map's own median, pictures by pictured blocks."""
    return _norm_grid(found, step, found.norm_maps)


def norm_maps_without_channels(found: Findings, step: int) -> MapGrid:
    """The same without each image's channels of largest energy, over the median without them."""
    return _norm_grid(found, step, found.norm_maps_without_channels)


def norms_over_median(norms: np.ndarray) -> np.ndarray:
    """Maps of norms [...,h,w], each over its own median; NaN where that is 0."""
    median = np.median(norms, axis=(-2, -1), keepdims=True)
    return norms / np.where(median > 0, median, np.nan)


def component_maps(found: Findings, step: int) -> MapGrid:
    """Principal components as colours. Each component of a map runs over its own whole range."""
    scores = found.component_maps[:, step]
    low, high = scores.min((-3, -2), keepdims=True), scores.max((-3, -2), keepdims=True)
    spread = 2 * (scores - low) / np.where(high > low, high - low, 1) - 1
    return _grid(found, step, np.clip(0.5 + spread @ _COMPONENT_COLOURS, 0, 1))


def received_maps(found: Findings, step: int) -> MapGrid:
    """Attention that image tokens receive, over uniform attention."""
    return _grid(found, step, found.received_maps[:, step])


def top_maps(found: Findings, step: int) -> MapGrid:
    """Attention of the token of largest norm, which is circled, times the number of image tokens."""
    marks = found.top_positions[:, step].swapaxes(0, 1)
    return _grid(found, step, per_token(found.top_maps)[:, step], marks=marks)


def register_maps(found: Findings, step: int) -> MapGrid:
    """Attention of registers times the number of image tokens: a row per picture and register."""
    maps = per_token(found.register_maps)[:, step, :_REGISTER_PICTURES]
    blocks, pictures, registers = maps.shape[:3]
    rows = np.repeat(np.arange(pictures), registers)
    names = tuple(f"register {row % registers + 1}" for row in range(len(rows)))
    flat = maps.reshape(blocks, pictures * registers, *maps.shape[3:])
    return _grid(found, step, flat, rows=rows, row_names=names)


def per_token(attention: np.ndarray) -> np.ndarray:
    """Attention maps [...,h,w] in units of uniform attention over the image's h·w tokens."""
    return attention * (attention.shape[-2] * attention.shape[-1])


def position_maps(found: Findings) -> MapGrid:
    """Share of images with an outlier at each position: timesteps by pictured blocks."""
    names = [f"t = {t.model:.3g}\n(pre-shift {t.preshift:.2g})" for t in found.timesteps]
    return MapGrid(
        title=plain(found.name, 60),
        row_names=tuple(names) or ("",),
        column_names=_pictured_names(found),
        maps=found.position_shares[list(found.pictured_blocks)].swapaxes(0, 1),
    )


def map_figure(
    grids: Sequence[MapGrid], *, scale: Normalize | None = None, label: str = ""
) -> Figure:
    """Maps of the targets side by side under one colour `scale`; without a scale, maps are colours."""
    with style():
        columns = [_columns(grid) for grid in grids]
        rows = max(len(grid.row_names) for grid in grids)
        height, width = grids[0].maps.shape[2:4]
        figure = Figure(
            figsize=(
                _CELL_INCHES * sum(columns) + 1.6 + 0.4 * len(grids),
                _CELL_INCHES * rows * height / width + 1.1,
            ),
            layout="compressed",
        )
        cells = figure.subplots(1, len(grids), squeeze=False, width_ratios=columns)[0]
        for number, (axes, grid) in enumerate(zip(cells, grids, strict=True)):
            same_rows = number > 0 and grid.row_names == grids[number - 1].row_names
            _map_panel(axes, grid, scale, row_names=not same_rows)
        if scale is not None:
            colour_bar(figure, list(cells), scale, "magma", label)
    return figure


def _columns(grid: MapGrid) -> int:
    return len(grid.column_names) + (grid.pictures is not None)


def _map_panel(axes: Axes, grid: MapGrid, scale: Normalize | None, *, row_names: bool) -> None:
    """Draws cells one unit wide and high: the pictures in column 0, where there are any, then the maps."""
    rows, names = len(grid.row_names), grid.column_names
    height, width = grid.maps.shape[2:4]
    first, last = _columns(grid) - len(names), _columns(grid)
    axes.imshow(
        _mosaic(grid.maps),
        norm=scale,
        cmap="magma",
        extent=(first, last, rows, 0),
        interpolation="nearest",
    )
    if grid.pictures is not None:
        for row, picture in enumerate(grid.pictures):
            axes.imshow(picture, extent=(0.02, 0.98, row + 0.98, row + 0.02))
    if grid.marks is not None:
        for row, column in np.ndindex(grid.marks.shape[:2]):
            down, across = grid.marks[row, column]
            centre = (first + column + _within(across, width), row + _within(down, height))
            axes.add_patch(Circle(centre, 0.09, fill=False, edgecolor="#56B4E9", linewidth=1.6))
    axes.set_xlim(0, last)
    axes.set_ylim(rows, 0)
    axes.set_aspect(height / width)
    wide = max(18, 9 * last)
    axes.set_title("\n".join(textwrap.fill(line, wide) for line in grid.title.splitlines()))
    axes.set_xticks([first + number + 0.5 for number in range(len(names))], names)
    axes.set_xlabel("block")
    axes.set_yticks(
        [row + 0.5 for row in range(rows)], grid.row_names if row_names else [""] * rows
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """Maps [rows,columns,h,w,…] in one array, white between them: one image draws faster than many."""
    rows, columns = maps.shape[:2]
    magnified = maps.repeat(_TOKEN, 2).repeat(_TOKEN, 3)
    colours = [(0, 0)] * (maps.ndim - 4)
    around = [(0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP), *colours]
    # NaN is transparent under a colour map.
    padded = np.pad(magnified, around, constant_values=1 if colours else np.nan)
    height, width = padded.shape[2:4]
    return padded.swapaxes(1, 2).reshape(rows * height, columns * width, *maps.shape[4:])


def _within(token: int, tokens: int) -> float:
    """Where the middle of a token lies in a cell of that many tokens."""
    return (_GAP + (token + 0.5) * _TOKEN) / (2 * _GAP + tokens * _TOKEN)


def _norm_grid(found: Findings, step: int, norms: np.ndarray) -> MapGrid:
    """Of norms [L,S,P,h,w]."""
    return _grid(found, step, norms_over_median(norms[list(found.pictured_blocks), step]))


def _grid(
    found: Findings,
    step: int,
    maps: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    row_names: tuple[str, ...] | None = None,
    marks: np.ndarray | None = None,
) -> MapGrid:
    """Maps [Q,rows,h,w,…] without the blocks that have none; row i is of picture `rows[i]`."""
    present = np.isfinite(maps).reshape(len(maps), -1).any(1)
    time = time_name(found, step)
    return MapGrid(
        title=plain(found.name, 60) + (f"\n{time}" if time else ""),
        row_names=row_names or _picture_names(found),
        column_names=tuple(np.array(_pictured_names(found))[present]),
        maps=maps[present].swapaxes(0, 1),
        pictures=found.pictures.transpose(0, 2, 3, 1)[slice(None) if rows is None else rows],
        marks=None if marks is None else marks[:, present],
    )


def _pictured_names(found: Findings) -> tuple[str, ...]:
    return tuple(block_name(found.blocks[block]) for block in found.pictured_blocks)


def _picture_names(found: Findings) -> tuple[str, ...]:
    if not found.captions:
        return tuple(f"image {number + 1}" for number in range(len(found.pictures)))
    return tuple(textwrap.fill(plain(caption, 42), 15) for caption in found.captions)
