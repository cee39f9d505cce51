"""A bundle, or images that exist, evaluated by one process from beginning to end.

Everything that can be wrong with what was asked is found before the first image is drawn: inputs are
opened, counts compared, weights loaded. Only weights may be missing without ending the evaluation; a
metric that lacks its own is left out of the numbers and named in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.data.plain_images import PlainImages
from dsr_scale.encoders.contract import build_image_encoder, rounded
from dsr_scale.evaluate import dpg, geneval
from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.detection import ObjectDetector
from dsr_scale.evaluate.heldout_loss import HeldOutSet, HeldOutSums, add_losses
from dsr_scale.evaluate.inception import Inception, find_weights
from dsr_scale.evaluate.metrics import (
    OF_IMAGES,
    OF_INCEPTION,
    Benchmarks,
    ImageSums,
    Metric,
    RealImages,
    Scorers,
    metrics_of_real_images,
    obstacle,
    real_images,
    values,
)
from dsr_scale.evaluate.object_colors import ColorClassifier
from dsr_scale.evaluate.reference_set import Reference, ReferenceImages
from dsr_scale.evaluate.report import Report
from dsr_scale.evaluate.sample_sets import Drawn, SampleSet, draw
from dsr_scale.evaluate.visual_questions import VisualQuestions
from dsr_scale.export.bundle import BundleDescription
from dsr_scale.export.pipeline import Pipeline, load

TIMESTEP_BUCKETS = 10
"""Equal parts of model time by which the held-out loss is reported."""

Begin = Callable[[str, int], Callable[[int], None]]
"""Announces a part of the work with its total, and is given what to call as it advances."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated and against what: all of it opened, nothing computed."""

    bundle: Path | None
    description: BundleDescription | None
    """Of the bundle; None for images of unknown origin."""
    samples: SampleSet | None
    """Prompts of the images to draw, or of those that exist."""
    images: ReferenceImages | None
    """Images that exist; None to draw them."""
    reference: Reference | None
    benchmarks: Benchmarks
    """What `samples` are of."""
    held_out: HeldOutSet | None

    @property
    def count(self) -> int:
        """Images to evaluate."""
        if self.images is not None:
            return self.images.count
        return 0 if self.samples is None else len(self.samples)

    @property
    def uses_network(self) -> bool:
        """Whether the bundle's network is asked for anything."""
        draws = self.samples is not None and self.images is None
        return draws or self.held_out is not None


@dataclass(frozen=True)
class Settings:
    """How it is evaluated."""

    sampling: SamplingConfig | None
    """None without a bundle."""
    seed: int
    batch: int
    """Images at a time."""
    device: torch.device
    inception_weights: Path | None
    clip_model: str
    detector: str
    vqa_model: str


def evaluate(
    subject: Subject, metrics: Collection[Metric] | None, settings: Settings, begin: Begin
) -> Report:
    """Computes `metrics` (None: all that the subject allows).

    Raises InputError for metrics asked for that the subject does not allow, and when none is left.
    """
    report = Report()
    wanted = _allowed(subject, metrics, report)
    scorers = _scorers(wanted, subject, settings, report)
    wanted -= report.not_computed.keys()
    if not wanted:
        raise InputError(
            found="nothing to compute: "
            + "; ".join(f"{name}: {reason}" for name, reason in report.not_computed.items()),
            required="at least one metric with all that it needs",
            remedy="supply what is named above",
        )
    pipeline = None
    if subject.uses_network:
        assert subject.bundle is not None
        pipeline = load(subject.bundle, device=str(settings.device))
    report.settings = _described(subject, settings, scorers)
    if OF_IMAGES & wanted:
        real = _real_images(subject, wanted, scorers, settings, begin)
        sums = ImageSums(OF_IMAGES & wanted, subject.count, settings.device, subject.benchmarks)
        done = begin("images", subject.count)
        for drawn in _images(subject, pipeline, settings):
            sums.add(scorers, drawn.images, drawn.first_index, drawn.prompts)
            done(len(drawn.images))
        report.values |= values(sums, real)
        report.settings["images"] = subject.count
    if Metric.held_out_loss in wanted:
        assert pipeline is not None
        report.values |= _held_out_losses(subject, pipeline, settings, begin)
    return report


def _allowed(subject: Subject, metrics: Collection[Metric] | None, report: Report) -> set[Metric]:
    """The metrics asked for, or those that can be. Raises InputError for one that cannot."""
    wanted = set(Metric if metrics is None else metrics)
    for metric in sorted(wanted):
        problem = obstacle(
            metric,
            images=subject.count,
            reference=subject.reference,
            prompts=_captions_are_known(subject),
            benchmarks=subject.benchmarks,
            held_out=subject.held_out is not None,
        )
        if problem is None:
            continue
        if metrics is not None:
            raise problem
        report.leave_out(metric, problem)
        wanted.remove(metric)
    return wanted


def _captions_are_known(subject: Subject) -> bool:
    description = subject.description
    by_class = description is not None and description.shape.conditioning.kind == "class"
    return subject.samples is not None and not by_class


