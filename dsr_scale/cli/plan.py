"""`dsr-scale plan`: everything about a run that follows from its file, before a GPU is asked for.

Needs neither torch nor a GPU. What it prints is counted, except memory of activations where the notes
call it derived, and images per second, which are a prediction with what it assumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsr_scale.config.derive import ModelShape
    from dsr_scale.config.encoder_report import TrainerSpeed
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
    from dsr_scale.config.decoder import DecoderRun
    from dsr_scale.config.load import load_any_run

    run = load_any_run(config, overrides or [])
    check_run(run, devices=devices)
    if isinstance(run, DecoderRun):
        from dsr_scale.cli.plan_decoder import decoder_report, print_decoder_report

        report, show = decoder_report(run, devices=devices), print_decoder_report
    else:
        from dsr_scale.cli.plan_tables import print_report

        report, show = plan_report(run, devices=devices), print_report
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        show(report, Console(highlight=False))


def plan_report(run: RunConfig, *, devices: int) -> dict[str, Any]:
    """All that `plan` shows, as JSON values; bytes, FLOPs and counts are plain integers.

    Raises InputError when the replicas or the global batch do not divide over `devices`.
    """
    from dsr_scale.config import costs, derive
    from dsr_scale.config.encoder_report import encoder_report
    from dsr_scale.config.layout_report import layout_report
    from dsr_scale.config.local_pack import local_pack
    from dsr_scale.config.presets import with_preset

    run = run.model_copy(update={"model": with_preset(run.model)})
    shape = derive.model_shape(run)
    counts = costs.parameters(shape)
    flops = costs.forward_flops(shape)
    layout = layout_report(run, shape, devices=devices)
    batch = derive.batch_arithmetic(run, layout["layout"]["dp"])
    images_seen = run.training.steps * batch.global_images
    pack = local_pack(run.data)
    trainer = _trainer_speed(run, shape, layout["pipeline"])
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
        "samples": pack.samples,
        "epochs": images_seen / pack.samples if pack.samples else None,
        "predicted_images_per_s": _predictions(trainer, devices),
        "assumed_share": ASSUMED_SHARE,
        "encoders": encoder_report(
            run, layout=derive.parallel_layout(run, devices), pack=pack, trainer=trainer
        ),
        "notes": _notes(run, shape),
    }


def _trainer_speed(
    run: RunConfig, shape: ModelShape, pipeline: dict[str, Any] | None
) -> TrainerSpeed:
    from dsr_scale.config import costs
    from dsr_scale.config.encoder_report import TrainerSpeed

    training, parallel = run.training, run.parallel
    compiled = training.precision == "bf16" and training.compile
    plain = shape.width >= PREDICTED_FROM_WIDTH and parallel.tp == 1 and not parallel.offload
    flops = costs.training_flops(shape)
    return TrainerSpeed(
        flops=flops * 4 / 3 if training.recompute == "full" else flops,
        working=pipeline["balance"] * (1 - pipeline["bubble"]) if pipeline else 1.0,
        share=ASSUMED_SHARE,
        grounded=compiled and plain,
    )


def _predictions(trainer: TrainerSpeed, devices: int) -> dict[str, float]:
    """Images per second on all devices, by GPU; empty where there is no ground for a number."""
    from dsr_scale.config import costs

    if not trainer.grounded:
        return {}
    return {
        gpu: devices * trainer.working * trainer.share * ceiling * 1e12 / trainer.flops
        for gpu, ceiling in costs.MEASURED_CEILING_TFLOPS.items()
    }


def _notes(run: RunConfig, shape: ModelShape) -> list[str]:
    from dsr_scale.config.evaluation_checks import evaluation_notes
    from dsr_scale.config.layout_report import layout_notes

    notes = layout_notes(run) + evaluation_notes(run, shape)
    tokens = shape.channels * shape.patch**2
    widest = max(shape.width, shape.head.width if shape.head else 0)
    if widest < tokens:
        notes.append(
            f"The model is {widest} wide and its tokens have {tokens} values; a model narrower "
            "than its tokens trains poorly (RAE, docs/method.md §3). A head at least as wide helps."
        )
    return notes
