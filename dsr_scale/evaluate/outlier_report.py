"""The report of outlier findings: one HTML page that needs nothing beside it, and PNGs for papers.

The page holds its pictures itself and forbids every other source by its own security policy, so it
can be mailed, kept for years and opened anywhere; the price is a file of some megabytes. Nothing in it
runs: what is folded away are `details` elements, which work from the keyboard. Every heat-map has its
numbers as a table for those who cannot see it. Names and captions are other people's text, and escaped.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

import dsr_scale
from dsr_scale.base import atomic_files
from dsr_scale.evaluate import outlier_figures as figures
from dsr_scale.evaluate.outlier_findings import Findings
from dsr_scale.evaluate.outlier_sections import Picture, Section, report_sections
from dsr_scale.evaluate.outlier_statistics import MEASURES
from dsr_scale.evaluate.outlier_wording import (
    largest_place,
    number,
    place_name,
    present,
    time_name,
    varies,
)

REPORT_FILE = "report.html"
FIGURES_DIRECTORY = "figures"
_CSS_PIXELS_PER_INCH = 96
_STEMS = (
    *MEASURES,
    "attention_mass",
    "attention_of_largest",
    "attention_of_registers",
    "attention_per_token",
    "attention_received",
    "components",
    "histograms",
    "neighbour_cosine",
    "norm_maps",
    "norm_maps_log",
    "norm_maps_without_channels",
    "norm_maps_without_channels_log",
    "outlier_rules",
    "patch_prediction",
    "positions",
)
_FIGURE_FILE = re.compile(rf"({'|'.join(_STEMS)})(_t[0-9.e+-]+)?\.png")
"""Names that a report gives its figures; `_t` and a time follow where each timestep has its own."""


def write_report(findings: Sequence[Findings], out: Path) -> Path:
    """Writes `report.html` and `figures/*.png` of one or more targets into the directory `out`.

    Targets stand side by side, timesteps paired by their order. Figures that an earlier report left in
    `out`, perhaps of other timesteps, are removed. Returns the path of the page.
    """
    sections = [section for section in report_sections(findings) if section.parts]
    _remove_figures(out / FIGURES_DIRECTORY)
    contents = [("summary", "Summary"), *((s.anchor, s.title) for s in sections)]
    template = resources.files("dsr_scale.evaluate").joinpath("outlier_report.html")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape("Outliers: " + " · ".join(found.name for found in findings)),
        targets="".join(_target_card(found) for found in findings),
        contents="".join(f'<li><a href="#{a}">{escape(title)}</a></li>' for a, title in contents),
        summary=_summary_table(findings),
        sections="\n".join(_section_html(section, findings, out) for section in sections),
        version=dsr_scale.__version__,
        dpi=figures.DPI,
    )
    path = out / REPORT_FILE
    # A lone surrogate in a caption has no UTF-8.
    atomic_files.write_bytes(path, page.encode(errors="replace"))
    return path


def _remove_figures(directory: Path) -> None:
    """Removes figures of any report, and nothing else that lies there."""
    with atomic_files.storage_errors(directory):
        for path in directory.glob("*.png"):
            if _FIGURE_FILE.fullmatch(path.name):
                path.unlink()


def _worst_place(found: Findings) -> tuple[int, int]:
    """Where the outlier ratio is largest; among equals, where max/median is."""
    ratio, norms = (
        np.nan_to_num(found.measures[measure], nan=-1)
        for measure in ("outlier_ratio", "max_over_median")
    )
    block, step = max(np.ndindex(ratio.shape), key=lambda place: (ratio[place], norms[place]))
    return block, step


def _target_card(found: Findings) -> str:
    height, width = found.grid
    times = ", ".join(f"{t.model:.3g} ({t.preshift:.3g})" for t in found.timesteps)
    facts = {
        "kind": "diffusion transformer" if found.kind == "diffusion" else "encoder",
        "images": found.images,
        "blocks": f"{len(found.blocks) - 1} and the output",
        "token grid": f"{height} × {width}",
        **({"model time (pre-shift)": times} if times else {}),
        **found.settings,
    }
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_setting(value))}</dd>"
        for key, value in facts.items()
    )
    return f"<section><h3>{escape(found.name)}</h3><dl>{rows}</dl></section>"


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _summary_table(findings: Sequence[Findings]) -> str:
    worst = [_worst_place(found) for found in findings]
    heads = "".join(
        f'<th colspan="2" scope="colgroup">{escape(found.name)}</th>' for found in findings
    )
    places = "".join(
        '<th scope="col">largest</th><th scope="col">at the worst place<br>'
        f'<span class="soft">{escape(place_name(found, place))}</span></th>'
        for found, place in zip(findings, worst, strict=True)
    )
    rows = []
    for measure, meaning in MEASURES.items():
        if not present(findings, measure):
            continue
        cells = []
        for found, place in zip(findings, worst, strict=True):
            largest = largest_place(found.measures[measure])
            where = ""
            if largest is not None and varies(found, measure):
                where = escape(place_name(found, largest))
            cells.append(
                f'<td>{_with_error(found, measure, largest)}<br><span class="soft">{where}</span></td>'
                f"<td>{_with_error(found, measure, place)}</td>"
            )
        rows.append(
            f'<tr><th scope="row"><code>{measure}</code><br><span class="soft">'
            f"{escape(meaning)}</span></th>{''.join(cells)}</tr>"
        )
    return (
        f'<table><thead><tr><th rowspan="2" scope="col">measure</th>{heads}</tr><tr>{places}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _with_error(found: Findings, measure: str, place: tuple[int, int] | None) -> str:
    if place is None:
        return "–"
    value = number(float(found.measures[measure][place]))
    error = float(found.errors[measure][place]) if measure in found.errors else math.nan
    return value if math.isnan(error) else f"{value} ± {error:.2g}"


def _section_html(section: Section, findings: Sequence[Findings], out: Path) -> str:
    parts = []
    for part in section.parts:
        if isinstance(part, Picture):
            parts.append(_figure_html(part, findings, out))
            continue
        inside = "".join(_figure_html(picture, findings, out) for picture in part.pictures)
        state = " open" if part.is_open else ""
        parts.append(f"<details{state}><summary>{escape(part.line)}</summary>{inside}</details>")
    return (
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>'
        f"<p>{escape(section.text)}</p>{''.join(parts)}</section>"
    )


def _figure_html(picture: Picture, findings: Sequence[Findings], out: Path) -> str:
    figure = picture.draw()
    content = figures.png(figure)
    path = f"{FIGURES_DIRECTORY}/{picture.file}.png"
    atomic_files.write_bytes(out / path, content)
    width, height = (round(_CSS_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    title = escape(picture.title)
    table = "" if picture.measure is None else _numbers_table(picture.measure, findings)
    return (
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{title}">'
        f'<img width="{width}" height="{height}" alt="{title}. {escape(picture.main_number)}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode()}"></div>'
        f"<figcaption><strong>{title}.</strong> {escape(picture.reading)} "
        f'<span class="soft">{escape(path)}</span>{table}</figcaption></figure>'
    )


def _numbers_table(measure: str, findings: Sequence[Findings]) -> str:
    """A folded table per target: blocks downwards, timesteps across."""
    tables = []
    for found in findings:
        heads = [time_name(found, step) for step in range(figures.steps_of(found))]
        head = "".join(f'<th scope="col">{escape(time or "value")}</th>' for time in heads)
        rows = "".join(
            f'<tr><th scope="row">{escape(block)}</th>'
            + "".join(f"<td>{number(value)}</td>" for value in values)
            + "</tr>"
            for block, values in zip(found.blocks, found.measures[measure].tolist(), strict=True)
        )
        tables.append(
            f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(found.name)}">'
            f'<table><caption>{escape(found.name)}</caption><thead><tr><th scope="col">block</th>'
            f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return f"<details><summary>Numbers</summary>{''.join(tables)}</details>"
