"""Findings in words: names of blocks and times, numbers as they are printed, the largest and its place.

Figures, captions and tables of a report take them from here, so that a place has one name throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dsr_scale.evaluate.outlier_findings import Findings


def plain(text: str, most: int) -> str:
    """One printable line of at most `most` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def brief(value: float) -> str:
    """At most about six characters, for a cell of a heat-map."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def number(value: float) -> str:
    """Four digits, as in tables; a dash for what does not exist."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def sentence(text: str) -> str:
    """With a capital first letter; a measure that leans on the one before stands alone here."""
    text = text.removeprefix("… ")
    return text[0].upper() + text[1:]


def block_name(block: str) -> str:
    """Short enough for an axis: `blocks.3` is 3, `head.0` is h0, `output` is out."""
    if block == "output":
        return "out"
    return plain(block, 12).replace("blocks.", "").replace("head.", "h")


def time_name(found: Findings, step: int) -> str:
    """Both times of a timestep; empty for an encoder."""
    if not found.timesteps:
        return ""
    timestep = found.timesteps[step]
    return f"model time {timestep.model:.3g} (pre-shift {timestep.preshift:.3g})"


def place_name(found: Findings, place: tuple[int, int]) -> str:
    """Of a block and a timestep."""
    block, step = place
    return ", ".join(filter(None, [found.blocks[block], time_name(found, step)]))


def present(findings: Sequence[Findings], measure: str) -> bool:
    """Whether any of the targets has the measure anywhere."""
    return any(np.isfinite(found.measures[measure]).any() for found in findings)


def largest_place(values: np.ndarray) -> tuple[int, int] | None:
    """Block and step of the largest finite value of [L,S], the first of several; None for no value."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    block, step = np.unravel_index(np.where(finite, values, -math.inf).argmax(), values.shape)
    return int(block), int(step)


def varies(found: Findings, measure: str) -> bool:
    """Whether a measure has different values: a largest of equals is nowhere in particular."""
    values = found.measures[measure]
    return len(np.unique(values[np.isfinite(values)])) > 1


def largest(findings: Sequence[Findings], measure: str) -> str:
    """Each target's largest value and its place, in words."""
    phrases = []
    for found in findings:
        place = largest_place(found.measures[measure])
        value = "no value" if place is None else number(float(found.measures[measure][place]))
        where = (
            f" at {place_name(found, place)}"
            if place is not None and varies(found, measure)
            else ""
        )
        phrases.append(f"{found.name} at most {value}{where}")
    return "; ".join(phrases) + "."
