"""Means over seeds, their standard errors, and differences paired by seed.

Two variants of one seed share the order of the data and the noise, so the difference of one seed is
less noisy than either value: its standard error is that of the differences, not of two independent
means. With n seeds all errors have n − 1 degrees of freedom; for two seeds a 95 % interval is ±12.7
standard errors, so two seeds tell a large effect from none and no more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """Of n values, one of each seed."""

    values: dict[int, float]
    """Seed → value."""

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, from the sample's deviation; None for one seed."""
        if self.n < 2:
            return None
        return statistics.stdev(self.values.values()) / math.sqrt(self.n)

    def minus(self, other: Estimate) -> Estimate | None:
        """Differences of the seeds that both have; None where there is none."""
        shared = [seed for seed in self.values if seed in other.values]
        if not shared:
            return None
        return Estimate({seed: self.values[seed] - other.values[seed] for seed in shared})

    def to_json(self) -> dict[str, Any]:
        """Everything a reader needs to compute it again."""
        return {
            "n": self.n,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "by_seed": {str(seed): value for seed, value in self.values.items()},
        }

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{_number(self.mean)} (n=1)"
        return f"{_number(self.mean)} ± {_number(self.standard_error, digits=2)} (n={self.n})"


@dataclass(frozen=True)
class Comparison:
    """Variants in the order they were given; the first is what the others are compared with."""

    variants: tuple[str, ...]
    estimates: dict[str, dict[str, Estimate]]
    """Metric → variant → estimate, without those that have none."""

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]], variants: Sequence[str]) -> Comparison:
        """From the records of `measure_run`; `variants` name the order."""
        values: dict[str, dict[str, dict[int, float]]] = {}
        for record in records:
            for metric, value in record["metrics"].items():
                by_variant = values.setdefault(metric, {})
                by_variant.setdefault(record["variant"], {})[record["seed"]] = value
        estimates = {
            metric: {
                variant: Estimate(by_variant[variant])
                for variant in variants
                if variant in by_variant
            }
            for metric, by_variant in values.items()
        }
        return Comparison(tuple(variants), estimates)

    def difference(self, metric: str, variant: str) -> Estimate | None:
        """To the first variant, paired by seed; None for that one and where either is missing."""
        found = self.estimates[metric]
        first = self.variants[0]
        if variant == first or first not in found or variant not in found:
            return None
        return found[variant].minus(found[first])

    def to_json(self) -> dict[str, Any]:
        """Metric → variant → estimate and difference."""
        content: dict[str, Any] = {}
        for metric, by_variant in self.estimates.items():
            content[metric] = {}
            for variant, estimate in by_variant.items():
                difference = self.difference(metric, variant)
                content[metric][variant] = {
                    **estimate.to_json(),
                    "difference": None if difference is None else difference.to_json(),
                }
        return content

    def markdown(self, metrics: Sequence[str] | None = None) -> str:
        """A row for each metric, two columns for each variant but the first."""
        first, *others = self.variants
        heads = [first, *(cell for name in others for cell in (name, f"{name} − {first}"))]
        lines = [
            "| metric | " + " | ".join(heads) + " |",
            "|---|" + "---|" * len(heads),
        ]
        for metric in self.estimates if metrics is None else metrics:
            found = self.estimates.get(metric)
            if not found:
                continue
            cells = [_cell(found.get(first))]
            for name in others:
                cells += [_cell(found.get(name)), _cell(self.difference(metric, name))]
            lines.append(f"| `{metric}` | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _cell(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _number(value: float, digits: int = 4) -> str:
    """Four digits, and as many as there are of whole numbers."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
