"""`dsr-scale plan`: everything about a run that follows from its file, before a GPU is asked for.

Needs neither torch nor a GPU. What it prints is counted, except memory of activations where the notes
call it derived, and images per second, which are a prediction with what it assumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dsr_scale.config.derive import ModelShape
    from dsr_scale.config.run import RunConfig

ASSUMED_SHARE = 0.5
"""Share of the measured matrix-product ceiling that the prediction of images/s assumes: the lower
end of what a roofline derives for compiled bf16 blocks at least 1024 wide."""

PREDICTED_FROM_WIDTH = 1024
"""Narrower bodies are bound by element-wise work, for which no share is known."""


def plan(
    config: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings over the file's, such as training.steps=1000.",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="All GPUs: tensor × pipeline × data ranks.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a run file; print its sizes, FLOPs, layout, memory per GPU and batch arithmetic."""
    import json

    from dsr_scale.config.checks import check_run
    from dsr_scale.config.load import load_run

    run = load_run(config, overrides or [])
    check_run(run, devices=devices)
    report = plan_report(run, devices=devices)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        _print_report(report, Console(highlight=False))


def plan_report(run: RunConfig, *, devices: int) -> dict[str, Any]:
    """All that `plan` shows, as JSON values; bytes, FLOPs and counts are plain integers.

    Raises InputError when the replicas or the global batch do not divide over `devices`.
    """
    from dsr_scale.config import costs, derive
    from dsr_scale.config.layout_report import layout_report
    from dsr_scale.config.presets import with_preset

    run = run.model_copy(update={"model": with_preset(run.model)})
    shape = derive.model_shape(run)
    counts = costs.parameters(shape)
    flops = costs.forward_flops(shape)
    layout = layout_report(run, shape, devices=devices)
    batch = derive.batch_arithmetic(run, layout["layout"]["dp"])
    images_seen = run.training.steps * batch.global_images
    samples = sample_count(run)
    return {
        "name": run.name,
        "devices": devices,
        "config": run.model_dump(mode="json"),
        "model": {
            "width": shape.width,
            "depth": shape.depth,
            "heads": shape.heads,
            "head": None if shape.head is None else shape.head.model_dump(),
        },
        "latent": {"channels": shape.channels, "grid": list(shape.grid)},
        "tokens": {
            "image": shape.image_tokens,
            "text": shape.text_length,
            "registers": shape.registers,
            "register_start": shape.register_start if shape.registers else None,
            "longest_sequence": max(costs.body_rows(shape)),
        },
        "timestep_shift": derive.timestep_shift(run, shape),
        "parameters": {part: count.stored for part, count in counts.items()}
        | {"total": costs.total(counts).stored, "total_unpadded": costs.total(counts).published},
        "forward_flops_per_image": flops | {"total": sum(flops.values())},
        "training_flops_per_image": costs.training_flops(shape),
        **layout,
        "batch": {
            "global_images": batch.global_images,
            "data_parallel": batch.data_parallel,
            "per_rank_images": batch.global_images // batch.data_parallel,
            "microbatch_images": batch.microbatch_images,
            "accumulation_steps": batch.accumulation_steps,
        },
        "steps": run.training.steps,
        "images_seen": images_seen,
        "samples": samples,
        "epochs": images_seen / samples if samples else None,
        "predicted_images_per_s": _predictions(run, shape, devices, layout["pipeline"]),
        "notes": _notes(run, shape),
    }