def _scorers(
    wanted: Collection[Metric], subject: Subject, settings: Settings, report: Report
) -> Scorers:
    """The networks that judge. Metrics whose weights cannot be had are left out in `report`."""
    inception = clip = objects = questions = None
    if of_inception := OF_INCEPTION.intersection(wanted):
        try:
            inception = Inception(find_weights(settings.inception_weights), settings.device)
        except InputError as error:
            for metric in of_inception:
                report.leave_out(metric, error)
    if Metric.clip_score in wanted:
        try:
            clip = ClipScorer(settings.clip_model, settings.device)
        except InputError as error:
            report.leave_out(Metric.clip_score, error)
    if Metric.geneval in wanted:
        assert subject.benchmarks.geneval is not None
        try:
            objects = geneval.GenEvalJudge(
                subject.benchmarks.geneval,
                ObjectDetector(settings.detector, settings.device),
                ColorClassifier(settings.clip_model, settings.device),
            )
        except InputError as error:
            report.leave_out(Metric.geneval, error)
    if Metric.dpg in wanted:
        try:
            questions = VisualQuestions(settings.vqa_model, settings.device)
        except InputError as error:
            report.leave_out(Metric.dpg, error)
    return Scorers(inception, clip, objects, questions)


def _real_images(
    subject: Subject,
    wanted: Collection[Metric],
    scorers: Scorers,
    settings: Settings,
    begin: Begin,
) -> RealImages:
    """The reference's statistics, from its images where they are not stored."""
    reference = subject.reference
    if reference is None:
        return RealImages()
    metrics = metrics_of_real_images(wanted, reference)
    if not metrics:
        return real_images(reference, None)
    assert reference.images is not None
    seen = ImageSums(metrics, reference.images.count, settings.device)
    done = begin("reference", reference.images.count)
    index = 0
    for images in reference.images.batches(settings.batch):
        seen.add(scorers, images, index)
        index += len(images)
        done(len(images))
    return real_images(reference, seen)


def _images(subject: Subject, pipeline: Pipeline | None, settings: Settings) -> Iterator[Drawn]:
    """The images to evaluate, drawn or read. Raises InputError for one that cannot be read."""
    if subject.images is None:
        assert pipeline is not None and subject.samples is not None
        assert settings.sampling is not None
        yield from draw(
            pipeline,
            subject.samples,
            seed=settings.seed,
            sampling=settings.sampling,
            batch=settings.batch,
        )
        return
    prompts = () if subject.samples is None else subject.samples.prompts
    index = 0
    for images in subject.images.batches(settings.batch):
        yield Drawn(index, images, prompts[index : index + len(images)])
        index += len(images)
    if index < subject.count:
        named = subject.images.unusable_report if isinstance(subject.images, PlainImages) else None
        raise InputError(
            found=named or f"{index} of {subject.count} images",
            required="images that can all be read: each counts",
            remedy="remove or replace those that are named",
        )


def _held_out_losses(
    subject: Subject, pipeline: Pipeline, settings: Settings, begin: Begin
) -> dict[str, float]:
    """`held_out_loss` and `held_out_loss_t0`, …, of which it is the mean."""
    description, held_out = subject.description, subject.held_out
    assert description is not None and held_out is not None
    encoder = build_image_encoder(
        description.encoders.image, resolution=description.resolution, device=settings.device
    )
    sums = HeldOutSums(TIMESTEP_BUCKETS, settings.device)
    done = begin("held-out loss", len(held_out))
    for batch in held_out.batches(settings.batch):
        with torch.inference_mode():
            latents = encoder.encode(batch.images.to(settings.device))
            condition = pipeline.condition(batch.prompts)
        add_losses(
            sums,
            pipeline.model,
            pipeline.diffusion,
            rounded(latents, description.encoders),
            condition,
            batch.sample_ids,
            seed=settings.seed,
        )
        done(len(batch.images))
    losses = sums.losses()
    mean = sum(losses) / len(losses)
    return {"held_out_loss": mean} | {
        f"held_out_loss_t{bucket}": loss for bucket, loss in enumerate(losses)
    }


def _described(subject: Subject, settings: Settings, scorers: Scorers) -> dict[str, Any]:
    """All that a repetition needs."""
    found: dict[str, Any] = {
        "seed": settings.seed,
        "batch": settings.batch,
        "device": str(settings.device),
    }
    if subject.description is not None:
        found["bundle"] = str(subject.bundle)
        found["provenance"] = subject.description.provenance.model_dump(mode="json")
        found["resolution"] = subject.description.resolution
    if subject.samples is not None:
        found["prompts"] = subject.samples.source
    if subject.images is not None:
        found["existing_images"] = True
    elif subject.samples is not None and settings.sampling is not None:
        found["sampling"] = settings.sampling.model_dump(mode="json")
    if subject.reference is not None:
        images = subject.reference.images
        found["reference"] = {
            "where": subject.reference.where,
            "fingerprint": subject.reference.fingerprint,
            "images": None if images is None else images.count,
        }
    if subject.held_out is not None:
        found["held_out"] = {
            "where": subject.held_out.where,
            "fingerprint": subject.held_out.fingerprint,
            "samples": len(subject.held_out),
            "timestep_buckets": TIMESTEP_BUCKETS,
        }
    if scorers.inception is not None:
        found["inception_weights_sha256"] = scorers.inception.weights_sha256
    if scorers.clip is not None:
        found["clip_model"] = settings.clip_model
    if scorers.geneval is not None:
        found["geneval"] = {
            "detector": settings.detector,
            "clip_model": settings.clip_model,
            "scores_are": geneval.COMPARABILITY,
        }
    if scorers.dpg is not None:
        found["dpg"] = {"vqa_model": settings.vqa_model, "scores_are": dpg.COMPARABILITY}
    return found
