"""A comparison as files: numbers (JSON), a table (Markdown), pictures, and one page with all of them.

The page holds its pictures itself and forbids every other source, as the report of outliers does, so
that it can be mailed and kept.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import dsr_scale
from dsr_scale.base import atomic_files
from tools.comparison.measures import MEANINGS, OUTLIERS, pictured
from tools.comparison.runs import PlannedRun
from tools.comparison.table import Comparison, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_FILE = "comparison.json"
TABLE_FILE = "comparison.md"
REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_DPI = 120
_BUCKETS = 10
_HEADLINES = (
    "held_out_loss",
    "outlier_ratio_largest",
    "max_over_median_largest",
    "recognition",
    "fid",
    "clip_score",
)
_NOT_DRAWN = ("parameters", "minutes", "recognition_chance")


def metric_order(comparison: Comparison) -> list[str]:
    """Named metrics in the order of `MEANINGS`, then all others by name, buckets last."""
    known = [name for name in MEANINGS if name in comparison.estimates]
    others = sorted(set(comparison.estimates) - set(known), key=lambda name: (len(name), name))
    return known + others


def write_report(
    comparison: Comparison,
    runs: Sequence[PlannedRun],
    out: Path,
    *,
    title: str,
    prompts: Sequence[str],
    failures: Mapping[str, str],
    not_computed: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Path:
    """Writes everything into `out`; returns the path of the page."""
    order = metric_order(comparison)
    atomic_files.write_json(
        out / JSON_FILE,
        {
            "variants": list(comparison.variants),
            "metrics": comparison.to_json(),
            "meanings": {name: MEANINGS[name] for name in order if name in MEANINGS},
            "failures": dict(failures),
            "not_computed": dict(not_computed),
            "facts": dict(facts),
        },
    )
    atomic_files.write_bytes(out / TABLE_FILE, comparison.markdown(order).encode())
    pictures = {"comparison.png": _png(headline_figure(comparison))}
    if any(_bucket(number) in comparison.estimates for number in range(_BUCKETS)):
        pictures["held_out_loss.png"] = _png(bucket_figure(comparison))
    for name, content in pictures.items():
        atomic_files.write_bytes(out / name, content)
    samples = out / "samples.png"
    pictured(runs, prompts, samples)
    if samples.is_file():
        pictures[samples.name] = samples.read_bytes()
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        facts=_definitions(facts),
        failures=_problems("Runs that failed", failures) + _problems("Not computed", not_computed),
        table=_table(comparison, order),
        pictures="".join(_picture(name, content) for name, content in pictures.items()),
        reports=_outlier_links(runs, out),
        version=dsr_scale.__version__,
    )
    path = out / REPORT_FILE
    atomic_files.write_bytes(path, page.encode(errors="replace"))
    return path


def headline_figure(comparison: Comparison) -> Figure:
    """A panel for each headline metric: every seed as a dot, means with one standard error."""
    from matplotlib.figure import Figure

    metrics = [name for name in _HEADLINES if name in comparison.estimates]
    metrics = metrics or [n for n in metric_order(comparison) if n not in _NOT_DRAWN][:4]
    columns = min(4, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    height = 2.6 + 0.06 * max(map(len, comparison.variants))
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    for panel, metric in zip(panels, metrics, strict=False):
        found = comparison.estimates[metric]
        for place, variant in enumerate(comparison.variants):
            if variant in found:
                _draw_estimate(panel, place, found[variant])
        panel.set_title(metric, fontsize=9)
        panel.set_xticks(range(len(comparison.variants)), comparison.variants, fontsize=7)
        panel.set_xlim(-0.5, len(comparison.variants) - 0.4)
        if len(comparison.variants) > 3:
            panel.tick_params(axis="x", rotation=75)
        panel.grid(axis="y", alpha=0.3)
    return figure


def _draw_estimate(panel: Any, place: int, estimate: Estimate) -> None:
    values = list(estimate.values.values())
    panel.plot([place] * len(values), values, ".", color="0.6", markersize=5)
    panel.errorbar(
        place + 0.12,
        estimate.mean,
        yerr=estimate.standard_error,
        fmt="o",
        color="C0",
        markersize=4,
        capsize=3,
    )


def bucket_figure(comparison: Comparison) -> Figure:
    """Held-out loss by model time, and by how much of the first variant's the others' differ.

    Bars are standard errors, of a difference those of the differences paired by seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    buckets = [n for n in range(_BUCKETS) if _bucket(n) in comparison.estimates]
    first = comparison.variants[0]
    for variant in comparison.variants:
        means, changes = [], []
        for n in buckets:
            found, change = (
                comparison.estimates[_bucket(n)],
                comparison.difference(_bucket(n), variant),
            )
            if variant in found:
                means.append(_point(n, found[variant], 1.0))
            if change is not None:
                changes.append(_point(n, change, 100 / found[first].mean))
        _draw_curve(losses, means, variant)
        _draw_curve(differences, changes, variant)
    losses.set_yscale("log")
    differences.axhline(0, color="0.5", linewidth=0.8)
    for panel, label in ((losses, "held-out loss"), (differences, f"difference, % of {first}")):
        panel.set_xlabel("model time, 1 is noise")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=7)
    return figure


