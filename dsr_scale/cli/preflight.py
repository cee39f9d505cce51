"""`dsr-scale preflight`: is every node of the job fit for the run; started once on each node.

Node 0 prints a table and what is wrong. Status 2 is for a person (a wrong setting), 3 for bad nodes,
whose names are then in the file `bad_nodes`; all of it in under a minute and without torch in this
process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsr_scale.config.run import AnyRun
    from dsr_scale.job.node_checks import Needs
    from dsr_scale.job.preflight_verdict import Verdict

COLUMNS = {
    "GPUs": ("GPUs", "GPU memory", "GPU errors", "GPU model", "driver"),
    "disks": ("run directory", "data cache", "temporary files"),
    "shm": ("shared memory",),
    "memory": ("memory",),
    "files": ("open files",),
    "clock": ("clock",),
    "network": ("report", "network"),
    "encoders": ("encoders",),
    "all-reduce": ("all-reduce",),
}
"""Of the table, with the checks that each sums up."""
LEAST_WIDTH = 150
"""Characters of the table in a log file, which has no width of its own."""


def preflight(
    config: Annotated[Path, typer.Argument(help="Run file (YAML), the same as for train.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. directory=/shared/runs/a")
    ] = None,
    *,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=0, help="GPUs that the trainers use on each node.")
    ],
    require_encoders: Annotated[
        bool, typer.Option("--require-encoders", help="Fail while no encoder server answers.")
    ] = False,
    colocated: Annotated[
        bool,
        typer.Option("--colocated", help="Encoder servers hold memory of the trainers' GPUs."),
    ] = False,
) -> None:
    """Check all nodes of a job: srun --ntasks-per-node=1 dsr-scale preflight …; alone, this machine."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.load import load_any_run
    from dsr_scale.job.attempt import JOB_VARIABLE
    from dsr_scale.job.node_meeting import node_place
    from dsr_scale.job.preflight import BAD_NODES_STATUS, run_preflight

    run = load_any_run(config, overrides or [])
    place = node_place()
    needs = needs_of(
        run,
        gpus_per_node=gpus_per_node,
        require_encoders=require_encoders,
        colocated=colocated,
    )
    directory = Path(os.environ.get(JOB_VARIABLE) or run.directory) / "preflight"
    backend = "nccl" if needs.gpus else "gloo"
    try:
        findings = run_preflight(directory, place, needs, backend)
    except (InputError, OSError) as error:
        if place.rank == 0:
            raise
        typer.echo(f"preflight on {place.node}: {error}", err=True)
        raise typer.Exit(BAD_NODES_STATUS) from None
    if findings is not None:
        from dsr_scale.job.preflight_verdict import judge

        conclude(judge(findings, needs), directory)


def needs_of(run: AnyRun, *, gpus_per_node: int, require_encoders: bool, colocated: bool) -> Needs:
    """What `run` asks of every node."""
    from dsr_scale.checkpoint.directory import complete_steps
    from dsr_scale.encode_service.registry import registry_directory, servers_in
    from dsr_scale.job.node_checks import Needs

    directory = Path(run.directory)
    parameters = _parameters(run)
    # As train counts: fp32 weights, two moments, averages, and one more save than is kept.
    checkpoint_bytes = 4 * (3 + len(run.training.ema_decays)) * parameters
    missing = max(1, run.checkpoint.keep_last + 1 - len(complete_steps(directory)))
    cache = run.data.cache_directory
    service = run.encoder.mode == "service"
    return Needs(
        gpus=0 if run.training.device == "cpu" else gpus_per_node,
        run_directory=directory,
        checkpoint_bytes=missing * checkpoint_bytes,
        data_cache=None if cache is None else Path(cache).expanduser(),
        colocated_encoders=colocated,
        named_encoders=run.encoder.servers if service else (),
        announced_encoders=tuple(servers_in(registry_directory(run))) if service else (),
        uses_encoders=service,
        requires_encoders=require_encoders,
    )


def _parameters(run: AnyRun) -> int:
    """Of the network in training."""
    from dsr_scale.config import costs, decoder_costs
    from dsr_scale.config.decoder import DecoderRun, decoder_shape
    from dsr_scale.config.derive import model_shape
    from dsr_scale.config.run import RunConfig

    if isinstance(run, DecoderRun):
        return sum(decoder_costs.parameters(decoder_shape(run)).values())
    assert isinstance(run, RunConfig)
    return costs.total(costs.parameters(model_shape(run))).stored


def conclude(verdict: Verdict, directory: Path) -> None:
    """Prints the verdict, keeps the names of bad nodes and ends with the status that fits.

    Raises InputError for failures that all nodes share, typer.Exit for bad nodes.
    """
    from dsr_scale.base import atomic_files
    from dsr_scale.config.problems import raise_problems
    from dsr_scale.job.preflight import BAD_NODES_FILE, BAD_NODES_STATUS

    _print_table(verdict)
    for line in verdict.node_problems():
        typer.echo(line)
    number = len(verdict.nodes)
    nodes = f"{number} node{'s' if number > 1 else ''} in {verdict.seconds:.0f} s"
    names = "".join(f"{name}\n" for name in verdict.bad_nodes)
    atomic_files.write_bytes(directory / BAD_NODES_FILE, names.encode())
    sys.stdout.flush()
    raise_problems(f"the preflight of {nodes}", verdict.common_problems())
    if verdict.bad_nodes:
        typer.echo(f"preflight failed: bad nodes {', '.join(verdict.bad_nodes)}; {nodes}", err=True)
        raise typer.Exit(BAD_NODES_STATUS)
    speed = verdict.all_reduce_bytes_per_s
    shown = "" if speed is None else f", all-reduce {speed / 1e9:.1f} GB/s"
    typer.echo(f"preflight passed: {nodes}{shown}")


def _print_table(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "", "warning": "yellow", "failed": "bold red"}
    severity = list(styles)
    shown = [
        column
        for column, checks in COLUMNS.items()
        if any(result.check in checks for node in verdict.nodes for result in node.results)
    ]
    table = Table("node", *shown)
    for node in verdict.nodes:
        row = [Text(node.node)]
        for column in shown:
            results = [result for result in node.results if result.check in COLUMNS[column]]
            if not results:
                row.append(Text("–"))
                continue
            # The first of the worst.
            worst = max(results, key=lambda result: severity.index(result.state))
            word = "" if worst.state == "ok" else f"{worst.state}: "
            row.append(Text(word + worst.value, style=styles[worst.state]))
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LEAST_WIDTH)
    console.print(table)
