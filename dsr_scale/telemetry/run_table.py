"""Runs as rows of a table in the terminal.

A row is made from the end of a run's metrics file alone, so that a directory of hundreds of long runs
lists at once; curves, which need all of the file, belong to `terminal_curves`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from dsr_scale.telemetry.metrics import METRICS_FILE

RunStatus = Literal["running", "finished", "stopped"]

STYLES: dict[RunStatus, str] = {"running": "green", "finished": "cyan", "stopped": "yellow"}

_WIDE = 100
_TAIL_BYTES = 1 << 16
_INTERVAL_KEY = "images_per_s"
"""Only records of an interval have it; those of a skipped step do not."""


@dataclass(frozen=True)
class RunRow:
    """One run as the table shows it."""

    name: str
    """Path below the listed directory, which is what `runs show` takes."""
    status: RunStatus
    step: int | None
    """Last logged or saved step; None before the first."""
    steps: int | None
    """Of the whole run; None where config.yaml cannot be read."""
    loss: float | None
    images_per_s: float | None
    checkpoint_step: int | None
    """Of the newest complete checkpoint."""
    checkpoint_age_s: float | None
    restarts: int | None
    """Attempts of all its jobs but the first; None without a launcher."""
    action: str | None
    """What was decided when the last attempt ended, from its outcome.json."""
    reason: str | None
    cause: str | None
    active_s: float
    """When it last wrote something, in seconds since the epoch."""


def newest_record(run_directory: Path) -> dict[str, Any]:
    """The last whole record of an interval in the metrics file, read from its end.

    In the order of the file, not of steps: after a crash the step goes back. Empty without one.
    """
    path = run_directory / METRICS_FILE
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = _TAIL_BYTES
        while True:
            start = max(0, size - length)
            file.seek(start)
            # The first line of a tail is a part of one, and no JSON.
            for line in reversed(file.read(size - start).split(b"\n")):
                record = _parsed(line)
                if _INTERVAL_KEY in record:
                    return record
            if not start:
                return {}
            length *= 8


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def run_table(rows: Sequence[RunRow], *, width: int) -> Table:
    """One line per run; names too long for a terminal of `width` columns fold."""
    table = Table(
        box=None, padding=(0, 1 if width < _WIDE else 2, 0, 0), pad_edge=False, header_style="bold"
    )
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for heading in ("step", "loss", "images/s", "checkpoint", "restarts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.name),
            Text(row.status, style=STYLES[row.status]),
            progress(row.step, row.steps),
            number(row.loss),
            number(row.images_per_s),
            saved(row),
            "–" if row.restarts is None else str(row.restarts),
        )
    return table


def cause_lines(rows: Sequence[RunRow]) -> list[Text]:
    """One line for each run whose last attempt ended before the run: the cause, and what was decided."""
    return [
        Text.assemble(
            (f"{row.name}: ", "bold"), (_first_line(row.cause), "red"), (decision(row), "dim")
        )
        for row in rows
        if row.cause and row.action != "finished"
    ]


def decision(row: RunRow) -> str:
    """` → requeue: saved before the time limit`; empty when nothing was decided."""
    parts = [_first_line(part) for part in (row.action, row.reason) if part]
    return f" → {': '.join(parts)}" if parts else ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def progress(step: int | None, steps: int | None) -> str:
    """`300/1000`."""
    return f"{'–' if step is None else step}/{'?' if steps is None else short_count(steps)}"


def saved(row: RunRow) -> str:
    """Step and age of the newest checkpoint: `300, 4m`."""
    if row.checkpoint_step is None or row.checkpoint_age_s is None:
        return "none"
    return f"{row.checkpoint_step}, {age(row.checkpoint_age_s)}"


def short_count(count: int) -> str:
    """`100k` and `2.5M` for round counts, all digits for others."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size and count % (size // 10) == 0:
            return f"{count / size:g}{unit}"
    return str(count)


def number(value: float | None) -> str:
    """Four significant digits; thousands stay whole."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def age(seconds: float) -> str:
    """Whole units, two digits where possible: `45s`, `12m`, `30h`, `9d`."""
    seconds = max(0.0, seconds)
    for size_s, unit, most in ((1, "s", 100), (60, "m", 100), (3600, "h", 48)):
        if seconds < size_s * most:
            return f"{int(seconds / size_s)}{unit}"
    return f"{int(seconds / 86400)}d"
