"""`dsr-scale job`: what launchers ask before and after an attempt. Needs no torch and no Slurm.

`begin` and `end` run on the batch host, `end` with a requeue waiting for its answer. Their stdout is
for bash and holds nothing else; words for people go to stderr.
"""

from __future__ import annotations

import enum
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsr_scale.config.run import AnyRun
    from dsr_scale.job.attempt import Attempt

app = typer.Typer(help="Begin and judge attempts of a cluster job.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings over the file's, such as training.steps=1000.",
        show_default=False,
    ),
]


class Encoders(enum.StrEnum):
    """Where a launcher runs encoder servers."""

    hetjob = "hetjob"
    colocated = "colocated"
    external = "external"


class Stopped(enum.StrEnum):
    """Why trainers were asked to end."""

    time_limit = "time_limit"
    preempted = "preempted"
    cancelled = "cancelled"
    encoders = "encoders"
    none = "none"


@app.command("begin")
def begin(
    config: Config,
    overrides: Overrides = None,
    *,
    job_id: Annotated[str, typer.Option("--job-id", help="The job's number.")],
    nodes: Annotated[str, typer.Option("--nodes", help="The trainers' nodes: a,b,c.")],
    grace_s: Annotated[
        float, typer.Option("--grace-s", help="Seconds from the signal to the kill; 0: unknown.")
    ] = 0.0,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why again; else the last attempt's cause.")
    ] = None,
    source: Annotated[
        Path, typer.Option("--source", help="Directory of the code, for its git revision.")
    ] = Path(),
) -> None:
    """Make the next attempt's directory and record, and print the directory."""
    from datetime import UTC, datetime

    from dsr_scale.checkpoint.directory import complete_steps
    from dsr_scale.config.load import load_any_run
    from dsr_scale.job import policy, record
    from dsr_scale.job.attempt import Attempt, attempt_directory, attempts_of

    run = load_any_run(config, overrides or [])
    run_directory = Path(run.directory).resolve()
    earlier = attempts_of(run_directory, job_id)
    steps = complete_steps(run_directory)
    policy.require_last_checkpoint(run_directory, policy.history(earlier), steps)
    attempt = Attempt(
        job_id=job_id,
        number=int(earlier[-1].name) + 1 if earlier else 0,
        reason=policy.reason_to_follow(earlier) if reason is None else reason,
        failures=policy.failures_since_checkpoint(
            policy.history(earlier), steps[-1] if steps else None
        ),
        nodes=_names(nodes),
        grace_s=grace_s or None,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    directory = attempt_directory(run_directory, job_id, attempt.number)
    attempt.write(directory)
    problems = record.write_record(directory, run, source=source, environment=os.environ)
    for problem in problems:
        typer.echo(f"not recorded: {problem}", err=True)
    changed = record.changes(earlier[-1], directory) if earlier else ""
    if changed:
        typer.echo(f"changed since attempt {earlier[-1].name}: {changed}", err=True)
    typer.echo(str(directory))


@app.command("nodes")
def nodes(
    config: Config,
    overrides: Overrides = None,
    *,
    available: Annotated[int, typer.Option("--available", min=1, help="Nodes that are there.")],
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, help="Ranks on each node.")
    ],
    encoders: Annotated[
        Encoders, typer.Option("--encoders", help="Where encoder servers run.")
    ] = Encoders.external,
) -> None:
    """Print the number of nodes to use; with recovery.shrink the most on which the run fits."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.load import load_any_run
    from dsr_scale.job.layouts import nodes_to_use

    run = load_any_run(config, overrides or [])
    if encoders is not Encoders.external and run.encoder.mode != "service":
        raise InputError(
            found=f"ENCODERS={encoders}, and encoder.mode is {run.encoder.mode}",
            required="encoder.mode = service for encoder servers to be asked",
            remedy="set encoder.mode=service; or ENCODERS=external, which starts no servers",
        )
    typer.echo(nodes_to_use(run, available, gpus_per_node))


@app.command("excluded")
def excluded(
    config: Config,
    overrides: Overrides = None,
    *,
    job_id: Annotated[str, typer.Option("--job-id", help="The job's number.")],
) -> None:
    """Print the nodes that attempts of the job have excluded: a,b."""
    from dsr_scale.config.load import load_any_run
    from dsr_scale.job import policy
    from dsr_scale.job.attempt import attempts_of

    run = load_any_run(config, overrides or [])
    earlier = policy.history(attempts_of(Path(run.directory).resolve(), job_id))
    typer.echo(",".join(sorted({node for past in earlier for node in past.exclude})))


@app.command("end")
def end(
    config: Config,
    overrides: Overrides = None,
    *,
    attempt: Annotated[Path, typer.Option("--attempt", help="The directory that begin printed.")],
    status: Annotated[int, typer.Option("--status", help="Exit status of the trainers.")],
    stopped: Annotated[
        Stopped, typer.Option("--stopped", help="Why trainers were asked to end.")
    ] = Stopped.none,
    lost_nodes: Annotated[str, typer.Option("--lost-nodes", help="Nodes that are down: a,b.")] = "",
    bad_nodes: Annotated[
        str, typer.Option("--bad-nodes", help="Nodes failing the preflight.")
    ] = "",
    srun_log: Annotated[
        Path | None, typer.Option("--srun-log", help="Output of the trainers' srun.")
    ] = None,
    remaining: Annotated[
        int, typer.Option("--remaining", min=0, help="Nodes left of the allocation.")
    ] = 0,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, help="Ranks on each node.")
    ] = 1,
) -> None:
    """Say why an attempt ended and decide what follows, in lines for bash to evaluate."""
    from dsr_scale.base import atomic_files
    from dsr_scale.base.errors import InputError
    from dsr_scale.checkpoint.directory import complete_steps
    from dsr_scale.job import policy
    from dsr_scale.job.attempt import attempts_of
    from dsr_scale.job.cause import find_cause
    from dsr_scale.job.evidence import gather
    from dsr_scale.job.layouts import valid_nodes
    from dsr_scale.job.summary import SUMMARY_FILE, cause_block, log_of, summary

    directory = attempt.resolve()
    run, begun = _run_of(config, overrides or [], directory), _attempt_in(directory)
    # Above it: <run>/jobs/<job id>/<attempt>.
    run_directory = directory.parents[2]
    evidence = gather(
        directory,
        run_directory,
        status=status,
        stopped=None if stopped is Stopped.none else stopped.value,
        lost_nodes=_names(lost_nodes),
        bad_nodes=_names(bad_nodes),
        launcher_log=srun_log,
    )
    cause = find_cause(evidence)
    steps = complete_steps(run_directory)
    attempts = attempts_of(run_directory, begun.job_id)
    smaller = valid_nodes(run, remaining, gpus_per_node)
    decision = policy.decide(
        cause,
        status=status,
        nodes=begun.nodes,
        checkpoint_step=steps[-1] if steps else None,
        earlier=policy.history([path for path in attempts if int(path.name) < begun.number]),
        recovery=run.recovery,
        smaller=smaller[-1] if smaller else None,
    )
    most = run.recovery.most_failures
    block = cause_block(
        begun, directory, cause, decision, most_failures=most, launcher_log=srun_log
    )
    # First of all: the disk that keeps the rest may be full.
    typer.echo(block, err=True, nl=False)
    page = summary(block, cause, evidence, log_of(cause, directory, srun_log))
    try:
        decision.write(directory)
        atomic_files.write_bytes(directory / SUMMARY_FILE, page.encode())
    except (OSError, InputError) as error:
        typer.echo(f"not kept in {directory}: {error}", err=True)
    typer.echo(f"ACTION={decision.action}")
    typer.echo(f"REASON={shlex.quote(' '.join(decision.reason.split()))}")


def _run_of(config: Path, overrides: list[str], attempt: Path) -> AnyRun:
    """The run as the file has it; as recorded where someone has broken the file in the meantime."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.load import load_any_run
    from dsr_scale.job.record import CONFIG_FILE, RECORD_DIRECTORY

    try:
        return load_any_run(config, overrides)
    except InputError:
        recorded = attempt / RECORD_DIRECTORY / CONFIG_FILE
        if not recorded.is_file():
            raise
        typer.echo(f"{config} cannot be read any more; judging by {recorded}", err=True)
        return load_any_run(recorded)


def _attempt_in(directory: Path) -> Attempt:
    """What `begin` wrote; where that is torn, what the directory's name says."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.job.attempt import JOB_FILE, Attempt

    try:
        return Attempt.read(directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if not directory.name.isdigit() or not directory.is_dir():
            raise InputError(
                found=f"{directory}, no attempt of a job",
                required=f"a directory RUN/jobs/JOB/NUMBER with {JOB_FILE}",
                remedy="pass the directory that dsr-scale job begin printed",
            ) from error
        number = int(directory.name)
        return Attempt(directory.parent.name, number, "", 0, (), None, "")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
