"""Figures of outlier findings: block × timestep heat-maps, curves and bars by block, histograms.

Every figure shows its targets side by side under one colour scale or one axis, so that what looks
brighter is larger. Colour maps keep their order for colour-blind readers and in grey; lines and
bars differ by mark or hatching as well as by colour. Style, scales and colour bars are also those
of the maps of tokens (`outlier_maps`).
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

from dsr_scale.evaluate.outlier_findings import Findings
from dsr_scale.evaluate.outlier_wording import block_name, brief, plain, present, time_name

DPI = 200
_MISSING = "0.88"
"""Grey of a cell without a value."""
_MARKERS = "osD^Pv"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#BBBBBB")
"""Okabe and Ito's colours, told apart under every common colour blindness; grey for the rest."""
_HATCHES = ("", "///", "...", "xxx", "---", "")


def style() -> AbstractContextManager[None]:
    """Inside, matplotlib makes and draws figures in the report's style."""
    return rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 10,
            # Names and captions may hold a $, which would begin a formula.
            "text.parse_math": False,
            "hatch.linewidth": 0.6,
        }
    )


def png(figure: Figure) -> bytes:
    """The figure as PNG, `DPI` pixels per inch."""
    content = io.BytesIO()
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings(), style():
        # A caption may hold characters that the font lacks; the report's text has them.
        warnings.filterwarnings("ignore", message="Glyph")
        # `savefig` would draw twice, once to find the layout.
        canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture.save(content, format="PNG", dpi=(DPI, DPI))
    return content.getvalue()


def steps_of(found: Findings) -> int:
    """S, the number of timesteps; 1 for an encoder."""
    return found.norm_maps.shape[1]


def colour_scale(values: Iterable[np.ndarray], *, log: bool, reach: float = 0.0) -> Normalize:
    """One scale for all of `values`: from 0 to the largest, or logarithmic over the positive ones.

    It reaches to `reach` at least. A logarithmic one ends at a thousandth of the largest value;
    below, all has the darkest colour.
    Raises ValueError where no value is finite (and, if `log`, positive).
    """
    shown = np.concatenate([array[np.isfinite(array)].ravel() for array in values])
    if not log:
        return Normalize(0.0, max(float(shown.max()), reach) or 1.0)
    high = max(float(shown.max()), reach)
    low = max(float(shown[shown > 0].min()), high / 1000)
    return LogNorm(low, max(high, 1.05 * low), clip=True)


def heat_map(findings: Sequence[Findings], measure: str, *, scale: Normalize, label: str) -> Figure:
    """A measure of each target by block (downwards) and timestep, with its numbers in the cells."""
    with style():
        widths = [steps_of(found) for found in findings]
        depth = max(len(found.blocks) for found in findings)
        figure = Figure(
            figsize=(sum(max(1.9, 0.62 * width + 0.9) for width in widths) + 1.1, 0.24 * depth + 2),
            layout="constrained",
        )
        row = figure.subplots(1, len(findings), squeeze=False, width_ratios=widths)[0]
        for axes, found in zip(row, findings, strict=True):
            _heat_panel(axes, found, found.measures[measure], scale)
        row[0].set_ylabel("block")
        colour_bar(figure, list(row), scale, "viridis", label)
    return figure


def _heat_panel(axes: Axes, found: Findings, values: np.ndarray, scale: Normalize) -> None:
    drawn = axes.imshow(values, norm=scale, cmap="viridis", aspect="auto")
    axes.set_facecolor(_MISSING)
    axes.set_title(textwrap.fill(plain(found.name, 60), max(16, 9 * values.shape[1])))
    axes.set_yticks(range(len(found.blocks)), [block_name(block) for block in found.blocks])
    for (block, step), value in np.ndenumerate(values):
        text, dark = "–", False
        if np.isfinite(value):
            text, dark = brief(value), np.mean(drawn.to_rgba(value)[:3]) < 0.45
        colour = "white" if dark else "black"
        number = axes.text(step, block, text, ha="center", va="center", fontsize=8, color=colour)
        number.set_in_layout(False)  # inside its cell anyway; measuring hundreds takes seconds
    if not found.timesteps:
        axes.set_xticks([])
        return
    axes.set_xticks(range(len(found.timesteps)), [f"{t.model:.3g}" for t in found.timesteps])
    axes.set_xlabel("model time (1 is noise)")
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(len(found.timesteps)), [f"{t.preshift:.2g}" for t in found.timesteps])
    above.set_xlabel("pre-shift time")


def curves(
    findings: Sequence[Findings],
    lines: Mapping[str, str],
    *,
    label: str,
    log: bool = False,
    reference: float | None = None,
) -> Figure:
    """Measures by block: a panel per target and timestep, a line per measure, bands of ± 1 standard error.

    `lines` gives the name of each measure's line, whose place among them is its colour also in a report
    without some of them; `reference` draws a level across every panel.
    """
    with style():
        figure, panels = _panels(findings)
        for axes, found, step in panels:
            if reference is not None:
                axes.axhline(reference, color="0.4", linewidth=0.8, linestyle="--")
            for number, (measure, name) in enumerate(lines.items()):
                if not present(findings, measure):
                    continue
                values = found.measures[measure][:, step]
                colour, marker = _COLOURS[number], _MARKERS[number]
                axes.plot(
                    values, label=name, color=colour, marker=marker, linewidth=1.3, markersize=3.5
                )
                if measure in found.errors:
                    error = found.errors[measure][:, step]
                    places = np.arange(len(values))
                    axes.fill_between(
                        places, values - error, values + error, color=colour, alpha=0.2
                    )
            if log:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
        if log:
            _label_logarithmic(panels, "y")
        _finish_panels(figure, panels, label)
    return figure


