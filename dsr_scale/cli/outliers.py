"""`dsr-scale outliers`: outlier statistics of an encoder, a bundle or a checkpoint, as a report."""

from __future__ import annotations

import dataclasses
import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from dsr_scale.evaluate.outlier_findings import Findings

MARKED_RATIO = 1e-3
"""Outlier ratios from here on stand out in the terminal."""


class TimeAxis(StrEnum):
    """Which time is meant; 1 is noise on both."""

    model = "model"
    preshift = "preshift"


def outliers(
    target: Annotated[
        str,
        typer.Argument(
            help="Bundle, run directory (its newest checkpoint), a checkpoint's directory, run file "
            "(.yaml) whose encoder is meant, or hub name or directory of a vision transformer."
        ),
    ],
    against: Annotated[
        str | None, typer.Option(help="A second target, shown beside the first.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Packed shards, or package:emoji; default: what a run was trained on."),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Images, spread evenly over the data.")] = 64,
    timesteps: Annotated[
        str, typer.Option(help="Of a diffusion transformer, from 0 to 1; 1 is noise.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    time: Annotated[
        TimeAxis, typer.Option(help="Which time they are: as the model is told it, or unshifted.")
    ] = TimeAxis.model,
    threshold: Annotated[
        float, typer.Option(min=0, help="Norm over which the absolute rule counts an outlier.")
    ] = 100.0,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the images' order and of the noise.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("outliers"),
) -> None:
    """Measure token norms, attention sinks and local semantics by block and timestep."""
    from rich.console import Console

    from dsr_scale.base.atomic_files import require_writable_directory
    from dsr_scale.cli.placement import usable_device

    _require_matplotlib()
    from dsr_scale.evaluate.outlier_findings import save_findings
    from dsr_scale.evaluate.outlier_measurement import image_forwards, measure
    from dsr_scale.evaluate.outlier_report import write_report
    from dsr_scale.evaluate.outlier_targets import Measurement, find_target
    from dsr_scale.telemetry.progress import work_bar

    how = Measurement(
        shards=data,
        images=images,
        timesteps=_times(timesteps),
        axis=time.value,
        batch=batch,
        seed=seed,
        threshold=threshold,
        device=usable_device(device),
    )
    require_writable_directory(out)
    console = Console(stderr=True, highlight=False)
    findings: list[Findings] = []
    # Both are checked before either is measured, and loaded one after the other: two large networks
    # then need the memory of one.
    names = [name for name in (target, against) if name is not None]
    for name, load in [(name, find_target(name, how)) for name in names]:
        opened = load()
        with work_bar(console) as bar:
            task = bar.add_task(opened.name, total=image_forwards(opened, how))
            found = measure(opened, how, lambda done, task=task: bar.advance(task, done))
        findings += [_apart(one, findings, name) for one in found]
        del opened
    for found in findings:
        console.print(_table(found))
    save_findings(findings, out)
    with console.status("drawing the report"):
        report = write_report(findings, out)
    console.print(f"→ {report}", markup=False, soft_wrap=True)


def _apart(found: Findings, before: list[Findings], target: str) -> Findings:
    """`found` under a name that none of those before it has: two bundles may be called `bundle`."""
    if found.name not in [other.name for other in before]:
        return found
    return dataclasses.replace(found, name=f"{found.name} ({target})")


def _require_matplotlib() -> None:
    """Raises InputError without matplotlib, which would else be missed after minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        from dsr_scale.base.errors import InputError

        raise InputError(
            found="no package matplotlib",
            required="what draws the figures of the report",
            remedy="pip install 'dsr-scale[train]'",
        )


def _times(text: str) -> tuple[float, ...]:
    """What `--timesteps` means. Raises InputError for anything but numbers from 0 to 1."""
    from dsr_scale.base.errors import InputError

    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        times = ()
    if not times or not all(0 <= time <= 1 for time in times) or len(set(times)) < len(times):
        raise InputError(
            found=f"--timesteps {text}",
            required="different numbers from 0 (image) to 1 (noise), with commas between them",
            remedy="give for example --timesteps 0.1,0.3,0.5,0.7,0.9",
        )
    return times


def _table(found: Findings) -> Table:
    """Blocks by timesteps: outlier ratio and max over median; for an encoder a few measures more."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(found.name), caption=_worst(found))
    table.add_column("block")
    if found.timesteps:
        table.caption = f"outlier ratio · max / median by model time (unshifted)\n{table.caption}"
        for time in found.timesteps:
            table.add_column(f"{time.model:.3g} ({time.preshift:.3g})", justify="right")
    else:
        for heading in ENCODER_COLUMNS.values():
            table.add_column(heading, justify="right")
    for place, block in enumerate(found.blocks):
        table.add_row(block, *_cells(found, place))
    return table


ENCODER_COLUMNS = {
    "outlier_ratio": "outlier ratio",
    "max_over_median": "max / median",
    "register_over_median": "register / median",
    "attention_registers": "attention to registers",
    "attention_top_norm": "to top-norm tokens",
}
"""Measure → heading."""


def _cells(found: Findings, place: int) -> Iterator[str]:
    measures = found.measures
    if not found.timesteps:
        for name in ENCODER_COLUMNS:
            yield _number(float(measures[name][place, 0]))
        return
    for step in range(len(found.timesteps)):
        ratio = float(measures["outlier_ratio"][place, step])
        largest = _number(float(measures["max_over_median"][place, step]))
        cell = f"{_number(ratio)} · {largest}"
        yield f"[bold red]{cell}[/]" if ratio >= MARKED_RATIO else cell


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3g}"


def _worst(found: Findings) -> str:
    """Where most outliers are, and what is left of them without three channels."""
    import numpy as np

    ratios = np.nan_to_num(found.measures["outlier_ratio"])
    place, step = np.unravel_index(ratios.argmax(), ratios.shape)
    if ratios[place, step] == 0:
        return f"no outliers in {found.images} images"
    without = found.measures["outlier_ratio_without_channels"][place, step]
    time = f" at {found.timesteps[step].model:.3g}" if found.timesteps else ""
    return (
        f"most outliers: {ratios[place, step]:.3g} after {found.blocks[place]}{time}, "
        f"{without:.3g} without the three largest channels; {found.images} images"
    )
