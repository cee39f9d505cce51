"""The bar a person watches: step, loss, images per second of all devices and of one, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def training_bar(console: Console, *, visible: bool) -> Progress:
    """A bar whose task carries `loss`, `images_per_s` and `per_device` fields."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[images_per_s]} images/s, {task.fields[per_device]} per device"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not visible,
        refresh_per_second=2,
    )


def work_bar(console: Console) -> Progress:
    """A bar for a counted job: packing, sampling."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
