"""A bundle, or images that exist, evaluated by one process from beginning to end.

Everything that can be wrong with what was asked is found before the first image is drawn: inputs are
opened, counts compared, weights loaded. Only weights may be missing without ending the evaluation; a
metric that lacks its own is left out of the numbers and named in the report. A metric that turns out to
be no number takes no other with it: hours of drawing may stand behind those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.data.plain_images import PlainImages
from dsr_scale.encoders.contract import ImageEncoder, build_image_encoder
from dsr_scale.evaluate import dpg, geneval
from dsr_scale.evaluate.counting import (
    TIMESTEP_BUCKETS,
    Begin,
    JudgeWeights,
    Work,
    count_held_out,
    count_images,
    count_reference,
    held_out_values,
    load_scorers,
)
from dsr_scale.evaluate.heldout_loss import HeldOutSet
from dsr_scale.evaluate.metrics import (
    OF_IMAGES,
    Benchmarks,
    ImageSums,
    Metric,
    RealImages,
    Scorers,
    obstacle,
    real_images,
    values_of,
)
from dsr_scale.evaluate.reference_set import Reference, ReferenceImages
from dsr_scale.evaluate.report import Report, by_reason
from dsr_scale.evaluate.sample_sets import Drawn, SampleSet, draw
from dsr_scale.export.bundle import BundleDescription
from dsr_scale.export.pipeline import Pipeline, load

_HELD_OUT = Metric.held_out_loss


@dataclass(frozen=True)
class Subject:
    """What is evaluated and against what: all of it opened, nothing computed."""

    bundle: Path | None
    description: BundleDescription | None
    """Of the bundle; None for images of unknown origin."""
    resolution: int
    """Side of all images, pixels."""
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
    weights: JudgeWeights


def evaluate(
    subject: Subject, metrics: Collection[Metric] | None, settings: Settings, begin: Begin
) -> Report:
    """Computes `metrics` (None: all that the subject allows).

    Raises InputError for metrics asked for that the subject does not allow, when none is left, and for
    images that cannot be read. A metric that was computed and is no number is in the report's `failed`.
    """
    report = Report()
    wanted = _allowed(subject, metrics, report)
    scorers = load_scorers(wanted, settings.weights, settings.device, report, subject.benchmarks)
    encoder = _held_out_encoder(subject, settings.device, report) if _HELD_OUT in wanted else None
    wanted -= report.not_computed.keys()
    if not wanted:
        raise InputError(
            found="nothing to compute: "
            + "\n".join(f"{n}: {why}" for n, why in by_reason(report.not_computed).items()),
            required="at least one metric with all that it needs",
            remedy="supply what is named above",
        )
    pipeline = None
    if subject.uses_network:
        assert subject.bundle is not None
        pipeline = load(subject.bundle, device=str(settings.device))
    report.settings = _described(subject, settings, scorers)
    work = Work(settings.batch, settings.device, begin)
    if OF_IMAGES & wanted:
        real = RealImages()
        if subject.reference is not None:
            seen = count_reference(subject.reference, wanted, scorers, work)
            real = real_images(subject.reference, seen)
            report.settings["reference"]["unusable"] = _unusable(subject.reference.images)
        sums = ImageSums(OF_IMAGES & wanted, subject.count, settings.device, subject.benchmarks)
        done = begin("images", subject.count)
        count_images(sums, scorers, _images(subject, pipeline, settings), done)
        report.settings["images"] = subject.count
        for metric in sums.metrics:
            with _failure_noted(report, metric):
                report.values |= values_of(metric, sums, real)
    if encoder is not None:
        assert pipeline is not None
        with _failure_noted(report, _HELD_OUT):
            report.values |= _held_out_losses(subject, pipeline, encoder, settings, work)
    return report


@contextlib.contextmanager
def _failure_noted(report: Report, metric: Metric) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        report.fail(metric, error)


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
        raise InputError(
            found=_unusable(subject.images) or f"{index} of {subject.count} images",
            required="images that can all be read: each counts",
            remedy="remove or replace those that are named",
        )


def _unusable(images: ReferenceImages | None) -> str | None:
    return images.unusable_report if isinstance(images, PlainImages) else None


def _held_out_encoder(
    subject: Subject, device: torch.device, report: Report
) -> ImageEncoder | None:
    """What turns held-out images into the bundle's latents. None, and left out, without its weights."""
    description = subject.description
    assert description is not None
    try:
        return build_image_encoder(
            description.encoders.image, resolution=description.resolution, device=device
        )
    except InputError as error:
        report.leave_out(_HELD_OUT, error)
        return None


def _held_out_losses(
    subject: Subject,
    pipeline: Pipeline,
    encoder: ImageEncoder,
    settings: Settings,
    work: Work,
) -> dict[str, float]:
    description, held_out = subject.description, subject.held_out
    assert description is not None and held_out is not None
    sums = count_held_out(
        held_out, pipeline, encoder, description.encoders, seed=settings.seed, work=work
    )
    return held_out_values(sums)


def _described(subject: Subject, settings: Settings, scorers: Scorers) -> dict[str, Any]:
    """All that a repetition needs."""
    found: dict[str, Any] = {
        "resolution": subject.resolution,
        "seed": settings.seed,
        "batch": settings.batch,
        "device": str(settings.device),
    }
    if subject.description is not None:
        found["bundle"] = str(subject.bundle)
        found["provenance"] = subject.description.provenance.model_dump(mode="json")
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
        found["clip_model"] = settings.weights.clip
    if scorers.geneval is not None:
        found["geneval"] = {
            "detector": settings.weights.detector,
            "clip_model": settings.weights.clip,
            "scores_are": geneval.COMPARABILITY,
        }
    if scorers.dpg is not None:
        found["dpg"] = {"vqa_model": settings.weights.vqa, "scores_are": dpg.COMPARABILITY}
    return found
