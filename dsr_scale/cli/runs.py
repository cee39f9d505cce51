"""`dsr-scale runs`: which runs there are and how they do, and one run's curves, in the terminal.

Everything is read from files of the run directories, so it works on a login node, without torch and
without asking Slurm, for runs of anyone who shares the disk. `runs DIR` lists and `runs show RUN`
draws: a first word that is no subcommand stands for `runs ls` with it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.text import Text

    from dsr_scale.job.attempt import Attempt
    from dsr_scale.telemetry.run_table import RunRow, RunStatus
    from dsr_scale.telemetry.terminal_curves import Curve

CONFIG_FILE = "config.yaml"
SHOWN_ATTEMPTS = 8
SUMMARY_ROWS = 12
"""What a screen keeps free for the summary under curves."""
PANEL_ROWS = (7, 14)
"""Fewest and most rows of one curve."""


class _ListsByDefault(TyperGroup):
    """`runs DIR` is `runs ls DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["ls", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListsByDefault,
    help="Show training runs: `runs DIR` lists them, `runs show RUN` draws one.",
    no_args_is_help=True,
    subcommand_metavar="DIR | show RUN",
)


class AttemptRecord(NamedTuple):
    """One start of a run's trainers, and how it ended."""

    attempt: Attempt
    outcome: dict[str, Any]
    """Content of outcome.json: action, reason, cause and more; empty while it runs."""


@app.command("ls")
def list_runs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory, or any directory above some.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List all runs under a directory, newest activity first; `runs DIR` does the same.

    Restarts are all attempts but the first, over every job of a run: requeues, restarts in place and
    jobs submitted again. Age of a checkpoint counts from its save.
    """
    _require_directory(directory)
    now_s = time.time()
    rows = [
        read_run(path, name=_name_below(directory, path), now_s=now_s)
        for path in run_directories(directory)
    ]
    if not rows:
        raise _no_run_in(directory, "a directory with runs in it, at any depth")
    rows.sort(key=lambda row: row.active_s, reverse=True)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console

    from dsr_scale.telemetry.run_table import cause_lines, run_table

    console = Console(highlight=False)
    console.print(run_table(rows, width=console.width))
    for number, line in enumerate(cause_lines(rows)):
        console.print(*(() if number else ("\n",)), line, sep="", soft_wrap=True)


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Metric to draw, in metrics.jsonl; may be given again."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Write the curves as a picture too."),
    ] = None,
) -> None:
    """Draw a run's curves over steps, restarts dotted, and sum it up.

    Without --metric: loss, gradient_norm and images_per_s.
    """
    from rich.console import Console

    from dsr_scale.telemetry import terminal_curves
    from dsr_scale.telemetry.metrics import METRICS_FILE, read_metrics

    _require_directory(run)
    if not is_run(run):
        raise _no_run_in(run, f"a run directory: {CONFIG_FILE} with {METRICS_FILE} or checkpoints")
    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    curves = _chosen_curves(records, metrics, run)
    restarts = terminal_curves.restart_steps(records)
    console = Console(highlight=False)
    if curves:
        # Where output is no terminal, it is as if the screen were tall enough.
        room = (console.height - SUMMARY_ROWS) // len(curves) if console.is_terminal else 9
        height = min(max(room, PANEL_ROWS[0]), PANEL_ROWS[1])
        width = console.width
        console.print(
            terminal_curves.draw(curves, restarts, width=width, height=height), end="\n\n"
        )
        if png is not None:
            terminal_curves.curves_picture(curves, restarts, str(run), png)
    for line in _summary(run, records):
        console.print(line, soft_wrap=True)


def _chosen_curves(
    records: Sequence[dict[str, Any]], wanted: Sequence[str] | None, run: Path
) -> list[Curve]:
    from dsr_scale.base.errors import InputError
    from dsr_scale.telemetry.terminal_curves import DEFAULT_METRICS, curve, metrics_in

    known = metrics_in(records)
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise InputError(
            found=f"no metric {', '.join(unknown)} in {run}",
            required="metrics that the run logged as numbers: " + (", ".join(known) or "none yet"),
            remedy="choose among these with --metric",
        )
    curves = [curve(records, name) for name in wanted or DEFAULT_METRICS if name in known]
    return [one for one in curves if one.steps]


def is_run(path: Path) -> bool:
    """Whether a training run was started in this directory and wrote something."""
    from dsr_scale.checkpoint.directory import checkpoints_directory
    from dsr_scale.telemetry.metrics import METRICS_FILE

    wrote = (path / METRICS_FILE).is_file() or checkpoints_directory(path).is_dir()
    return wrote and (path / CONFIG_FILE).is_file()


def run_directories(directory: Path) -> Iterator[Path]:
    """All run directories at and below `directory`; runs are not searched for others."""
    for place, below, _ in os.walk(directory):
        if is_run(Path(place)):
            below.clear()
            yield Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _name_below(directory: Path, run: Path) -> str:
    return run.resolve().name if run == directory else str(run.relative_to(directory))


def read_run(run: Path, *, name: str, now_s: float) -> RunRow:
    """The row of one run; `now_s` in seconds since the epoch, against which ages are counted.

    Running is whose lock has its time in the future, which its holder keeps moving; finished, whose last step is saved; anything else has stopped.
    """
    from dsr_scale.checkpoint import directory
    from dsr_scale.job.run_lock import LOCK_FILE
    from dsr_scale.telemetry.metrics import METRICS_FILE
    from dsr_scale.telemetry.run_table import RunRow, newest_record

    record = newest_record(run)
    steps = _steps_of(run)
    saved = directory.complete_steps(run)
    saved_s = _changed_s(directory.step_directory(run, saved[-1])) if saved else None
    status: RunStatus = "finished" if saved and saved[-1] == steps else "stopped"
    if _changed_s(run / LOCK_FILE) > now_s:
        status = "running"
    attempts = attempts_in(run)
    outcome = attempts[-1].outcome if attempts else {}
    written = (run / METRICS_FILE, run / CONFIG_FILE, directory.checkpoints_directory(run))
    logged = record.get("step")
    return RunRow(
        name=name,
        status=status,
        step=logged if logged is not None else (saved[-1] if saved else None),
        steps=steps,
        loss=record.get("loss"),
        images_per_s=record.get("images_per_s"),
        checkpoint_step=saved[-1] if saved else None,
        checkpoint_age_s=None if saved_s is None else now_s - saved_s,
        restarts=len(attempts) - 1 if attempts else None,
        action=_text(outcome.get("action")),
        reason=_text(outcome.get("reason")),
        cause=_text(outcome.get("cause")),
        active_s=max(_changed_s(path) for path in written),
    )


def _steps_of(run: Path) -> int | None:
    """`training.steps` of the resolved run file, whatever version wrote the rest of it."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.yaml_text import parse_yaml

    try:
        values = parse_yaml((run / CONFIG_FILE).read_text(), CONFIG_FILE)
        steps = values["training"]["steps"]
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _changed_s(path: Path) -> float:
    """Time of the last change; 0 without the file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(value: Any) -> str | None:
    return str(value) if value else None


def attempts_in(run: Path) -> list[AttemptRecord]:
    """All attempts of all jobs in the order they began; unreadable ones are passed over."""
    from dsr_scale.job.attempt import Attempt, attempts_of, jobs_directory

    if not jobs_directory(run).is_dir():
        return []
    found = []
    for job in jobs_directory(run).iterdir():
        for place in attempts_of(run, job.name):
            try:
                attempt = Attempt.read(place)
            except (OSError, ValueError, TypeError, KeyError):
                continue
            found.append(AttemptRecord(attempt, _outcome(place)))
    return sorted(found, key=lambda record: (record.attempt.started, record.attempt.number))


def _outcome(attempt: Path) -> dict[str, Any]:
    from dsr_scale.job.policy import OUTCOME_FILE

    try:
        content = json.loads((attempt / OUTCOME_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _summary(run: Path, records: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """One line per fact; what a run does not know is left out."""
    from rich.text import Text

    from dsr_scale.telemetry.run_table import STYLES, number, progress, saved

    row = read_run(run, name=str(run), now_s=time.time())

    def newest(key: str) -> Any:
        return next((r[key] for r in reversed(records) if r.get(key) is not None), None)

    seen, unusable, slowest = map(newest, ("samples_seen", "corrupt_seen", "slowest_node"))
    over = newest("slowest_over_median")
    facts = (
        ("run", row.name, "bold"),
        ("state", row.status, STYLES[row.status]),
        ("steps", progress(row.step, row.steps), ""),
        ("samples seen", None if seen is None else f"{seen:,}", ""),
        ("loss", None if row.loss is None else number(row.loss), ""),
        ("images/s", None if row.images_per_s is None else number(row.images_per_s), ""),
        ("checkpoint", saved(row), ""),
        ("skipped steps", newest("skipped_steps"), ""),
        ("unusable", None if unusable is None else f"{unusable} images", ""),
        ("slowest node", slowest if over is None else f"{slowest}, {over:.2f} × median", ""),
    )
    for label, value, style in facts:
        if value is not None:
            yield Text.assemble((f"{label:<15}", "dim"), (str(value), style))
    yield from _attempt_lines(attempts_in(run))


def _attempt_lines(attempts: Sequence[AttemptRecord]) -> Iterator[Text]:
    from rich.text import Text

    if not attempts:
        return
    yield Text.assemble((f"{'attempts':<15}", "dim"), str(len(attempts)))
    if len(attempts) > SHOWN_ATTEMPTS:
        yield Text(f"  {len(attempts) - SHOWN_ATTEMPTS} earlier ones not shown", "dim")
    for attempt, outcome in attempts[-SHOWN_ATTEMPTS:]:
        count = len(attempt.nodes)
        text = Text.assemble(
            f"  {attempt.started[:16].replace('T', ' ')}  job {attempt.job_id}, attempt ",
            f"{attempt.number}, {count} node{'s' if count != 1 else ''}",
        )
        if attempt.reason:
            text.append(f"  after {attempt.reason}", "dim")
        yield text
        cause = _text(outcome.get("cause"))
        decided = ": ".join(
            t for t in map(_text, (outcome.get("action"), outcome.get("reason"))) if t
        )
        if cause:
            yield Text(f"    {cause.splitlines()[0]}", "red")
        if decided:
            yield Text(f"    → {decided}", "dim")


def _require_directory(path: Path) -> None:
    from dsr_scale.base.errors import InputError

    if not path.is_dir():
        raise InputError(
            found=f"{path} is a file" if path.exists() else f"no directory {path}",
            required="a run directory, or one above some",
            remedy="check the path; a run's own is `directory` in its run file",
        )


def _no_run_in(path: Path, required: str) -> Exception:
    from dsr_scale.base.errors import InputError
    from dsr_scale.telemetry.metrics import METRICS_FILE

    return InputError(
        found=f"no run in {path}",
        required=required,
        remedy=f"a run is where {CONFIG_FILE} lies beside {METRICS_FILE} or checkpoints; "
        "list those under a directory with: dsr-scale runs DIR",
    )
