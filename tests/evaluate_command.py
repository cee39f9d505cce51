"""`dsr-scale evaluate` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from dsr_scale.cli.evaluate import evaluate

app = typer.Typer()
app.command()(evaluate)


def run(out: Path, *words: object) -> dict[str, Any]:
    """Runs the command on the CPU; returns its JSON. Raises what it raises.

    Every metric, with a number or without, must be named on the screen.
    """
    arguments = [*map(str, words), "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "evaluation.json").read_text())
    for name in (*report["metrics"], *report["not_computed"]):
        assert name in done.output
    return report
