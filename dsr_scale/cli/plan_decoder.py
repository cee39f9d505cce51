"""What `dsr-scale plan` says of a run that trains a decoder: sizes, FLOPs, memory, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dsr_scale.config.decoder import DecoderRun


def decoder_report(run: DecoderRun, *, devices: int) -> dict[str, Any]:
    """All that is shown, as JSON values; bytes, FLOPs and counts are plain integers.

    Raises InputError when the global batch does not divide over `devices`.
    """
    from dsr_scale.config import decoder_costs, derive, encoder_costs
    from dsr_scale.config.decoder import decoder_shape
    from dsr_scale.config.local_pack import local_pack

    shape = decoder_shape(run)
    counts, flops = decoder_costs.parameters(shape), decoder_costs.forward_flops(shape)
    layout = derive.parallel_layout(run, devices)
    batch = derive.batch_arithmetic(run, layout.dp)
    memory = decoder_costs.memory_per_gpu(run, shape, layout)
    images_seen = run.training.steps * batch.global_images
    samples = local_pack(run.data).samples
    return {
        "name": run.name,
        "devices": devices,
        "config": run.model_dump(mode="json"),
        "decoder": shape.model_dump(mode="json"),
        "parameters": counts | {"total": sum(counts.values())},
        "forward_flops_per_image": flops | {"total": sum(flops.values())},
        "training_flops_per_image": decoder_costs.training_flops(shape),
        "encoder_flops_per_image": encoder_costs.image_flops(run).count,
        "layout": {**layout._asdict(), "zero": run.parallel.zero},
        "memory_bytes_per_gpu": memory._asdict() | {"total": memory.total},
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
        "notes": _notes(run, batch.accumulation_steps),
    }


def _notes(run: DecoderRun, accumulation_steps: int) -> list[str]:
    notes = [
        "Not counted: LPIPS' classifier, the discriminator's ViT, the encoder, their activations, and "
        "the float32 decoder that every device keeps for evaluation."
    ]
    if run.decoder.adversarial is not None and accumulation_steps > 1:
        notes.append(
            "With gradient accumulation and the adversarial term images are made twice: 4 forwards "
            "for each image instead of 3. A larger micro-batch avoids it."
        )
    return notes


def print_decoder_report(report: dict[str, Any], console: Console) -> None:
    """Every block as a table, then the notes."""
    from rich.text import Text

    from dsr_scale.cli.plan_tables import gflops, gib, new_table, print_batch, print_config

    console.print(Text(report["name"], style="bold"))
    print_config(report["config"], console)
    sizes, table = report["decoder"], new_table("decoder", console)
    table.add_row(
        "sizes",
        f"width {sizes['width']}, depth {sizes['depth']}, heads {sizes['heads']}, "
        f"MLP {sizes['mlp_width']}",
    )
    table.add_row(
        "latents", f"{sizes['channels']} channels, grid {sizes['grid']} × {sizes['grid']}"
    )
    table.add_row("images", f"{sizes['resolution']} pixels, {sizes['patch']} for each latent")
    for part, count in report["parameters"].items():
        table.add_row(f"parameters: {'all' if part == 'total' else part}", f"{count:,}")
    for part, count in report["forward_flops_per_image"].items():
        table.add_row(
            f"forward per image: {'all' if part == 'total' else part}", f"{gflops(count)} GFLOPs"
        )
    table.add_row(
        "training per image", f"{gflops(report['training_flops_per_image'])} GFLOPs (3 × forward)"
    )
    encoder = report["encoder_flops_per_image"]
    table.add_row(
        "encoder per image", "unknown" if encoder is None else f"{gflops(encoder)} GFLOPs"
    )
    layout = report["layout"]
    table.add_row("ranks", f"{layout['dp']} data, ZeRO-{layout['zero']}")
    for item, size in report["memory_bytes_per_gpu"].items():
        table.add_row(f"memory per GPU: {'all' if item == 'total' else item}", gib(size))
    console.print(table)
    print_batch(report, console)
    for note in report["notes"]:
        console.print(Text(f"note: {note}", style="dim"))