def _point(bucket: int, estimate: Estimate, scale: float) -> tuple[float, float, float]:
    """Middle of the bucket, mean and standard error."""
    time = (bucket + 0.5) / _BUCKETS
    return time, scale * estimate.mean, scale * (estimate.standard_error or 0.0)


def _draw_curve(panel: Any, points: Sequence[tuple[float, float, float]], label: str) -> None:
    if points:
        times, means, errors = zip(*points, strict=True)
        panel.errorbar(times, means, yerr=errors, label=label, marker=".", linewidth=1.2, capsize=2)


def _bucket(number: int) -> str:
    return f"held_out_loss_t{number}"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def _definitions(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{rows}</dl>"


def _problems(heading: str, found: Mapping[str, str]) -> str:
    if not found:
        return ""
    items = "".join(
        f"<li><strong>{escape(name)}</strong>: {escape(why)}</li>" for name, why in found.items()
    )
    return f"<section><h2>{heading}</h2><ul>{items}</ul></section>"


def _table(comparison: Comparison, order: Sequence[str]) -> str:
    first, *others = comparison.variants
    heads = [first, *(h for name in others for h in (name, f"{name} − {first}"))]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("metric", *heads))
    rows = []
    for metric in order:
        found = comparison.estimates[metric]
        cells = [_cell(found.get(first))]
        for name in others:
            cells += [_cell(found.get(name)), _cell(comparison.difference(metric, name))]
        meaning = escape(MEANINGS.get(metric, ""))
        rows.append(
            f'<tr><th scope="row"><code>{escape(metric)}</code><br>'
            f'<span class="soft">{meaning}</span></th>{"".join(cells)}</tr>'
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td>–</td>"
    seeds = ", ".join(f"{seed}: {value:.4g}" for seed, value in estimate.values.items())
    return f'<td>{escape(str(estimate))}<br><span class="soft">{seeds}</span></td>'


def _picture(name: str, content: bytes) -> str:
    source = base64.b64encode(content).decode()
    return (
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{escape(name)}">'
        f'<img alt="{escape(name)}; its numbers are in the table" '
        f'src="data:image/png;base64,{source}"></div>'
        f'<figcaption class="soft">{escape(name)}</figcaption></figure>'
    )


def _outlier_links(runs: Sequence[PlannedRun], out: Path) -> str:
    pages = [(one.title, one.place / OUTLIERS / "report.html") for one in runs]
    items = "".join(
        f'<li><a href="{escape(page.relative_to(out).as_posix())}">{escape(title)}</a></li>'
        for title, page in pages
        if page.is_file()
    )
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"
