"""What `plan` says of a layout: ranks, the cut, memory, wire, as JSON values.

Counted are ranks, blocks, FLOPs, states and payloads; the notes name what is only derived.
"""

from __future__ import annotations

from typing import Any

from dsr_scale.config import memory, stages, wire
from dsr_scale.config.derive import ModelShape, batch_arithmetic, parallel_layout
from dsr_scale.config.run import RunConfig


def layout_report(run: RunConfig, shape: ModelShape, *, devices: int) -> dict[str, Any]:
    """Layout, pipeline (None without one), memory of the fullest rank, wire bytes of the busiest.

    Raises InputError when devices or the global batch do not divide, or blocks are too few.
    """
    parallel = run.parallel
    layout = parallel_layout(run, devices)
    microbatches = batch_arithmetic(run, layout.dp).accumulation_steps
    fullest = memory.memory_per_gpu(run, shape, layout, microbatches=microbatches)
    rank, sent = wire.busiest(run, shape, layout, microbatches=microbatches)
    return {
        "layout": {
            **layout._asdict(),
            "sp": parallel.sp,
            "virtual_stages": parallel.virtual_stages,
            "zero": parallel.zero,
            "offload": parallel.offload,
            "recompute": run.training.recompute,
        },
        "pipeline": _pipeline(run, shape, microbatches),
        "memory_bytes_per_gpu": fullest.device._asdict() | {"total": fullest.device.total},
        "memory_pipeline_rank": fullest.pipeline_rank,
        "parameters_per_gpu": fullest.parameters,
        "host_memory_bytes_per_rank": fullest.host_bytes,
        "wire_bytes_per_step": sent._asdict() | {"total": sent.total},
        "wire_pipeline_rank": rank,
    }


def _pipeline(run: RunConfig, shape: ModelShape, microbatches: int) -> dict[str, Any] | None:
    pp, virtual = run.parallel.pp, run.parallel.virtual_stages
    if pp == 1:
        return None
    report = stages.pipeline_report(shape, pp=pp, virtual_stages=virtual, microbatches=microbatches)
    total = sum(report.stage_flops)
    return {
        "stages": [
            {
                "pipeline_rank": stage % pp,
                "blocks": [span.start, span.stop],
                "forward_flops_per_image": flops,
                "share": flops / total,
            }
            for stage, (span, flops) in enumerate(
                zip(report.spans, report.stage_flops, strict=True)
            )
        ],
        "balance": report.balance,
        "bubble": report.bubble,
    }


def layout_notes(run: RunConfig) -> list[str]:
    """What the figures assume, and what is only derived."""
    parallel, training = run.parallel, run.training
    divided = {1: "optimizer and averages", 2: "optimizer, averages and gradients"}
    notes = [
        "Memory leaves out the frozen encoders, the caption's embedder, communication buffers and "
        "the allocator's slack.",
        f"ZeRO-{parallel.zero}: {divided.get(parallel.zero, 'everything but activations')} are "
        "divided over the data-parallel ranks.",
    ]
    if training.compile:
        notes.append(
            "Activations of compiled blocks are derived from perfect fusion, not measured."
        )
    if training.recompute != "none":
        notes.append(f"Activations under recompute = {training.recompute} are derived.")
    if parallel.tp > 1:
        notes.append(
            "Activations of a tensor rank are derived: heads and hidden units are divided, "
            + ("and so are the tokens." if parallel.sp else "the rest is on every rank.")
        )
    if parallel.pp > 1:
        notes.append(
            "FLOPs of stages are those of matrix products; element-wise work is not balanced."
        )
    if run.data.buckets:
        notes.append("FLOPs, tokens and memory are those of the square image, not of each bucket.")
    return notes
