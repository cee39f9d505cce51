"""What a report of outlier findings shows, and in which order: its sections, figures and their captions.

Nothing is drawn here: a `Picture` carries the call that draws it, and what a reader who cannot see it
is told instead. A figure of which no target has the measure is left out. Colour scales are fixed
here, over all targets and timesteps of a figure and over the figures that are to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dsr_scale.evaluate import outlier_figures as figures
from dsr_scale.evaluate import outlier_maps as maps
from dsr_scale.evaluate.outlier_findings import Findings
from dsr_scale.evaluate.outlier_statistics import MEASURES
from dsr_scale.evaluate.outlier_wording import largest, number, present, sentence, time_name

_RULES = {
    "outlier_ratio": "both bounds",
    "outlier_ratio_mad": "6·1.4826·MAD",
    "outlier_ratio_sigma": "mean + 3σ",
    "outlier_ratio_median": "3·median",
}
"""Scale-free ones, which share an axis; the absolute rule may count every token."""
_RATIO_REACH = 4.0
"""Heat-maps of ratios to the median go so far at least: a network without outliers is dark."""
_PARTS = {
    "attention_registers": "registers",
    "attention_top_norm": "1 % largest norms",
    "attention_text": "text",
    "attention_special": "CLS",
    "attention_extra_key": "key of the bias, or off by one",
    "attention_rest": "other image tokens",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    file: str
    """Its name in the figures directory, without the ending."""
    title: str
    reading: str
    """How to read it."""
    main_number: str
    """For those who cannot see it."""
    draw: Callable[[], Figure]
    measure: str | None = None
    """Whose numbers stand below as a table."""


@dataclass(frozen=True)
class Fold:
    """Figures under a line that opens them."""

    line: str
    pictures: list[Picture]
    is_open: bool


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    text: str
    parts: Sequence[Picture | Fold]


def report_sections(findings: Sequence[Findings]) -> Iterator[Section]:
    """All sections in their order, also those without parts."""
    yield Section(
        "outliers",
        "Outliers by block and timestep",
        "Blocks from the first to the output, timesteps on both axes of time. Targets share a scale.",
        [
            *_heat_maps(findings, "outlier_ratio", twins=("outlier_ratio_without_channels",)),
            *_ratio_heat_maps(findings, ""),
            *_curves(
                findings, "outlier_rules", "Outlier ratio by other rules", _RULES, "share of tokens"
            ),
            *_heat_maps(findings, "outlier_ratio_absolute"),
        ],
    )
    yield Section(
        "channels",
        "Without the channels of largest energy",
        "Massive activations are a few channels that are huge on every token; outliers are tokens. What "
        "vanishes when the three channels of largest energy are left out was channels. Scales are those "
        "of the figures above.",
        [
            *_heat_maps(findings, "channel_energy_share"),
            *_heat_maps(findings, "outlier_ratio_without_channels", twins=("outlier_ratio",)),
            *_ratio_heat_maps(findings, "_without_channels"),
        ],
    )
    yield Section(
        "norms",
        "Norm maps",
        "Each map is one image at one block, in units of the map's median, with all channels and "
        "without the image's three of largest energy. All maps of the report share one linear and "
        f"one logarithmic scale. {_shown_images(findings)}",
        _folds(findings, partial(_norm_pictures, findings)),
    )
    yield Section(
        "histograms",
        "Histograms of norms",
        "",
        [
            Picture(
                "histograms",
                "Norms over the image's median",
                "One line per pictured block, over all tokens of all images; registers are dotted. An "
                "outlier is a bump far to the right; the outermost bins hold what is beyond.",
                largest(findings, "max_over_median"),
                partial(figures.histograms, findings),
            )
        ],
    )
    yield Section(
        "components",
        "Principal components",
        "The first three principal components of each map's own tokens, as lightness, yellow against "
        "blue and red against green. Colours tell which tokens of a map are alike; they mean nothing "
        "across maps. Where outliers dominate, the rest of a map is flat.",
        _folds(findings, _component_pictures),
    )
    yield Section(
        "attention", "Attention", "What image tokens attend to.", _attention_parts(findings)
    )
    yield Section(
        "positions",
        "Positions",
        "Outliers that always sit in the same places belong to the network, not to the image.",
        _position_parts(findings),
    )
    yield Section(
        "locality",
        "Local semantics",
        "What a token still knows of its own patch. Where outliers have taken over a token for other "
        "uses, their line lies below that of normal tokens.",
        _locality_parts(findings),
    )


def _heat_maps(
    findings: Sequence[Findings], measure: str, *, twins: tuple[str, ...] = (), log: bool = False
) -> list[Picture]:
    """A heat-map on a scale shared with the measures `twins`; none where no target has the measure."""
    if not present(findings, measure):
        return []
    shown = [found.measures[name] for name in (measure, *twins) for found in findings]
    scale = figures.colour_scale(shown, log=log, reach=_RATIO_REACH if log else 0)
    name = measure.replace("_", " ")
    return [
        Picture(
            measure,
            sentence(name),
            f"{sentence(MEASURES[measure])}. – is where the measure does not exist.",
            largest(findings, measure),
            partial(figures.heat_map, findings, measure, scale=scale, label=name),
            measure,
        )
    ]


def _ratio_heat_maps(findings: Sequence[Findings], ending: str) -> Iterator[Picture]:
    for measure in ("max_over_median", "top_over_median", "register_over_median"):
        twin = f"{measure}_without_channels" if not ending else measure
        yield from _heat_maps(findings, measure + ending, twins=(twin,), log=True)


def _curves(
    findings: Sequence[Findings],
    file: str,
    title: str,
    lines: dict[str, str],
    label: str,
    *,
    reading: str = "",
    log: bool = False,
    reference: float | None = None,
) -> list[Picture]:
    shown = {measure: name for measure, name in lines.items() if present(findings, measure)}
    if not shown:
        return []
    return [
        Picture(
            file,
            title,
            f"By block, bands are ± 1 standard error over images. {reading}",
            " ".join(f"{name}: {largest(findings, measure)}" for measure, name in shown.items()),
            partial(figures.curves, findings, lines, label=label, log=log, reference=reference),
        )
    ]


def _folds(
    findings: Sequence[Findings], pictures: Callable[[Sequence[Findings], int], list[Picture]]
) -> list[Picture | Fold]:
    """Pictures of each timestep, the first of them open; unfolded for encoders alone."""
    steps = max(figures.steps_of(found) for found in findings)
    folds: list[Picture | Fold] = []
    for step in range(steps):
        shown = [found for found in findings if step < figures.steps_of(found)]
        times = dict.fromkeys(time_name(found, step) for found in shown)
        line = " / ".join(time for time in times if time)
        drawn = pictures(shown, step)
        if drawn:
            folds += [Fold(line, drawn, is_open=not folds)] if line else drawn
    return folds


def _norm_pictures(
    findings: Sequence[Findings], shown: Sequence[Findings], step: int
) -> list[Picture]:
    kinds = (
        ("norm_maps", "all channels", maps.norm_maps),
        (
            "norm_maps_without_channels",
            "without the channels of largest energy",
            maps.norm_maps_without_channels,
        ),
    )
    everywhere = [
        maps.norms_over_median(norms)
        for found in findings
        for norms in (found.norm_maps, found.norm_maps_without_channels)
    ]
    return [
        _maps(
            f"{file}{ending}{_tag(shown, step)}",
            f"Norm maps, {which}, {name}",
            "Rows are images, columns blocks; the colour is the token's norm over the map's median.",
            [grid_of(found, step) for found in shown],
            figures.colour_scale(everywhere, log=log),
            "norm / median",
        )
        for ending, name, log in (("", "linear", False), ("_log", "logarithmic", True))
        for file, which, grid_of in kinds
    ]


def _component_pictures(shown: Sequence[Findings], step: int) -> list[Picture]:
    return [
        Picture(
            f"components{_tag(shown, step)}",
            "Principal components",
            "Rows are images, columns blocks.",
            largest(shown, "max_over_median"),
            partial(maps.map_figure, [maps.component_maps(found, step) for found in shown]),
        )
    ]


def _attention_parts(findings: Sequence[Findings]) -> list[Picture | Fold]:
    parts = {measure: name for measure, name in _PARTS.items() if present(findings, measure)}
    bars = Picture(
        "attention_mass",
        "Attention by block",
        "Of the attention of an image token, averaged over heads and image tokens: how much each group "
        "receives in all. No bar where the block has no attention, as for the output.",
        " ".join(f"{name}: {largest(findings, measure)}" for measure, name in parts.items()),
        partial(figures.attention_bars, findings, _PARTS),
    )
    return [
        *([bars] if parts else []),
        *_curves(
            findings,
            "attention_per_token",
            "Attention per token",
            {f"{measure}_per_token": name for measure, name in _PARTS.items()},
            "over uniform",
            reading="The same per token of a group; 1, dashed, is uniform attention. Far over it is a sink.",
            log=True,
            reference=1,
        ),
        *_heat_maps(findings, "attention_entropy"),
        *_heat_maps(findings, "cross_text_top"),
        *_heat_maps(findings, "cross_entropy"),
        *_folds(findings, partial(_attention_pictures, findings)),
    ]


def _attention_pictures(
    findings: Sequence[Findings], shown: Sequence[Findings], step: int
) -> list[Picture]:
    kinds = (
        (
            "attention_received",
            "Attention that image tokens receive",
            "From all image tokens, over uniform attention. A bright token is a sink.",
            maps.received_maps,
            [found.received_maps for found in findings],
        ),
        (
            "attention_of_largest",
            "Attention of the token of largest norm",
            "Where the circled token looks, times the number of image tokens. Colours end at a "
            "thousandth of the largest.",
            maps.top_maps,
            [maps.per_token(found.top_maps) for found in findings],
        ),
        (
            "attention_of_registers",
            "Attention of registers",
            "Where the first registers look, a row for each, times the number of image tokens. Colours "
            "end at a thousandth of the largest; blocks without registers are left out.",
            maps.register_maps,
            [maps.per_token(found.register_maps) for found in findings],
        ),
    )
    pictures = []
    for file, title, reading, grid_of, everywhere in kinds:
        grids = [grid for grid in (grid_of(found, step) for found in shown) if grid.maps.size]
        if grids:
            scale = figures.colour_scale(everywhere, log=True)
            name = f"{file}{_tag(shown, step)}"
            pictures.append(_maps(name, title, reading, grids, scale, "attention over uniform"))
    return pictures


def _position_parts(findings: Sequence[Findings]) -> list[Picture]:
    grids = [maps.position_maps(found) for found in findings]
    scale = figures.colour_scale([grid.maps for grid in grids], log=False)
    return [
        _maps(
            "positions",
            "Share of images with an outlier at each position",
            "Rows are timesteps, columns blocks. A bright position is an outlier in many images.",
            grids,
            scale,
            "share of images",
        ),
        *_curves(
            findings,
            "position_repeat",
            "Do outliers return to their positions?",
            {"position_repeat": "found", "position_chance": "by chance"},
            "probability",
            reading="The probability that an outlier's position is an outlier in another image too.",
        ),
        *_heat_maps(findings, "border_enrichment"),
    ]


def _locality_parts(findings: Sequence[Findings]) -> list[Picture]:
    kinds = (("outliers", "outliers"), ("normal", "other tokens"))
    return [
        *_curves(
            findings,
            "neighbour_cosine",
            "Cosine with the neighbours",
            {f"neighbour_cosine_{ending}": name for ending, name in kinds},
            "mean cosine",
        ),
        *_curves(
            findings,
            "patch_prediction",
            "Probe from a token to its patch",
            {f"patch_prediction_{ending}": name for ending, name in kinds},
            "R²",
            reading="1 is a perfect prediction, 0 no better than the mean, below 0 worse.",
        ),
    ]


def _maps(
    file: str,
    title: str,
    reading: str,
    grids: Sequence[maps.MapGrid],
    scale: Normalize,
    label: str,
) -> Picture:
    largest = "; ".join(
        f"{' '.join(grid.title.split())}: at most {number(float(np.nanmax(grid.maps)))}"
        for grid in grids
    )
    draw = partial(maps.map_figure, grids, scale=scale, label=label)
    return Picture(file, title, reading, f"{label}: {largest}.", draw)


def _tag(shown: Sequence[Findings], step: int) -> str:
    times = [found.timesteps[step].model for found in shown if found.timesteps]
    return f"_t{times[0]:g}" if times else ""


def _shown_images(findings: Sequence[Findings]) -> str:
    """The whole captions of the pictured images, which a figure cuts short."""
    captions = dict.fromkeys(caption for found in findings for caption in found.captions)
    return "Images shown: " + "; ".join(f"“{c}”" for c in captions) + "." if captions else ""
