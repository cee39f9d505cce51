"""The tables that `dsr-scale plan` prints of its report; every number in them is in `--json` too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsr_scale.config.encoder_placement import decimal_size

if TYPE_CHECKING:
    from rich.console import Console


def print_report(report: dict[str, Any], console: Console) -> None:
    """Every block as a table, then the notes."""
    from rich.text import Text

    console.print(Text(report["name"], style="bold"))
    print_config(report["config"], console)
    _print_sizes(report, console)
    _print_costs(report, console)
    _print_encoders(report["encoders"], console)
    _print_layout(report, console)
    print_batch(report, console)
    for note in report["notes"] + report["encoders"]["assumes"]:
        console.print(Text(f"note: {note}", style="dim"))


def print_config(config: dict[str, Any], console: Console) -> None:
    """One row per section, every setting in it as key=value."""
    table = new_table("config", console)
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
    table = new_table("model", console)
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
    table = new_table("cost", console)
    flops = report["forward_flops_per_image"]
    parts = ", ".join(
        f"{part} {gflops(value)}" for part, value in flops.items() if value and part != "total"
    )
    rows = report["tokens"]["longest_sequence"]
    table.add_row(
        "forward per image", f"{gflops(flops['total'])} GFLOPs, up to {rows} tokens ({parts})"
    )
    training = report["training_flops_per_image"]
    table.add_row("training per image", f"{gflops(training)} GFLOPs (3 × forward)")
    for gpu, rate in report["predicted_images_per_s"].items():
        table.add_row(
            f"predicted on {report['devices']} × {gpu}",
            f"{rate:,.0f} images/s, assuming {report['assumed_share']:.0%} of the measured bf16 ceiling, "
            "encoders and communication hidden",
        )
    console.print(table)


def _print_encoders(encoders: dict[str, Any], console: Console) -> None:
    """What they cost and move, and where they are best kept."""
    table = new_table("encoders", console)
    for name in ("image", "text"):
        encoder = encoders[name]
        flops = encoder["forward_flops"]
        row = f"{encoder['kind']}, nothing to compute"
        if encoder["model"]:
            cost = f"FLOPs unknown: {encoder['unknown']}"
            if flops is not None:
                cost = f"{gflops(flops)} GFLOPs forward"
            row = f"{encoder['model']} in {encoder['dtype']}, {cost}"
        table.add_row(f"{name} encoder", row)
    sent = encoders["network_bytes_per_image"]
    table.add_row(
        "network per image",
        f"up {decimal_size(sent['up'])}; down {decimal_size(sent['latents'])} of latents, at most "
        f"{decimal_size(sent['text'])} of text",
    )
    table.add_row("cache on disk", _cache_text(encoders["cache"]))
    if encoders["placement"] is None:
        table.add_row("placement", f"not predicted, unknown: {'; '.join(encoders['unknown'])}")
    else:
        if encoders["placement"]["encoder_gpus"]:
            _add_placement(table, encoders["placement"])
        recommended, reason = (encoders["placement"][key] for key in ("recommended", "reason"))
        table.add_row("recommended", f"{recommended}: {reason}")
    console.print(table)


def _cache_text(cache: dict[str, Any]) -> str:
    if cache["impossible"]:
        return f"not possible: {cache['impossible']}"
    kept = "each image and its mirror image" if cache["variants"] == 2 else "each image once"
    if cache["disk_bytes"] is None:
        return f"unknown, as the number of samples is; {kept}"
    return f"{decimal_size(cache['disk_bytes'])}, {kept}"


def _add_placement(table: Any, placement: dict[str, Any]) -> None:
    table.add_row(
        "if inline",
        f"{placement['share_of_trainer_time_if_inline']:.1%} of the trainers' time is encoding",
    )
    table.add_row(
        "if served",
        f"{placement['encoder_gpus']} encoder GPUs, {placement['encoder_gpus_per_trainer_gpu']:.3f} "
        f"per trainer GPU, {placement['encoder_gpus_busy']:.0%} busy; "
        f"{placement['encoder_gpus_if_tuned']} if the encoders are tuned",
    )
    hours = placement["gpu_hours"]
    row = f"inline {_hours(hours['inline'])}, service {_hours(hours['service'])}, cache "
    row += "–" if hours["cache"] is None else _hours(hours["cache"])
    if hours["cache"] is not None:
        row += f" and disk for the price of {_hours(hours['cache_disk_as_gpu_hours'])}"
    table.add_row(f"GPU-hours of {placement['gpu']}", row)
    if placement["run_hours"]:
        run = placement["run_hours"]
        table.add_row(
            "hours of the run",
            f"inline {_hours(run['inline'])}, service or cache {_hours(run['service'])}",
        )
    table.add_row("cheapest", placement["cheapest"])


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _print_layout(report: dict[str, Any], console: Console) -> None:
    table = new_table("layout", console)
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
            table.add_row(f"memory per GPU: {item}", gib(size))
    on = f"on each of {report['devices']}"
    if pipeline:
        on = f"on pipeline rank {report['memory_pipeline_rank']}, which needs the most"
    table.add_row("memory per GPU: all", f"{gib(memory['total'])} {on}")
    if report["host_memory_bytes_per_rank"]:
        table.add_row(
            "host memory per rank", f"{gib(report['host_memory_bytes_per_rank'])} of optimizer"
        )
    for item, size in report["wire_bytes_per_step"].items():
        if size and item != "total":
            table.add_row(f"wire per step: {item.replace('_', ' ')}", gib(size))
    console.print(table)


def print_batch(report: dict[str, Any], console: Console) -> None:
    """Batch arithmetic, steps and epochs."""
    table = new_table("training", console)
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


def new_table(title: str, console: Console) -> Any:
    """Two columns under a title, as wide as the console."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, width=console.width)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    return table


def gflops(value: int) -> str:
    """A number of FLOPs in 10⁹."""
    return f"{value / 1e9:,.1f}" if value >= 1e8 else f"{value / 1e9:.4f}"


def gib(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{size / 2**30:,.3f} GiB"
