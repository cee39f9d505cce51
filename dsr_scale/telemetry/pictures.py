"""Pictures of a run: image grids with captions, the loss curve, token norms by block.

Grids need only Pillow, so that sampling from a bundle does not depend on matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dsr_scale.base import atomic_files
from dsr_scale.telemetry.token_norms import BlockNorms

_MARGIN = 6
_CAPTION_LINES = 3


def image_grid(
    rows: Sequence[tuple[str, torch.Tensor]],
    captions: Sequence[str],
    path: Path,
    *,
    columns: int = 8,
    side: int = 96,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG of uint8 image batches [N,3,H,W], each of `rows` under its own name.

    Image i of every row stands in one cell above caption i. `metadata` goes into the PNG's text.
    """
    count = len(captions)
    columns = min(columns, count)
    font = ImageFont.load_default(size=11)
    name_width = max((int(font.getlength(name)) for name, _ in rows), default=0) + 2 * _MARGIN
    text_height = 14 * _CAPTION_LINES
    cell_height = len(rows) * (side + _MARGIN) + text_height + _MARGIN
    lines = -(-count // columns)
    sheet = Image.new(
        "RGB",
        (
            name_width + columns * (side + _MARGIN) + _MARGIN,
            lines * cell_height + _MARGIN,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, caption in enumerate(captions):
        left = name_width + (index % columns) * (side + _MARGIN)
        top = _MARGIN + (index // columns) * cell_height
        for row, (name, images) in enumerate(rows):
            y = top + row * (side + _MARGIN)
            if index % columns == 0:
                draw.text((_MARGIN, y + side // 2 - 6), name, fill="black", font=font)
            picture = Image.fromarray(images[index].permute(1, 2, 0).cpu().numpy())
            scale = side / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, y))
        y = top + len(rows) * (side + _MARGIN)
        wrapped = textwrap.wrap(caption, width=max(8, side // 6))[:_CAPTION_LINES]
        draw.multiline_text((left, y), "\n".join(wrapped), fill="black", font=font, spacing=2)
    information = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        information.add_itxt(key, value)
    content = io.BytesIO()
    sheet.save(content, format="PNG", pnginfo=information)
    atomic_files.write_bytes(path, content.getvalue())


def loss_curve(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws the loss of one or more runs, by name, over images seen."""
    # The object interface needs no display and leaves no global figure behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, records in runs.items():
        points = [(r["samples_seen"], r["loss"]) for r in records if "loss" in r]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set_xlabel("images seen")
    axes.set_ylabel("velocity loss")
    axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def token_norm_picture(
    models: Mapping[str, Sequence[BlockNorms]],
    grid: tuple[int, int],
    title: str,
    path: Path,
) -> None:
    """Draws, for each named model, one image's token-norm map per block, and max/median by block.

    Maps of a column share one colour scale, in units of that block's median norm.
    """
    from matplotlib.figure import Figure

    names = list(models)
    depth = max(len(blocks) for blocks in models.values())
    figure = Figure(figsize=(1.4 * depth + 1, 1.6 * len(names) + 2.6), layout="constrained")
    cells = figure.add_gridspec(len(names) + 1, depth, height_ratios=[1.0] * len(names) + [1.4])
    for column in range(depth):
        maps = {
            name: models[name][column].image_norms[0] / models[name][column].image_norms[0].median()
            for name in names
        }
        top = max(float(values.max()) for values in maps.values())
        for row, name in enumerate(names):
            cell = figure.add_subplot(cells[row, column])
            cell.imshow(maps[name].reshape(grid), vmin=0, vmax=top, cmap="magma")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.set_title(f"{models[name][column].block}, max {maps[name].max():.1f}", fontsize=7)
            if column == 0:
                cell.set_ylabel(name, fontsize=8)
    curve = figure.add_subplot(cells[-1, :])
    for name in names:
        (line,) = curve.plot([b.max_over_median for b in models[name]], marker="o", label=name)
        registers = [b.register_over_median for b in models[name]]
        if any(value is not None for value in registers):
            curve.plot(
                [float("nan") if value is None else value for value in registers],
                linestyle=":",
                marker="s",
                color=line.get_color(),
                label=f"{name}: largest register",
            )
    curve.set_xlabel("block")
    curve.set_ylabel("largest norm / median", fontsize=8)
    curve.set_xticks(range(depth))
    curve.legend(fontsize=7)
    curve.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, width=int(15 * figure.get_figwidth())), fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    atomic_files.write_bytes(path, content.getvalue())
