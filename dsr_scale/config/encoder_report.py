"""What `plan` says of the frozen encoders, as JSON values: costs, bytes, placement, what is assumed."""

from __future__ import annotations

from typing import Any, NamedTuple

from dsr_scale.config import encoder_costs, encoder_placement
from dsr_scale.config.derive import ParallelLayout
from dsr_scale.config.encoder_costs import Cache, Flops
from dsr_scale.config.encoder_placement import (
    ENCODER_SHARES,
    GPU,
    HEADROOM,
    LEAST_SERVERS,
    Workload,
)
from dsr_scale.config.encoders import TransformersText
from dsr_scale.config.local_pack import LocalPack
from dsr_scale.config.run import RunConfig


class TrainerSpeed(NamedTuple):
    """What the prediction of images per second assumes of the trainer."""

    flops: float
    """Of one image, with what is recomputed."""
    working: float
    """Share of a step in which a pipeline rank does not wait."""
    share: float
    """Share of the ceiling of matrix products that it reaches meanwhile."""
    grounded: bool
    """Whether there is ground for `share` in a run like this one."""


def encoder_report(
    run: RunConfig, *, layout: ParallelLayout, pack: LocalPack, trainer: TrainerSpeed
) -> dict[str, Any]:
    """The `encoders` block of `plan`; `placement` is None where something `unknown` prevents it."""
    flops = {
        "image": encoder_costs.image_flops(run),
        "text": encoder_costs.caption_flops(run),
    }
    kept = encoder_costs.cache(run, pack.samples)
    work = None
    unknown = _unknown(run, flops)
    if not unknown:
        work = _workload(run, flops, layout, pack, trainer)
    return {
        "image": _encoder(run.encoders.image, flops["image"]),
        "text": _encoder(run.encoders.text, flops["text"]),
        "network_bytes_per_image": encoder_costs.traffic(run, pack)._asdict(),
        "cache": kept._asdict(),
        "placement": None if work is None else _placement(work, kept, trainer.grounded),
        "unknown": unknown,
        "assumes": _assumptions(run, pack, work, trainer),
    }


def _unknown(run: RunConfig, flops: dict[str, Flops]) -> list[str]:
    """Why no placement can be predicted; nothing where it can."""
    reasons = [
        f"FLOPs of the {name} encoder: {cost.unknown}"
        for name, cost in flops.items()
        if cost.unknown is not None
    ]
    if run.training.device == "cpu":
        reasons.append("the speed of training.device = cpu")
    return reasons


def _encoder(config: Any, flops: Flops) -> dict[str, Any]:
    return {
        "kind": config.kind,
        "model": getattr(config, "model", None),
        "dtype": getattr(config, "dtype", None),
        "forward_flops": flops.count,
        "unknown": flops.unknown,
    }


def _workload(
    run: RunConfig,
    flops: dict[str, Flops],
    layout: ParallelLayout,
    pack: LocalPack,
    trainer: TrainerSpeed,
) -> Workload:
    tf32 = run.training.precision == "tf32"
    image_s, caption_s = (
        encoder_placement.encode_seconds(
            flops[name].count or 0, getattr(config, "dtype", "bf16"), tf32=tf32
        )
        for name, config in (("image", run.encoders.image), ("text", run.encoders.text))
    )
    rate = encoder_placement.matrix_rate(run.training.precision)
    return Workload(
        trainer_gpus=layout.devices,
        replica_gpus=layout.tp * layout.pp,
        train_s=trainer.flops / (trainer.working * trainer.share * rate),
        image_s=image_s,
        caption_s=caption_s,
        new_captions=_new_captions(run, pack, layout.dp),
        images_seen=run.training.steps * run.training.global_batch_images,
        samples=pack.samples,
    )


def _new_captions(run: RunConfig, pack: LocalPack, encoders: int) -> float:
    """Share of captions that none of so many encoders still has in memory.

    Captions are reckoned one per sample, at their full length; where more come by than memory is set
    aside for, none of them is still there when it comes again.
    """
    text = run.encoders.text
    if not isinstance(text, TransformersText) or pack.samples is None:
        return 1.0
    if pack.samples * encoder_costs.caption_token_bytes(run) > text.cache_mib << 20:
        return 1.0
    seen = run.training.steps * run.training.global_batch_images
    return min(1.0, pack.samples * encoders / seen)


def _placement(work: Workload, kept: Cache, grounded: bool) -> dict[str, Any]:
    placed = encoder_placement.place(work, kept)
    tuned = work.encoders_per_trainer * ENCODER_SHARES[0] / ENCODER_SHARES[1]
    return {
        "gpu": GPU,
        "share_of_trainer_time_if_inline": work.inline_share,
        "encoder_gpus_per_trainer_gpu": HEADROOM * work.encoders_per_trainer,
        "encoder_gpus": placed.encoder_gpus,
        "encoder_gpus_if_tuned": encoder_placement.encoder_gpus(work.trainer_gpus, tuned),
        "encoder_gpus_busy": placed.busy,
        "gpu_hours": {
            "inline": placed.inline_hours,
            "service": placed.service_hours,
            "cache": placed.cache_hours,
            "cache_disk_as_gpu_hours": placed.disk_hours,
        },
        "run_hours": {
            "inline": work.run_hours / (1 - work.inline_share),
            "service": work.run_hours,
            "cache": work.run_hours,
        }
        if grounded
        else None,
        "cheapest": placed.cheapest,
        "recommended": placed.recommended,
        "reason": placed.reason,
    }


def _assumptions(
    run: RunConfig, pack: LocalPack, work: Workload | None, trainer: TrainerSpeed
) -> list[str]:
    """What the block's numbers rest on, for this run."""
    lines = []
    if pack.sample_bytes is None and run.encoder.send == "files":
        lines.append(
            f"No pack can be read at data.shards: image files of {encoder_costs.ASSUMED_FILE_BYTES:,} "
            f"bytes, captions of {encoder_costs.ASSUMED_CAPTION_BYTES}."
        )
    if run.encoders.text.kind != "none":
        lines.append(
            "Text counts at its full length: what travels and what is kept is without padding. "
            "Captions are reckoned one per sample."
        )
    if work is None or not work.encode_s:
        return lines
    lines.append(
        f"Predicted, not measured: encoders reach {ENCODER_SHARES[0]:.0%} of the measured bf16 "
        f"ceiling ({ENCODER_SHARES[1]:.0%} if tuned), the trainer {trainer.share:.0%}; other "
        "precisions are slower in the datasheet's proportion; nothing of inline encoding is hidden."
    )
    lines.append(
        f"Encoder GPUs = ceil({HEADROOM} × trainer GPUs × encode time / training time per image), at "
        f"least {LEAST_SERVERS}. Disk costs "
        f"{encoder_placement.GPU_HOURS_PER_TB_MONTH:.1f} GPU-hours per TB and month."
    )
    return lines + encoder_placement.trainer_caveats(run, grounded=trainer.grounded)
