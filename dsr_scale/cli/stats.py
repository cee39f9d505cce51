"""`dsr-scale stats`: mean and variance of an encoder's latents over a data set, for whitening."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from dsr_scale.config.encoders import VitImage
    from dsr_scale.config.run import AnyRun
    from dsr_scale.data.plain_images import PlainImages
    from dsr_scale.encoders.statistics import (
        LatentStatistics,
        StatisticsIdentity,
        StatisticsSource,
    )


def stats(
    config: Annotated[Path, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. data.shards=DIR")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: encoders.image.statistics.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images instead of data.shards.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Images, spread evenly over the set; default: all.")
    ] = None,
    share: Annotated[
        str, typer.Option(help="i/n: part i of n, 0 ≤ i < n; writes a file of its own.")
    ] = "0/1",
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Join the files of all shares instead; repeatable, or a folder of them."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = "auto",
) -> None:
    """Compute the statistics file that a run names, in one pass; or merge the shares of one."""
    from rich.console import Console

    from dsr_scale.base.atomic_files import require_writable_directory
    from dsr_scale.cli.placement import parse_share, usable_device
    from dsr_scale.config.load import load_any_run
    from dsr_scale.data.plain_images import plain_images
    from dsr_scale.encoders.statistics import StatisticsSource
    from dsr_scale.encoders.whitening import statistics_identity

    part = parse_share(share)
    run = load_any_run(config, overrides or [])
    image = _whitened_encoder(run)
    target = _target(image, out)
    require_writable_directory(target.parent)
    identity = statistics_identity(image, run.data.resolution)
    console = Console(stderr=True, highlight=False)
    if merge:
        total, source = _merged(merge, identity)
    else:
        chosen = plain_images(run.data, folder=images, count=count, share=part)
        total = _computed(image, chosen, run.data.resolution, usable_device(device), console)
        if part.of > 1:
            target = target.with_name(f"{target.stem}.{part.index}-of-{part.of}{target.suffix}")
        source = StatisticsSource(chosen.data_set, chosen.fingerprint, *part)
    _write(target, total, identity, source, console)


def _whitened_encoder(run: AnyRun) -> VitImage:
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.encoders import VitImage

    if not isinstance(run.encoders.image, VitImage):
        raise InputError(
            found=f"encoders.image.kind = {run.encoders.image.kind}",
            required="an encoder whose latents are whitened: kind vit",
            remedy="nothing is needed for this encoder",
        )
    return run.encoders.image


def _target(image: VitImage, out: Path | None) -> Path:
    from dsr_scale.base.errors import InputError

    if out is None and image.statistics is None:
        raise InputError(
            found="neither --out nor encoders.image.statistics",
            required="a file to write",
            remedy="give --out FILE, or set encoders.image.statistics",
        )
    target = out or Path(str(image.statistics)).expanduser()
    if target.is_dir():
        raise InputError(
            found=f"{target}, a directory",
            required="a file to write",
            remedy=f"write for example {target / 'statistics.safetensors'}",
        )
    return target


def _computed(
    image: VitImage,
    images: PlainImages,
    resolution: int,
    device: torch.device,
    console: Console,
) -> LatentStatistics:
    """One pass over the images. Raises InputError when none is usable or latents overflow."""
    from dsr_scale.base.errors import InputError
    from dsr_scale.encoders.contract import build_image_encoder
    from dsr_scale.encoders.statistics import LatentStatistics
    from dsr_scale.telemetry.progress import work_bar

    raw = image.model_copy(update={"statistics": None})
    encoder = build_image_encoder(raw, resolution=resolution, device=device)
    total: LatentStatistics | None = None
    with work_bar(console) as bar:
        task = bar.add_task("statistics", total=len(images))
        for batch in images.batches(image.chunk_images):
            part = LatentStatistics.of(encoder.encode(batch))
            total = part if total is None else total.merge(part)
            bar.advance(task, len(batch))
        bar.update(task, completed=len(images))
    if images.unusable_report:
        console.print(images.unusable_report, style="yellow", markup=False)
    if total is None:
        raise InputError(
            found=f"no usable image among {len(images)} of {images.source.where}",
            required="images that can be decoded",
            remedy="correct the path, or pack the data again",
        )
    if not total.squares.isfinite().all():
        raise InputError(
            found=f"infinite or undefined latents of {image.known_as} in {image.dtype}",
            required="finite latents",
            remedy="set encoders.image.dtype to bf16 or fp32",
        )
    return total


def _merged(
    paths: list[Path], identity: StatisticsIdentity
) -> tuple[LatentStatistics, StatisticsSource]:
    from dsr_scale.data.plain_images import joined_fingerprint
    from dsr_scale.encoders.statistics import LatentStatistics, StatisticsSource, load_shares

    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*-of-*.safetensors")) if path.is_dir() else [path])
    ]
    shares = load_shares(files, identity)
    total = functools.reduce(LatentStatistics.merge, [statistics for statistics, _ in shares])
    fingerprint = joined_fingerprint([source.fingerprint for _, source in shares])
    return total, StatisticsSource(shares[0][1].data_set, fingerprint)


def _write(
    path: Path,
    statistics: LatentStatistics,
    identity: StatisticsIdentity,
    source: StatisticsSource,
    console: Console,
) -> None:
    from rich.table import Table

    from dsr_scale.encoders.statistics import save_statistics

    save_statistics(path, statistics, identity, source)
    table = Table("", "", title=str(path), show_header=False)
    table.add_row("encoder", identity.encoder)
    table.add_row("revision", identity.revision or "not pinned")
    table.add_row("resolution", f"{identity.resolution} pixels")
    table.add_row("outlier treatment", identity.treatment)
    table.add_row("images", str(statistics.count))
    table.add_row("images' fingerprint", source.fingerprint)
    if source.shares > 1:
        table.add_row("share", f"{source.share}/{source.shares}, to be merged with the others")
    table.add_row("latents", " × ".join(map(str, statistics.mean.shape)))
    deviation = statistics.variance.sqrt()
    table.add_row("mean deviation", f"{float(deviation.mean()):.4g}")
    console.print(table)
