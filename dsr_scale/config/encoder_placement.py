"""Where a run's encoders are best kept: on the trainers, on servers, or run once into a cache.

A prediction, from FLOPs and assumed shares of a measured ceiling. On equal GPUs all three compute the
same latents; what differs is who waits and how often an image is encoded. Inline takes the trainers'
own time, and all ranks of a replica wait for the one that encodes. Servers cost GPUs with headroom and
give the time back. A cache costs one pass and a disk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dsr_scale.config.costs import MEASURED_CEILING_TFLOPS
from dsr_scale.config.encoder_costs import Cache
from dsr_scale.config.run import RunConfig

GPU = "H200"

ENCODER_SHARES = (0.45, 0.60)
"""Shares of the bf16 ceiling that compiled frozen encoders reach: the first is planned with, the second
is what a well-tuned one can do."""

PRECISION_RATES = {"bf16": 1.0, "fp16": 1.0, "tf32": 494 / 989, "fp32": 67 / 989}
"""Matrix-product rate over that of bf16, from the datasheet: only bf16 was measured."""

HEADROOM = 1.3
"""Encoder GPUs over what the trainers consume: retries, cold starts, uneven batches."""

LEAST_SERVERS = 2
"""One may fail and training goes on."""

SMALL_SHARE = 0.10
"""Below this share of the trainers' time, GPUs of their own are not worth it for the encoders."""

LEAST_BUSY = 0.5
"""Servers that would idle more than half of the time are not recommended."""

GPU_HOURS_PER_TB_MONTH = 23 / 2.5
"""Price of disk in GPU-hours: $23 for a TB and month, $2.50 for a GPU-hour."""

HOURS_PER_MONTH = 730


class Workload(NamedTuple):
    """What a placement is decided from. Times are seconds of one GPU."""

    trainer_gpus: int
    replica_gpus: int
    """Tensor × pipeline ranks, which wait together when one of them encodes."""
    train_s: float
    """Per image, without encoders: GPU-seconds over all ranks of a replica."""
    image_s: float
    caption_s: float
    new_captions: float
    """Share of the captions that are not kept in memory since they were encoded before."""
    images_seen: int
    samples: int | None

    @property
    def encode_s(self) -> float:
        """Image and caption, on average over the run."""
        return self.image_s + self.new_captions * self.caption_s

    @property
    def encoders_per_trainer(self) -> float:
        """Encoder GPUs that are just busy with what one trainer GPU consumes."""
        return self.encode_s / self.train_s

    @property
    def inline_share(self) -> float:
        """Share of the trainers' time that inline encoding takes, when nothing hides it."""
        encoding = self.encode_s * self.replica_gpus
        return encoding / (encoding + self.train_s)

    @property
    def run_hours(self) -> float:
        """Duration of the run with latents always at hand."""
        return self.images_seen * self.train_s / self.trainer_gpus / 3600


class Placement(NamedTuple):
    """GPU-hours of encoding in each mode over the run, and what to take."""

    encoder_gpus: int
    busy: float
    """Share of the time that so many servers work."""
    inline_hours: float
    service_hours: float
    cache_hours: float | None
    """One pass; None where the cache is impossible or the samples are not counted."""
    disk_hours: float | None
    """The disk's price for the run, at least a month, in GPU-hours."""
    cheapest: str
    """Least GPU-hours, the disk's price among them."""
    recommended: str
    reason: str


def encode_seconds(
    flops: int, dtype: str, *, tf32: bool, share: float = ENCODER_SHARES[0]
) -> float:
    """Seconds of one GPU; fp32 runs as TF32 in a run that allows it."""
    return flops / (share * matrix_rate("tf32" if tf32 and dtype == "fp32" else dtype))


def matrix_rate(precision: str) -> float:
    """FLOP/s of large matrix products on one `GPU`."""
    return MEASURED_CEILING_TFLOPS[GPU] * 1e12 * PRECISION_RATES[precision]


