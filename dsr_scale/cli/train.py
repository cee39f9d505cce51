"""`dsr-scale train`: one process, torchrun and srun run the same command."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. training.steps=100")
    ] = None,
) -> None:
    """Train, or go on from the newest checkpoint of the run directory.

    Ctrl-C and SIGTERM save and exit with 128 + the signal's number; the same command goes on.
    """
    from dsr_scale.config.load import load_run

    run = load_run(config, overrides or [])
    from dsr_scale.train.loop import train as train_run

    finished = train_run(run)
    if finished.stopped_by is not None:
        number = getattr(signal, finished.stopped_by, signal.SIGTERM)
        raise typer.Exit(128 + int(number))
