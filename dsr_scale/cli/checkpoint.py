"""`dsr-scale checkpoint`: which checkpoints a run has, and whether they are what was saved.

`ls` reads names, sizes and the run state; only `verify` reads every byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="List and verify checkpoints.", no_args_is_help=True)


@app.command("ls")
def list_checkpoints(
    run: Annotated[Path, typer.Argument(help="Run directory of dsr-scale train.")],
) -> None:
    """List a run's checkpoints: step, size, whether complete, date, layout that saved them."""
    from datetime import datetime

    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from dsr_scale.checkpoint import directory

    entries = sorted(directory.checkpoints_directory(run).glob("step_*"))
    if not entries:
        raise _nothing_in(run)
    unfinished = set(directory.partial_saves(run))
    table = Table("step", "size", "state", "saved", "tp×pp×dp · zero", title=str(run))
    for entry in entries:
        if entry in unfinished:
            state, layout = "unfinished", ""
        elif entry.suffix == directory.DAMAGED_SUFFIX:
            state, layout = "damaged, set aside", ""
        else:
            state, layout = _state_and_layout(entry)
        size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        saved = datetime.fromtimestamp(entry.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        step = entry.name.removeprefix("step_").partition(".")[0].lstrip("0") or "0"
        table.add_row(step, decimal(size), state, saved, layout)
    Console().print(table)


def _state_and_layout(checkpoint: Path) -> tuple[str, str]:
    from dsr_scale.base.errors import InputError
    from dsr_scale.checkpoint import directory

    try:
        layout: dict[str, Any] = directory.read_run_state(checkpoint).get("layout", {})
    except directory.DamagedError:
        return "damaged", ""
    except InputError as error:
        return error.found.partition(" in ")[0], ""
    if not layout:
        return "complete", ""
    tp, pp, dp, zero = (layout.get(key, "?") for key in ("tp", "pp", "dp", "zero"))
    return "complete", f"{tp}×{pp}×{dp} · {zero}"


@app.command("verify")
def verify(
    directory: Annotated[
        Path, typer.Argument(help="Run directory (all its checkpoints) or one checkpoint.")
    ],
) -> None:
    """Compare every byte with its checksum; name damaged files and end with status 1 if any is."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from dsr_scale.checkpoint.verification import verify as verify_checkpoint

    checkpoints, unfinished = _checkpoints_in(directory)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    damaged = 0
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    ) as bar:
        total = sum(path.stat().st_size for entry in checkpoints for path in entry.iterdir())
        task = bar.add_task("verifying", total=total)
        for checkpoint in checkpoints:
            problems = verify_checkpoint(checkpoint, lambda count: bar.advance(task, count))
            damaged += bool(problems)
            for problem in problems:
                console.print(f"{checkpoint}: {problem}", style="red", markup=False)
        # The run state, and what is missing or short, is not read as a stream.
        bar.update(task, completed=total)
    for entry in unfinished:
        console.print(f"{entry}: an unfinished save, never loaded", style="yellow", markup=False)
    typer.echo(f"{len(checkpoints) - damaged} of {len(checkpoints)} checkpoints intact")
    if damaged:
        raise typer.Exit(1)


def _checkpoints_in(path: Path) -> tuple[list[Path], list[Path]]:
    """Complete checkpoints and unfinished saves of a run, or the one checkpoint that `path` is."""
    from dsr_scale.checkpoint import directory

    if (path / ".metadata").is_file() or (path / directory.RUN_STATE_FILE).is_file():
        return [path], []
    complete = [directory.step_directory(path, step) for step in directory.complete_steps(path)]
    unfinished = directory.partial_saves(path)
    if not complete:
        raise _nothing_in(path)
    return complete, unfinished


def _nothing_in(path: Path) -> Exception:
    from dsr_scale.base.errors import InputError

    return InputError(
        found=f"no checkpoint in {path}",
        required="the directory of a run that saved, or of one of its checkpoints",
        remedy="check the path: checkpoints lie in RUN/checkpoints/step_…",
    )
