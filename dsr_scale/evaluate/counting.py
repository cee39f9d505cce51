"""What one process counts in its share of an evaluation: the same for a bundle and for a run.

`dsr-scale evaluate` is one process with everything as its share. The ranks of a training run have a part
each, add up the `tensors()` of what they counted, and one of them takes the numbers. Nobody waits for
anybody while counting, so shares need not be equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.data.shares import WHOLE, Share
from dsr_scale.encoders.contract import ImageEncoder, rounded
from dsr_scale.evaluate import geneval
from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.detection import ObjectDetector
from dsr_scale.evaluate.heldout_loss import HeldOutSet, HeldOutSums, add_losses
from dsr_scale.evaluate.inception import Inception, find_weights
from dsr_scale.evaluate.metrics import (
    NO_BENCHMARKS,
    OF_CLIP,
    OF_INCEPTION,
    Benchmarks,
    ImageSums,
    Metric,
    Scorers,
    metrics_of_real_images,
)
from dsr_scale.evaluate.object_colors import ColorClassifier
from dsr_scale.evaluate.reference_set import Reference
from dsr_scale.evaluate.report import Report
from dsr_scale.evaluate.sample_sets import Drawn, share_of
from dsr_scale.evaluate.visual_questions import VisualQuestions
from dsr_scale.export.pipeline import Pipeline

TIMESTEP_BUCKETS = 10
"""Equal parts of model time by which the held-out loss is reported."""

Begin = Callable[[str, int], Callable[[int], None]]
"""Announces a part of the work with its total, and is given what to call as it advances."""


@dataclass(frozen=True)
class Work:
    """How this process works, and on what part."""

    batch: int
    """Images at a time."""
    device: torch.device
    begin: Begin
    share: Share = WHOLE


@dataclass(frozen=True)
class JudgeWeights:
    """Where the networks that judge images are found; hub names or local paths."""

    inception: Path | None
    """None is the file in torch's cache."""
    clip: str
    detector: str | None = None
    """None where no GenEval is asked for."""
    vqa: str | None = None
    """None where no DPG-Bench is asked for."""


def load_scorers(
    wanted: Collection[Metric],
    weights: JudgeWeights,
    device: torch.device,
    report: Report,
    benchmarks: Benchmarks = NO_BENCHMARKS,
) -> Scorers:
    """The networks that judge. Metrics whose weights cannot be had are left out in `report`."""
    inception = clip = objects = questions = None
    if of_inception := OF_INCEPTION.intersection(wanted):
        with _left_out(report, of_inception):
            inception = Inception(find_weights(weights.inception), device)
    if of_clip := OF_CLIP.intersection(wanted):
        with _left_out(report, of_clip):
            clip = ClipScorer(weights.clip, device)
    if Metric.geneval in wanted and clip is not None:
        assert benchmarks.geneval is not None and weights.detector is not None
        with _left_out(report, [Metric.geneval]):
            detector = ObjectDetector(weights.detector, device)
            objects = geneval.GenEvalJudge(benchmarks.geneval, detector, ColorClassifier(clip))
    if Metric.dpg in wanted:
        assert weights.vqa is not None
        with _left_out(report, [Metric.dpg]):
            questions = VisualQuestions(weights.vqa, device)
    return Scorers(inception, clip, objects, questions)


@contextlib.contextmanager
def _left_out(report: Report, metrics: Collection[Metric]) -> Iterator[None]:
    """What these metrics are judged by may be missing; then they are left out."""
    try:
        yield
    except InputError as error:
        for metric in metrics:
            report.leave_out(metric, error)


def count_reference(
    reference: Reference, wanted: Collection[Metric], scorers: Scorers, work: Work
) -> ImageSums | None:
    """Sums over the share of the reference's images; None where its stored statistics do.

    `reference` was opened with the same share.
    """
    metrics = metrics_of_real_images(wanted, reference)
    if not metrics:
        return None
    assert reference.images is not None
    seen = ImageSums(metrics, reference.images.count, work.device)
    done = work.begin("reference", len(reference.images))
    index = share_of(reference.images.count, work.share).start
    for images in reference.images.batches(work.batch):
        seen.add(scorers, images, index)
        index += len(images)
        done(len(images))
    return seen


def count_images(
    sums: ImageSums, scorers: Scorers, images: Iterable[Drawn], done: Callable[[int], None]
) -> None:
    """Counts in the images to evaluate."""
    for drawn in images:
        sums.add(scorers, drawn.images, drawn.first_index, drawn.prompts)
        done(len(drawn.images))


def count_held_out(
    held_out: HeldOutSet,
    pipeline: Pipeline,
    encoder: ImageEncoder,
    encoders: EncodersConfig,
    *,
    seed: int,
    work: Work,
) -> HeldOutSums:
    """Losses of the share of a held-out set, whose images `encoder` turns into latents."""
    sums = HeldOutSums(TIMESTEP_BUCKETS, work.device)
    indices = share_of(len(held_out), work.share)
    done = work.begin("held-out loss", len(indices))
    for batch in held_out.batches(work.batch, indices):
        with torch.inference_mode():
            latents = encoder.encode(batch.images.to(work.device))
            condition = pipeline.condition(batch.prompts)
        add_losses(
            sums,
            pipeline.model,
            pipeline.diffusion,
            rounded(latents, encoders),
            condition,
            batch.sample_ids,
            seed=seed,
        )
        done(len(batch.images))
    return sums


def held_out_values(sums: HeldOutSums) -> dict[str, float]:
    """`held_out_loss` and `held_out_loss_t0`, …, of which it is the mean, from the sums of all ranks.

    Raises InputError for a bucket that is empty or not finite.
    """
    losses = sums.losses()
    return {"held_out_loss": sum(losses) / len(losses)} | {
        f"held_out_loss_t{bucket}": loss for bucket, loss in enumerate(losses)
    }
