"""The `dsr-scale` command: one line per subcommand, and how mistakes of input are shown.

Each subcommand is a function in a module of its own that imports what is heavy inside, so that
`--help` and `plan` start without torch. Add one with `app.command("NAME")(module.function)`, or
several of one subject as a `typer.Typer` with `app.add_typer`.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import dsr_scale
from dsr_scale.base.errors import InputError
from dsr_scale.cli import (
    checkpoint,
    encode,
    evaluate,
    export,
    job,
    outliers,
    pack,
    plan,
    preflight,
    registers,
    runs,
    sample,
    serve,
    stats,
    train,
)
from dsr_scale.config.problems import ConfigError

TRAINING_PACKAGES = {
    "deepspeed",
    "streaming",
    "webdataset",
    "wandb",
    "pyarrow",
    "matplotlib",
    "xxhash",
    "grpc",
    "grpc_health",
    "prometheus_client",
    "cryptography",
    "diskcache",
    "flufl",
    "lpips",
    "plotext",
    "psutil",
}
"""What a plain install, made for sampling, does not have."""

app = typer.Typer(
    name="dsr-scale",
    help="Pretrain text-to-image diffusion transformers with Dual-Stage Registers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsr-scale {dsr_scale.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of every subcommand; also keeps a lone subcommand from becoming the program."""


app.command("pack")(pack.pack)
app.command("encode")(encode.encode)
app.command("registers")(registers.registers)
app.command("stats")(stats.stats)
app.command("plan")(plan.plan)
app.command("preflight")(preflight.preflight)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.command("outliers")(outliers.outliers)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(job.app, name="job")
app.add_typer(runs.app, name="runs")


def run() -> None:
    """Entry point. Bad input ends with status 2 and three readable parts, never a traceback."""
    try:
        app()
    except InputError as error:
        show_input_error(error)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        show_input_error(
            InputError(
                found=f"no package {error.name}",
                required="the extra that training and packing need",
                remedy="pip install 'dsr-scale[train]'",
            )
        )
        sys.exit(2)


def show_input_error(error: InputError) -> None:
    """Print to stderr what was found, what is required and what to do, for each problem."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank != "0":
        console.print(f"rank {rank}:", style="red")
    problems = error.problems if isinstance(error, ConfigError) else (error,)
    if isinstance(error, ConfigError):
        console.print(Text(f"{len(problems)} problems in {error.source}", style="bold red"))
    for number, problem in enumerate(problems, start=1):
        prefix = f"{number}. " if len(problems) > 1 else ""
        for label, text in (
            (f"{prefix}found", problem.found),
            ("required", problem.required),
            ("what to do", problem.remedy),
        ):
            console.print(Text.assemble((f"{label}: ", "bold red"), (text, "red")))