def encoder_gpus(
    trainer_gpus: int, encoders_per_trainer: float, *, headroom: float = HEADROOM
) -> int:
    """Servers for so many trainer GPUs, at least `LEAST_SERVERS`; 0 if there is nothing to encode."""
    if not encoders_per_trainer:
        return 0
    return max(LEAST_SERVERS, math.ceil(headroom * trainer_gpus * encoders_per_trainer))


def place(work: Workload, cache: Cache) -> Placement:
    """Compares the three modes for a run."""
    gpus = encoder_gpus(work.trainer_gpus, work.encoders_per_trainer)
    busy = work.trainer_gpus * work.encoders_per_trainer / gpus if gpus else 0.0
    inline = work.images_seen * work.encode_s * work.replica_gpus / 3600
    service = gpus * work.run_hours
    passed = disk = None
    if work.samples is not None and cache.disk_bytes is not None:
        passed = work.samples * (cache.variants * work.image_s + work.caption_s) / 3600
        months = max(1.0, work.run_hours / HOURS_PER_MONTH)
        disk = cache.disk_bytes / 1e12 * months * GPU_HOURS_PER_TB_MONTH
    costs = {"inline": inline, "service": service}
    if passed is not None and disk is not None:
        costs["cache"] = passed + disk
    cheapest = min(costs, key=lambda mode: costs[mode])
    recommended, reason = _recommend(work, cache, costs, gpus, busy)
    return Placement(gpus, busy, inline, service, passed, disk, cheapest, recommended, reason)


def _recommend(
    work: Workload, cache: Cache, costs: dict[str, float], gpus: int, busy: float
) -> tuple[str, str]:
    """A mode and one sentence why."""
    share = work.inline_share
    if not work.encode_s:
        return "inline", "There is nothing to encode."
    if share <= SMALL_SHARE:
        cached = costs.get("cache", math.inf) < costs["inline"]
        return "inline", (
            f"Encoding takes {share:.1%} of the trainers' time, too little for GPUs of its own"
            + ("; a cache would save no more than that." if cached else " or a disk.")
        )
    if "cache" in costs and costs["cache"] <= min(costs["inline"], costs["service"]):
        assert work.samples and cache.disk_bytes
        return "cache", (
            f"Every sample is used {work.images_seen / work.samples:,.1f} times and encoded "
            f"{'once' if cache.variants == 1 else 'twice, as it is and mirrored'}; it needs "
            f"{decimal_size(cache.disk_bytes)} of disk."
        )
    if busy >= LEAST_BUSY:
        fewer = "takes fewer GPU-hours but " if costs["inline"] < costs["service"] else ""
        return "service", (
            f"Inline {fewer}makes the run {1 / (1 - share):.2f} times as long on the same GPUs; "
            f"{gpus} encoder GPUs, {busy:.0%} busy, take that off the trainers."
        )
    return "inline", (
        f"{gpus} encoder GPUs, the fewest that survive a failure, would be busy {busy:.0%} of the "
        f"time for {work.trainer_gpus} trainer GPU{'s' if work.trainer_gpus > 1 else ''}."
    )


def decimal_size(size: int) -> str:
    """Decimal units of disks and networks: 0.52 TB, 3.40 GB, 12.00 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale / 10:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,} bytes"


def trainer_caveats(run: RunConfig, *, grounded: bool) -> list[str]:
    """What makes the prediction weaker for this run."""
    caveats = []
    if not grounded:
        caveats.append(
            "There is no measured ground for this trainer's speed; if it is slower than assumed, "
            "fewer encoder GPUs suffice and the run takes longer."
        )
    kinds = {"image": run.encoders.image, "text": run.encoders.text}
    for name, encoder in kinds.items():
        dtype = getattr(encoder, "dtype", "bf16")
        if dtype == "fp32" and run.training.precision != "tf32":
            caveats.append(
                f"encoders.{name}.dtype = fp32 is assumed to run {1 / PRECISION_RATES['fp32']:.0f} "
                "times slower than bf16."
            )
    return caveats
