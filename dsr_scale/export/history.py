"""What a run's directory tells about one of its checkpoints: measures, the sample grid, packages.

All of it is optional: a run directory may have been cut down to its checkpoints, and then a bundle
says less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsr_scale.job.attempt import JOB_FILE, Attempt, jobs_directory
from dsr_scale.job.record import PACKAGES_FILE, RECORD_DIRECTORY
from dsr_scale.telemetry.metrics import METRICS_FILE, read_metrics
from dsr_scale.telemetry.token_norms import STATISTICS

_GRID = re.compile(r"step_(\d+)\.png")
_BY_BLOCK = re.compile(rf"({'|'.join(STATISTICS)})/([^/]+)/t\d+")


class Measured(NamedTuple):
    """A metric's last value."""

    value: float
    step: int


@dataclass(frozen=True)
class RunHistory:
    """A run up to the step of an exported checkpoint."""

    config: Mapping[str, Any]
    """The resolved run file."""
    metrics: Mapping[str, Measured]
    """By name, token norms of single blocks left out."""
    token_norms: Mapping[str, Mapping[str, float]]
    """Block → statistic → its largest value over timesteps, as measured last."""
    grid: Path | None
    """The newest picture of samples."""
    packages: str | None
    """`name==version` lines of the newest attempt that recorded them."""


def read_history(run_directory: Path, step: int, config: Mapping[str, Any]) -> RunHistory:
    """What happened in a run until `step` optimizer steps were done."""
    records: list[dict[str, Any]] = []
    if (run_directory / METRICS_FILE).is_file():
        records = [record for record in read_metrics(run_directory) if record["step"] <= step]
    return RunHistory(
        config=config,
        metrics=_last_values(records),
        token_norms=_token_norms(records),
        grid=_newest_grid(run_directory, step),
        packages=_recorded_packages(run_directory),
    )


def _last_values(records: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    return {
        name: Measured(value, record["step"])
        for record in records
        for name, value in record.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and not _BY_BLOCK.fullmatch(name)
    }


def _token_norms(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    for record in reversed(records):
        found: dict[str, dict[str, float]] = {}
        for name, value in record.items():
            match = _BY_BLOCK.fullmatch(name)
            if match and value is not None:
                block = found.setdefault(match[2], {})
                block[match[1]] = max(value, block.get(match[1], value))
        if found:
            return found
    return {}


def _newest_grid(run_directory: Path, step: int) -> Path | None:
    grids = {
        int(match[1]): path
        for path in run_directory.glob("grids/*.png")
        if (match := _GRID.fullmatch(path.name)) and int(match[1]) <= step
    }
    return grids[max(grids)] if grids else None


def _recorded_packages(run_directory: Path) -> str | None:
    attempts = [path.parent for path in jobs_directory(run_directory).glob(f"*/*/{JOB_FILE}")]
    for attempt in sorted(attempts, key=lambda path: Attempt.read(path).started, reverse=True):
        packages = attempt / RECORD_DIRECTORY / PACKAGES_FILE
        if packages.is_file():
            return packages.read_text()
    return None