def sample_count(run: RunConfig) -> int | None:
    """Samples of a local pack, from its `manifest.json` or MDS `index.json`; None where unknown."""
    import json

    import dsr_scale

    shards = run.data.shards
    if shards.startswith("package:"):
        directory = Path(dsr_scale.__file__).parent / "data" / shards.removeprefix("package:")
    else:
        directory = Path(shards)
    count = None
    try:
        if (directory / "manifest.json").is_file():
            count = json.loads((directory / "manifest.json").read_text())["samples"]
        elif (directory / "index.json").is_file():
            index = json.loads((directory / "index.json").read_text())
            count = sum(shard["samples"] for shard in index["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        # Whether a pack is sound is for training to say; here only the epochs are missing.
        return None
    if not isinstance(count, int) or count < 1:
        return None
    return count if run.data.max_samples is None else min(count, run.data.max_samples)


def _predictions(
    run: RunConfig, shape: ModelShape, devices: int, pipeline: dict[str, Any] | None
) -> dict[str, float]:
    """Images per second on all devices, by GPU; empty where there is no ground for a number."""
    from dsr_scale.config import costs

    training, parallel = run.training, run.parallel
    if training.precision != "bf16" or not training.compile:
        return {}
    if shape.width < PREDICTED_FROM_WIDTH or parallel.tp > 1 or parallel.offload:
        return {}
    flops = costs.training_flops(shape)
    if training.recompute == "full":
        flops = flops * 4 / 3
    working = pipeline["balance"] * (1 - pipeline["bubble"]) if pipeline else 1.0
    return {
        gpu: devices * working * ASSUMED_SHARE * ceiling * 1e12 / flops
        for gpu, ceiling in costs.MEASURED_CEILING_TFLOPS.items()
    }


def _notes(run: RunConfig, shape: ModelShape) -> list[str]:
    from dsr_scale.config.layout_report import layout_notes

    notes = layout_notes(run)
    tokens = shape.channels * shape.patch**2
    widest = max(shape.width, shape.head.width if shape.head else 0)
    if widest < tokens:
        notes.append(
            f"The model is {widest} wide and its tokens have {tokens} values; a model narrower "
            "than its tokens trains poorly (RAE, docs/method.md §3). A head at least as wide helps."
        )
    return notes


def _print_report(report: dict[str, Any], console: Console) -> None:
    from rich.text import Text

    console.print(Text(report["name"], style="bold"))
    _print_config(report["config"], console)
    _print_sizes(report, console)
    _print_costs(report, console)
    _print_layout(report, console)
    _print_batch(report, console)
    for note in report["notes"]:
        console.print(Text(f"note: {note}", style="dim"))


def _print_config(config: dict[str, Any], console: Console) -> None:
    """One row per section, every setting in it as key=value."""
    table = _table("config", console)
    rest = {key: value for key, value in config.items() if not isinstance(value, dict)}
    table.add_row("run", _flat(rest))
    for section, values in config.items():
        if isinstance(values, dict):
            table.add_row(section, _flat(values))
    console.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> str:
    parts: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            parts.append(_flat(value, f"{prefix}{key}."))
        elif value is not None and value != []:
            parts.append(f"{prefix}{key}={value}")
    return "  ".join(part for part in parts if part)


def _print_sizes(report: dict[str, Any], console: Console) -> None:
    model, tokens, latent = report["model"], report["tokens"], report["latent"]
    head = model["head"]
    table = _table("model", console)
    body = f"width {model['width']}, depth {model['depth']}, heads {model['heads']}"
    if head:
        body += f"; head width {head['width']}, depth {head['depth']}, heads {head['heads']}"
    table.add_row("sizes", body)
    height, width = latent["grid"]
    table.add_row("latents", f"{latent['channels']} channels, grid {height} × {width}")
    row = f"{tokens['image']} image"
    if tokens["text"]:
        row += f", {tokens['text']} text"
    if tokens["registers"]:
        row += f", {tokens['registers']} registers from block {tokens['register_start']}"
    table.add_row("tokens", f"{row}; longest sequence {tokens['longest_sequence']}")
    table.add_row("timestep shift α", f"{report['timestep_shift']:.3f}")
    for part, count in report["parameters"].items():
        if count and part not in ("total", "total_unpadded"):
            table.add_row(f"parameters: {part}", f"{count:,}")
    total, unpadded = report["parameters"]["total"], report["parameters"]["total_unpadded"]
    padding = f" ({unpadded:,} without the zero padding)" if total != unpadded else ""
    table.add_row("parameters: all", f"{total:,}{padding}")
    console.print(table)


def _print_costs(report: dict[str, Any], console: Console) -> None:
    table = _table("cost", console)
    flops = report["forward_flops_per_image"]
    parts = ", ".join(
        f"{part} {_gflops(value)}" for part, value in flops.items() if value and part != "total"
    )
    rows = report["tokens"]["longest_sequence"]
    table.add_row(
        "forward per image", f"{_gflops(flops['total'])} GFLOPs, up to {rows} tokens ({parts})"
    )
    training = report["training_flops_per_image"]
    table.add_row("training per image", f"{_gflops(training)} GFLOPs (3 × forward)")
    for gpu, rate in report["predicted_images_per_s"].items():
        table.add_row(
            f"predicted on {report['devices']} × {gpu}",
            f"{rate:,.0f} images/s, assuming {ASSUMED_SHARE:.0%} of the measured bf16 ceiling, "
            "encoders and communication hidden",
        )
    console.print(table)


def _print_layout(report: dict[str, Any], console: Console) -> None:
    table = _table("layout", console)
    layout, pipeline = report["layout"], report["pipeline"]
    ranks = f"{layout['tp']} tensor × {layout['pp']} pipeline × {layout['dp']} data"
    ranks += f" = {report['devices']} ranks, ZeRO-{layout['zero']}"
    ranks += ", sequence parallel" if layout["sp"] else ""
    ranks += ", optimizer on the host" if layout["offload"] else ""
    table.add_row("ranks", f"{ranks}, recompute {layout['recompute']}")
    if pipeline:
        for number, stage in enumerate(pipeline["stages"]):
            first, stop = stage["blocks"]
            table.add_row(
                f"stage {number} on pipeline rank {stage['pipeline_rank']}",
                f"blocks {first} to {stop - 1} ({stop - first}), {stage['share']:.1%} of FLOPs",
            )
        table.add_row(
            "pipeline",
            f"balance {pipeline['balance']:.3f} (mean over dearest rank), "
            f"bubble {pipeline['bubble']:.1%}",
        )
    memory = report["memory_bytes_per_gpu"]
    for item, size in memory.items():
        if item != "total":
            table.add_row(f"memory per GPU: {item}", _gib(size))
    on = f"on each of {report['devices']}"
    if pipeline:
        on = f"on pipeline rank {report['memory_pipeline_rank']}, which needs the most"
    table.add_row("memory per GPU: all", f"{_gib(memory['total'])} {on}")
    if report["host_memory_bytes_per_rank"]:
        table.add_row(
            "host memory per rank", f"{_gib(report['host_memory_bytes_per_rank'])} of optimizer"
        )
    for item, size in report["wire_bytes_per_step"].items():
        if size and item != "total":
            table.add_row(f"wire per step: {item.replace('_', ' ')}", _gib(size))
    console.print(table)


def _print_batch(report: dict[str, Any], console: Console) -> None:
    table = _table("training", console)
    batch = report["batch"]
    table.add_row(
        "batch",
        f"{batch['global_images']:,} images = {batch['data_parallel']} data-parallel ranks × "
        f"{batch['microbatch_images']} per micro-batch × {batch['accumulation_steps']} accumulated "
        f"({batch['per_rank_images']:,} per rank)",
    )
    table.add_row("steps", f"{report['steps']:,}")
    table.add_row("images seen", f"{report['images_seen']:,}")
    if report["epochs"] is None:
        table.add_row("epochs", "unknown: no manifest.json or index.json readable at data.shards")
    else:
        table.add_row("epochs", f"{report['epochs']:,.2f} of {report['samples']:,} samples")
    console.print(table)


def _table(title: str, console: Console) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, width=console.width)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    return table


def _gflops(value: int) -> str:
    return f"{value / 1e9:,.1f}" if value >= 1e8 else f"{value / 1e9:.4f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f} GiB"
