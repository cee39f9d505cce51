"""`dsr-scale encode`: image-caption shards → latents and caption tokens on disk, each computed once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dsr_scale.cli.placement import parse_share, usable_device


def encode(
    shards: Annotated[str, typer.Argument(help="Takes the place of data.shards in CONFIG.")],
    out: Annotated[Path, typer.Argument(help="Directory of the cache; encoder.cache of a run.")],
    config: Annotated[Path, typer.Option(help="Run file (YAML) with the data and encoders.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. encoders.latent_dtype=bf16")
    ] = None,
    share: Annotated[
        str, typer.Option(help="i/n: part i of n, 0 ≤ i < n, one for each device.")
    ] = "0/1",
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = (
        os.cpu_count() or 1
    ),
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = "auto",
) -> None:
    """Fill a latent cache for encoder.mode=cache. Interrupted, the same command goes on."""
    from dsr_scale.config.load import load_any_run

    part = parse_share(share)
    run = load_any_run(config, [*(overrides or ()), f"data.shards={json.dumps(shards)}"])

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from dsr_scale.encode_service.fill import FillProgress, fill
    from dsr_scale.encode_service.memory import keep_large_blocks

    keep_large_blocks()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
    with bar:
        task = bar.add_task("encoding", total=None, rate="–")

        def show(progress: FillProgress) -> None:
            rate = bar.tasks[0].speed
            bar.update(
                task,
                completed=progress.images_done,
                total=progress.images,
                rate="–" if rate is None else f"{rate:.0f}",
            )

        report = fill(
            run,
            out,
            device=usable_device(device),
            share=part,
            decode_threads=workers,
            progress=show,
        )
    table = Table("", "", title=str(out), show_header=False)
    table.add_row("encoded by this call", f"{report.images} images")
    if report.missing_units:
        table.add_row("left", f"{report.missing_units} units of other shares")
    for name, count in report.counts.items():
        table.add_row(name, f"{count / 2**20:,.1f} MiB" if name == "bytes" else str(count))
    console.print(table)
