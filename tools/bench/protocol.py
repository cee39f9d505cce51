"""How every benchmark measures: variants interleaved in one run, medians, and an A/A row.

    round 1   A A' B C  C B A' A      a variant's value is the mean of its two visits, so that a
    round 2   A A' B C  C B A' A      machine that slows down evenly slows all of them alike
    …

A ratio is taken inside a round; what is reported is the median over rounds with its interval, the
order statistics that hold the true median with a probability of 95 %. A' does what A does. How far
from 1 the interval of A'/A reaches is the spread, and a ratio that is no further away is noise.

A benchmark may measure anything: a sample is a mapping from a metric's name to a number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LEAST_ROUNDS = 9

Sample = dict[str, float]
"""Metric → value of one visit: `wall_s`, `cpu_s`, or what the benchmark compares."""

Variant = Callable[[], Sample]
Samples = dict[str, list[Sample]]
"""Variant → its sample of every round."""


class Settings(NamedTuple):
    """What the command line decides for every benchmark."""

    rounds: int
    scratch: Path
    """An existing directory for files that a benchmark makes and removes."""
    tiny: bool = False
    """Sizes at which the code runs in a second and no number means anything."""


class Aim(NamedTuple):
    """The ratios that are good enough, both ends included."""

    low: float = 0.0
    high: float = math.inf

    def __str__(self) -> str:
        if self.low == 0:
            return f"≤ {self.high:g}"
        if self.high == math.inf:
            return f"≥ {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


class Comparison(NamedTuple):
    """A variant's metric over that of its reference."""

    name: str
    metric: str
    variant: str
    reference: str
    twins: tuple[str, str]
    """Two variants that do the same: their ratio is the A/A row."""
    aim: Aim | None = None


class Row(NamedTuple):
    """A comparison's outcome."""

    name: str
    metric: str
    ratio: float
    low: float
    high: float
    spread: float
    """Of the A/A row; 0 for what was counted instead of timed."""
    aim: Aim | None = None
    is_twin: bool = False

    @property
    def is_noise(self) -> bool:
        """Whether the A/A row differs from 1 as much."""
        return abs(self.ratio - 1) <= self.spread

    @property
    def meets_aim(self) -> bool | None:
        """None without an aim."""
        return None if self.aim is None else self.aim.low <= self.ratio <= self.aim.high

    @property
    def effect(self) -> str:
        """The difference to the reference in words."""
        if self.is_twin:
            return "A/A"
        if self.spread and self.is_noise:
            return "noise"
        return f"{100 * (self.ratio - 1):+.1f} %"


class Report(NamedTuple):
    """What a benchmark found."""

    rows: list[Row]
    samples: Samples
    facts: dict[str, object]
    """Sizes, and whatever explains the rows."""


def timed(action: Callable[[], object], finish: Callable[[], object] | None = None) -> Sample:
    """Wall time of `action`, and CPU time of all threads of this process.

    `finish` waits for work that `action` left under way, before and after.
    """
    if finish is not None:
        finish()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if finish is not None:
        finish()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def interleave(variants: Mapping[str, Variant], rounds: int, *, warmup: int = 1) -> Samples:
    """Visits the variants there and back in every round; `warmup` rounds are not kept."""
    kept: Samples = {name: [] for name in variants}
    order = [*variants, *reversed(list(variants))]
    for number in range(warmup + rounds):
        visits: dict[str, list[Sample]] = {name: [] for name in variants}
        for name in order:
            visits[name].append(variants[name]())
        if number >= warmup:
            for name, (first, second) in visits.items():
                kept[name].append({key: (first[key] + second[key]) / 2 for key in first})
    return kept


def compare(samples: Samples, comparisons: Sequence[Comparison]) -> list[Row]:
    """The rows of all comparisons; those that share an A/A row stand below it."""
    rows: list[Row] = []
    for metric, twins in dict.fromkeys((each.metric, each.twins) for each in comparisons):
        low, middle, high = interval(_ratios(samples, metric, *twins))
        spread = max(abs(low - 1), abs(high - 1))
        rows.append(Row(f"A/A: {twins[0]}", metric, middle, low, high, spread, is_twin=True))
        for each in comparisons:
            if (each.metric, each.twins) == (metric, twins):
                ratios = _ratios(samples, metric, each.variant, each.reference)
                low, middle, high = interval(ratios)
                rows.append(Row(each.name, metric, middle, low, high, spread, each.aim))
    return rows


def counted(name: str, metric: str, ratio: float, aim: Aim | None = None) -> Row:
    """The row of a ratio that has no noise."""
    return Row(name, metric, ratio, ratio, ratio, 0.0, aim)


def _ratios(samples: Samples, metric: str, variant: str, reference: str) -> list[float]:
    pairs = zip(samples[variant], samples[reference], strict=True)
    return [above[metric] / below[metric] for above, below in pairs]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, median and upper end: the innermost pair of order statistics between which the true
    median lies with a probability of at least 95 %, or the extremes of fewer than six values."""
    ordered = sorted(values)
    count, outside, below = len(ordered), 0, 0.0
    while outside < (count - 1) // 2:
        below += math.comb(count, outside) / 2**count
        if below > 0.025:
            break
        outside += 1
    place = max(outside - 1, 0)
    return ordered[place], statistics.median(ordered), ordered[count - 1 - place]
