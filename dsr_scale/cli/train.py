"""`dsr-scale train`: one process, torchrun and srun run the same command."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dsr_scale.base.errors import InputError
from dsr_scale.train import failing, signals


def train(
    config: Annotated[Path, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. training.steps=100")
    ] = None,
) -> None:
    """Train, or go on from the newest checkpoint of the run directory.

    What is trained the file says: a diffusion transformer, or with a section `decoder` a decoder.

    Ctrl-C, SIGTERM and SIGUSR1 save and exit with 128 + the signal's number; the same command goes on.
    Other exit statuses: 2 for what a person has to put right, 69 for encoder servers or ranks that
    could not be reached, 75 for a hang, 1 for any other error.
    """
    account = failing.Account()
    with signals.remembered_early(), _failures_recorded(account):
        from dsr_scale.config.load import load_any_run

        run = load_any_run(config, overrides or [])
        from dsr_scale.train.loop import train as train_run

        finished = train_run(run, account=account)
    if finished.stopped_by is not None:
        number = getattr(signal, finished.stopped_by, signal.SIGTERM)
        raise typer.Exit(128 + int(number))


@contextlib.contextmanager
def _failures_recorded(account: failing.Account) -> Iterator[None]:
    """Leaves this rank's account of an error; one of several ranks is gone at once then."""
    try:
        yield
    except Exception as error:
        status = failing.record(error, account)
        if not failing.has_others() and status != failing.OUTAGE_STATUS:
            raise
        _show(error)
        if failing.has_others():
            # Not by way of the interpreter's end, which waits for threads that wait for other ranks.
            os._exit(status)
        sys.exit(status)


def _show(error: Exception) -> None:
    from dsr_scale.cli.main import show_input_error

    if isinstance(error, InputError):
        show_input_error(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