def attention_bars(findings: Sequence[Findings], parts: Mapping[str, str]) -> Figure:
    """Where the attention of image tokens goes, by block: `parts` (measure → name) stacked to 1."""
    with style():
        figure, panels = _panels(findings)
        for axes, found, step in panels:
            bottom = np.zeros(len(found.blocks))
            for number, (measure, name) in enumerate(parts.items()):
                if not present(findings, measure):
                    continue
                values = np.nan_to_num(found.measures[measure][:, step])
                axes.bar(
                    range(len(values)),
                    values,
                    bottom=bottom,
                    width=0.85,
                    label=name,
                    color=_COLOURS[number],
                    hatch=_HATCHES[number],
                    edgecolor="white",
                    linewidth=0,
                )
                bottom += values
            axes.set_ylim(0, 1)
        _finish_panels(figure, panels, "share of attention")
    return figure


def histograms(findings: Sequence[Findings]) -> Figure:
    """Norms over their image's median at the pictured blocks: image tokens drawn through, registers dotted."""
    with style():
        figure, panels = _panels(findings, by_block=False)
        edges = findings[0].histogram_edges
        filled = np.zeros(len(edges) - 1, dtype=bool)
        for found in findings:
            for counts in (found.image_histograms, found.register_histograms):
                filled |= counts[list(found.pictured_blocks)].any((0, 1))
        low, high = edges[:-1][filled].min(initial=1), edges[1:][filled].max(initial=1)
        for axes, found, step in panels:
            shades = _depth_colours(len(found.pictured_blocks))
            for block, shade in zip(found.pictured_blocks, shades, strict=True):
                name = f"block {block_name(found.blocks[block])}"
                for counts, line, kind in (
                    (found.image_histograms, "-", name),
                    (found.register_histograms, ":", "registers, dotted"),
                ):
                    total = counts[block, step].sum()
                    if total:
                        axes.stairs(
                            counts[block, step] / total,
                            found.histogram_edges,
                            label=kind,
                            color=shade,
                            linestyle=line,
                            linewidth=1.4,
                        )
            axes.set_xscale("log")
            axes.set_yscale("log")
            # Round numbers on both sides of 1, so that a clean network looks clean.
            axes.set_xlim(min(low, 0.2), max(high, 5))
            axes.grid(alpha=0.3)
        for way in ("x", "y"):
            _label_logarithmic(panels, way)
        _finish_panels(figure, panels, "share of tokens", across="norm / median of the image")
    return figure


def _panels(
    findings: Sequence[Findings], *, by_block: bool = True
) -> tuple[Figure, list[tuple[Axes, Findings, int]]]:
    """A grid of plots, timesteps downwards and targets across, on common axes."""
    steps = max(steps_of(found) for found in findings)
    figure = Figure(figsize=(5.2 * len(findings) + 0.8, 1.9 * steps + 1.2), layout="constrained")
    plots = figure.subplots(
        steps, len(findings), squeeze=False, sharex="col" if by_block else True, sharey=True
    )
    panels = []
    for column, found in enumerate(findings):
        for step in range(steps):
            axes = plots[step, column]
            if step >= steps_of(found):
                axes.set_visible(False)
                continue
            lines = [plain(found.name, 60)] if step == 0 else []
            axes.set_title("\n".join([*lines, time_name(found, step)]).strip())
            if by_block:
                places = _spread(len(found.blocks), 16)
                axes.set_xticks(places, [block_name(found.blocks[place]) for place in places])
            panels.append((axes, found, step))
    return figure, panels


def _finish_panels(
    figure: Figure,
    panels: Sequence[tuple[Axes, Findings, int]],
    label: str,
    *,
    across: str = "block",
) -> None:
    for axes, found, step in panels:
        if step == steps_of(found) - 1:
            axes.set_xlabel(across)
            axes.tick_params(labelbottom=True)
    figure.supylabel(label, fontsize=10)
    named = {
        name: handle
        for axes, _, _ in panels
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / 2.6)),
        frameon=False,
    )


def _label_logarithmic(panels: Sequence[tuple[Axes, Findings, int]], way: str) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten, on all panels alike."""
    for axes, _, _ in panels:
        low, high = getattr(axes, f"get_{way}lim")()
        ticks = _log_ticks(low, high)
        axis = getattr(axes, f"{way}axis")
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) > 1:
        return inside
    return sorted({float(f"{low:.2g}"), *inside, float(f"{high:.2g}")})


def colour_bar(
    figure: Figure, plots: list[Axes], scale: Normalize, colours: str, label: str
) -> Colorbar:
    """Adds the bar of `scale` in the colour map `colours` beside `plots`, with plain numbers."""
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=plots, label=label, aspect=30, fraction=0.05, pad=0.02
    )
    if isinstance(scale, LogNorm):
        assert scale.vmin is not None and scale.vmax is not None
        ticks = _log_ticks(scale.vmin, scale.vmax)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    return bar


def _depth_colours(count: int) -> np.ndarray:
    """Colours from dark to light with depth, without the lightest, which white would swallow."""
    return colormaps["viridis"](np.linspace(0, 0.88, count))


def _spread(count: int, most: int) -> list[int]:
    """Indices of `count` things at equal distance, about `most`, and the last one."""
    step = -(-count // most)
    last = count - 1
    return [place for place in range(0, last, step) if place <= last - step] + [last]
