"""Curves of a run drawn in the terminal, and the same as a PNG.

plotext sets the dots, rich gives them colour, so that a pipe or NO_COLOR gets plain text. A column of
dots stands for many steps; its smallest and its largest value are drawn, so that no spike is lost.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from dsr_scale.base import atomic_files
from dsr_scale.telemetry.run_table import short_count

DEFAULT_METRICS = ("loss", "gradient_norm", "images_per_s")
RESTARTS_KEY = "restarts"
"""Attempts of the same job before the one that logged a record; another job begins at 0 again."""

_LABEL_WIDTH = 8
_LOGARITHMIC_FROM = 20.0
"""Ratio of largest to smallest value."""


class Curve(NamedTuple):
    """One metric over steps."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def logarithmic(self) -> bool:
        """Whether its values span more than one order of magnitude, all above zero."""
        least = min(self.values)
        return least > 0 and max(self.values) / least > _LOGARITHMIC_FROM


def metrics_in(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all metrics that can be drawn: those with a number in some record."""
    names: dict[str, None] = {}
    for record in records:
        for key, value in record.items():
            if key not in names and _is_number(value):
                names[key] = None
    return [name for name in names if name != "step"]


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """One metric of `telemetry.metrics.read_metrics`; what was not finite and lone skips are left out."""
    points = [
        (record["step"], record[name])
        for record in records
        if _is_number(record.get(name)) and (not record.get("skipped") or "samples_seen" in record)
    ]
    return Curve(name, [step for step, _ in points], [float(value) for _, value in points])


def restart_steps(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """First logged step of every attempt but the first that is seen."""
    counts = [(r["step"], r[RESTARTS_KEY]) for r in records if _is_number(r.get(RESTARTS_KEY))]
    return [step for (_, before), (step, now) in pairwise(counts) if now != before]


def draw(curves: Sequence[Curve], restarts: Sequence[int], *, width: int, height: int) -> Text:
    """All curves one above the other over one axis of steps, restarts dotted.

    Takes `width` columns and, of rows, `height` for each curve and two more.
    """
    steps = min(min(c.steps) for c in curves), max(max(c.steps) for c in curves)
    margin = " " * (_LABEL_WIDTH + 1)
    panels = Text(no_wrap=True, end="")
    for one in curves:
        ends = f"now {one.values[-1]:.4g}, least {min(one.values):.4g}, most {max(one.values):.4g}"
        panels.append(margin).append(one.name, style="bold").append(f"  {ends}\n", style="dim")
        lines = _panel(one, restarts, steps, width, height)
        last = one is curves[-1]
        drawn = Text("\n".join(lines if last else lines[:-1]) + "\n")
        drawn.highlight_regex("[─│┌┐└┘├┤┬┴┼]", "dim")
        drawn.highlight_regex("[\u2801-\u28ff]+", "cyan")
        drawn.highlight_regex("┊", "yellow")
        panels.append_text(drawn)
    panels.append(margin).append("step", style="dim")
    if restarts:
        panels.append("   ┊", style="yellow").append(" restart", style="dim")
    return panels


def _panel(
    one: Curve, restarts: Sequence[int], steps: tuple[int, int], width: int, height: int
) -> list[str]:
    """Lines of one plot; the last holds the labels of steps."""
    import plotext

    # A braille character is two dots wide.
    shown = _thinned(one, 2 * (width - _LABEL_WIDTH))
    # plotext's limits and ticks know no logarithm.
    scaled = [math.log10(value) for value in shown.values] if one.logarithmic else shown.values
    low, high = min(scaled), max(scaled)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    first, last = steps[0], max(steps[1], steps[0] + 1)

    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    figure.axes(False, side=1)
    marks = _logarithmic_ticks(low, high) if one.logarithmic else _ticks(low, high, 3)
    labels = [f"{10**mark if one.logarithmic else mark:.5g}" for mark in marks]
    figure.ruler("y").lim(low, high)
    figure.ruler("y").ticks(marks, [label.rjust(_LABEL_WIDTH) for label in labels])
    counts = [mark for mark in _ticks(first, last, max(2, width // 16)) if mark == int(mark)]
    figure.ruler("x").lim(first, last)
    figure.ruler("x").ticks(counts, [short_count(int(mark)) for mark in counts])
    for step in restarts:
        figure.line(step, orientation=1, style="dotted")
    figure.draw(figure.signal(shown.steps, scaled, marker="braille").lines())
    drawn: str = figure.build().string(colorless=True)
    figure.clear()
    return [line.rstrip() for line in drawn.splitlines()]


def _thinned(one: Curve, bins: int) -> Curve:
    """At most the smallest and the largest value of each of `bins` stretches, in their order."""
    count = len(one.steps)
    if count <= 2 * bins:
        return one
    kept: list[int] = []
    for place in range(bins):
        stretch = range(place * count // bins, (place + 1) * count // bins)
        ends = {min(stretch, key=one.values.__getitem__), max(stretch, key=one.values.__getitem__)}
        kept.extend(sorted(ends))
    return Curve(one.name, [one.steps[i] for i in kept], [one.values[i] for i in kept])


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most `wanted` + 1 of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    stride = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / stride), math.floor(high / stride)
    return [index * stride for index in range(first, last + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Exponents between two exponents: whole ones, or those of 1, 2 and 5 where these are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2 else (1,)
    every = [power + math.log10(factor) for power in powers for factor in factors]
    found = [exponent for exponent in every if low <= exponent <= high]
    return found[:: math.ceil(len(found) / 4)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curves_picture(
    curves: Sequence[Curve], restarts: Sequence[int], title: str, path: Path
) -> None:
    """Writes the same panels as a PNG."""
    # The object interface needs no display and leaves no global figure behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 2.2 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), squeeze=False, sharex=True)[:, 0]
    for panel, one in zip(panels, curves, strict=True):
        panel.plot(one.steps, one.values, linewidth=1.2)
        panel.set_ylabel(one.name)
        panel.grid(alpha=0.3)
        if one.logarithmic:
            panel.set_yscale("log")
        for step in restarts:
            panel.axvline(step, color="tab:orange", linestyle=":")
    panels[-1].set_xlabel("step" + (" (dotted: restarts)" if restarts else ""))
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    atomic_files.write_bytes(path, content.getvalue())
