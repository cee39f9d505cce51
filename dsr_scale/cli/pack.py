"""`dsr-scale pack`: image-caption sources of many kinds → MDS shards with a manifest."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """What a source is; `auto` looks."""

    auto = "auto"
    folder = "folder"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"
    webdataset = "webdataset"


class ImageFormat(StrEnum):
    """Formats to store images in anew."""

    jpeg = "jpeg"
    webp = "webp"


def pack(
    source: Annotated[str, typer.Argument(help="Folder, list file, tars or dataset files.")],
    out: Annotated[Path, typer.Argument(help="Directory of the shards.")],
    kind: Annotated[Kind, typer.Option(help="Kind of the source.")] = Kind.auto,
    image_column: Annotated[str | None, typer.Option(help="Path, bytes or {bytes, path}.")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Name of a sample.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where relative paths start.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Drop captions without image.")] = False,
    captions_optional: Annotated[bool, typer.Option(help="Keep images without caption.")] = False,
    min_side: Annotated[int, typer.Option(help="Drop smaller images, pixels.")] = 1,
    reencode: Annotated[ImageFormat | None, typer.Option(help="Store anew; off: as is.")] = None,
    quality: Annotated[int, typer.Option(help="Of --reencode.")] = 90,
    max_side: Annotated[int | None, typer.Option(help="Of --reencode, pixels.")] = None,
    shard_mib: Annotated[float, typer.Option(help="Size of a shard.")] = 64.0,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Pack a source. Interrupted, the same command goes on where it was."""
    from rich.console import Console
    from rich.table import Table

    from dsr_scale.base.errors import InputError
    from dsr_scale.data.pack import PackProgress
    from dsr_scale.data.pack import pack as pack_source
    from dsr_scale.data.pack_unit import PackOptions, Reencode
    from dsr_scale.data.sources import SourceOptions
    from dsr_scale.telemetry.progress import work_bar

    if max_side is not None and reencode is None:
        raise InputError(
            found="--max-side without --reencode",
            required="a format to store the smaller images in",
            remedy="add --reencode jpeg or --reencode webp",
        )
    options = PackOptions(
        source=SourceOptions(
            kind=kind.value,
            image_column=image_column,
            caption_columns=tuple(caption_column or ()),
            key_column=key_column,
            image_root=None if image_root is None else str(image_root),
        ),
        require_caption=not captions_optional,
        allow_missing=allow_missing,
        min_side=min_side,
        reencode=None
        if reencode is None
        else Reencode(format=reencode.value, quality=quality, max_side=max_side),
        shard_mib=shard_mib,
        workers=workers,
    )
    console = Console(stderr=True)
    with work_bar(console) as bar:
        task = bar.add_task("packing", total=None)

        def show(progress: PackProgress) -> None:
            bar.update(task, completed=progress.units_done, total=progress.units)

        report = pack_source(source, out, options, show)
    table = Table("", "", title=str(out), show_header=False)
    table.add_row("kept", str(report.kept))
    for reason, count in sorted(report.dropped.items()):
        table.add_row(f"dropped: {reason}", f"{count} (named in {out / 'dropped.jsonl'})")
    table.add_row("caption characters", _shown(report.caption_characters))
    table.add_row("shorter side, pixels", _shown(report.short_side_pixels))
    table.add_row("shards", str(report.shards))
    table.add_row("fingerprint", report.fingerprint)
    console.print(table)


def _shown(statistics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in statistics.items())
