"""The environment, the JSON file and the table of a benchmark."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.protocol import Report, Row

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy")


def environment() -> dict[str, Any]:
    """What the ratios may depend on; read it before and after, for the load changes."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "revision": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def as_json(
    name: str, report: Report, before: dict[str, Any], after: dict[str, Any], rounds: int
) -> str:
    """Everything that was measured, round by round, and what it was measured on."""
    content = {
        "benchmark": name,
        "rounds": rounds,
        "environment": before,
        "load_average_after": after["load_average"],
        "facts": report.facts,
        "rows": [_row(row) for row in report.rows],
        "samples": report.samples,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "metric": row.metric,
        "ratio": row.ratio,
        "interval": [row.low, row.high],
        "aa_spread": row.spread,
        "effect": row.effect,
        "aim": None if row.aim is None else str(row.aim),
        "meets_aim": row.meets_aim,
    }


def print_table(name: str, report: Report, console: Console) -> None:
    """The rows, one line each."""
    table = Table(title=name, title_justify="left")
    for column in ("comparison", "metric", "ratio", "95 % interval", "effect", "aim", "met"):
        table.add_column(column, justify="left" if column in ("comparison", "metric") else "right")
    for row in report.rows:
        table.add_row(
            row.name,
            row.metric,
            f"{row.ratio:.3f}",
            f"{row.low:.3f} – {row.high:.3f}" if not math.isclose(row.low, row.high) else "",
            row.effect,
            "" if row.aim is None else str(row.aim),
            {None: "", True: "yes", False: "no"}[row.meets_aim],
            style="dim" if row.is_twin else None,
        )
    console.print(table)
    for fact, value in report.facts.items():
        console.print(f"{fact}: {value}", highlight=False, soft_wrap=True, style="dim")
