"""Which metrics there are, what each needs, and all of them over one pass of the images.

What a metric keeps of the images has a fixed shape and adds up. So processes evaluate any shares, of
uneven size or empty, and join by adding `tensors()` in order, once, at the end: there is nothing to
wait for in between and no number of batches to agree on. A metric without what it needs has an
obstacle, which says what to do about it, and no value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.clip_score import ClipScorer, ClipSums
from dsr_scale.evaluate.dpg import DpgBench, DpgSums
from dsr_scale.evaluate.frechet import (
    FeatureMoments,
    Gaussian,
    frechet_distance,
    require_samples,
    samples_needed,
)
from dsr_scale.evaluate.geneval import GenEval, GenEvalJudge, GenEvalSums
from dsr_scale.evaluate.inception import (
    CLASSES,
    POOL_CHANNELS,
    SPATIAL_CHANNELS,
    Inception,
    InceptionFeatures,
)
from dsr_scale.evaluate.inception_score import ScoreSums
from dsr_scale.evaluate.precision_recall import SAMPLES_NEEDED, FeatureRows, precision_recall
from dsr_scale.evaluate.reference_set import Reference
from dsr_scale.evaluate.visual_questions import VisualQuestions


class Metric(StrEnum):
    """Names on the command line and in reports."""

    fid = "fid"
    sfid = "sfid"
    inception_score = "inception_score"
    precision_recall = "precision_recall"
    clip_score = "clip_score"
    geneval = "geneval"
    dpg = "dpg"
    held_out_loss = "held_out_loss"


OF_REFERENCE = frozenset({Metric.fid, Metric.sfid, Metric.precision_recall})
OF_INCEPTION = OF_REFERENCE | {Metric.inception_score}
OF_CLIP = frozenset({Metric.clip_score, Metric.geneval})
OF_BENCHMARKS = frozenset({Metric.geneval, Metric.dpg})
OF_IMAGES = OF_INCEPTION | OF_BENCHMARKS | {Metric.clip_score}

IMAGES_NEEDED = {
    Metric.fid: samples_needed(POOL_CHANNELS),
    Metric.sfid: samples_needed(SPATIAL_CHANNELS),
    Metric.inception_score: CLASSES,
    Metric.precision_recall: SAMPLES_NEEDED,
    Metric.clip_score: 1,
    Metric.geneval: 1,
    Metric.dpg: 1,
}
"""The fewest images, generated or real, with which a metric is a number at all."""


class Sums(Protocol):
    """What adds up over batches and ranks."""

    def tensors(self) -> list[Tensor]:
        """The same number, shapes and order on every rank."""
        ...


def merge(into: Sums, other: Sums) -> None:
    """Adds what another process counted, as one all-reduce of every tensor would."""
    for total, part in zip(into.tensors(), other.tensors(), strict=True):
        total += part.to(total.device)


class Scorers(NamedTuple):
    """The networks that judge; None where nothing asks for one."""

    inception: Inception | None = None
    clip: ClipScorer | None = None
    geneval: GenEvalJudge | None = None
    dpg: VisualQuestions | None = None


class Benchmarks(NamedTuple):
    """Sets of prompts that say how their images are judged; None where the images are not theirs."""

    geneval: GenEval | None = None
    dpg: DpgBench | None = None


NO_BENCHMARKS = Benchmarks()


class ImageSums:
    """What some metrics need of a set of images, of which this process is shown its share."""

    def __init__(
        self,
        metrics: Collection[Metric],
        images: int,
        device: torch.device | str = "cpu",
        benchmarks: Benchmarks = NO_BENCHMARKS,
    ) -> None:
        """`images` is the number in the whole set.

        Raises InputError when it is not a multiple of the prompts of a benchmark that is wanted.
        """
        self.metrics = tuple(metric for metric in Metric if metric in metrics)
        """Those that are computed of the sums, in a fixed order."""
        wanted = metrics.__contains__
        self.pool = FeatureMoments(POOL_CHANNELS, device) if wanted(Metric.fid) else None
        self.spatial = FeatureMoments(SPATIAL_CHANNELS, device) if wanted(Metric.sfid) else None
        self.score = ScoreSums(images, CLASSES, device) if wanted(Metric.inception_score) else None
        self.rows = (
            FeatureRows(images, POOL_CHANNELS, device) if wanted(Metric.precision_recall) else None
        )
        self.clip = ClipSums(device) if wanted(Metric.clip_score) else None
        self.geneval = self.dpg = None
        if wanted(Metric.geneval):
            assert benchmarks.geneval is not None
            self.geneval = GenEvalSums(benchmarks.geneval, images, device)
        if wanted(Metric.dpg):
            assert benchmarks.dpg is not None
            self.dpg = DpgSums(benchmarks.dpg, images, device)

    def add(
        self, scorers: Scorers, images: Tensor, first_index: int, prompts: Sequence[str] = ()
    ) -> None:
        """Counts in uint8 images [B,3,H,W], neighbours in the set from `first_index` on.

        `prompts` are theirs, for CLIPScore.
        """
        if any(part is not None for part in (self.pool, self.spatial, self.score, self.rows)):
            assert scorers.inception is not None
            self.add_features(scorers.inception(images), first_index)
        if self.clip is not None:
            assert scorers.clip is not None
            self.clip.add(scorers.clip.scores(images, prompts))
        if self.geneval is not None:
            assert scorers.geneval is not None
            self.geneval.add(scorers.geneval, images, first_index)
        if self.dpg is not None:
            assert scorers.dpg is not None
            self.dpg.add(scorers.dpg, images, first_index)

    def add_features(self, features: InceptionFeatures, first_index: int) -> None:
        """Counts in what Inception says of images that are neighbours in the set."""
        if self.pool is not None:
            self.pool.add(features.pool)
        if self.spatial is not None:
            self.spatial.add(features.spatial)
        if self.score is not None:
            self.score.add(features.logits, first_index)
        if self.rows is not None:
            self.rows.add(features.pool, first_index)

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        of_inception = (self.pool, self.spatial, self.score, self.rows)
        parts = (*of_inception, self.clip, self.geneval, self.dpg)
        return [tensor for part in parts if part is not None for tensor in part.tensors()]


@dataclass(frozen=True)
class RealImages:
    """What is known of the reference set, once its images have been seen."""

    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Tensor | None = None
    """[N,2048]"""


def metrics_of_real_images(metrics: Collection[Metric], reference: Reference) -> set[Metric]:
    """Those for which the reference's images must be seen, since no statistics of theirs are stored."""
    stored = {Metric.fid: reference.pool, Metric.sfid: reference.spatial}
    return {metric for metric in OF_REFERENCE.intersection(metrics) if stored.get(metric) is None}


def real_images(reference: Reference, seen: ImageSums | None) -> RealImages:
    """Joins stored statistics with the sums over the reference's images, if any were needed.

    Raises InputError when too few of the images could be used.
    """
    pool, spatial, rows = (seen.pool, seen.spatial, seen.rows) if seen else (None, None, None)
    return RealImages(
        reference.pool if pool is None else pool.gaussian("fid (reference)"),
        reference.spatial if spatial is None else spatial.gaussian("sfid (reference)"),
        None if rows is None else rows.features(),
    )


def values(sums: ImageSums, real: RealImages) -> dict[str, float]:
    """The metrics' numbers by name, from the sums of all ranks.

    Raises the InputError of the first metric that has none.
    """
    found: dict[str, float] = {}
    for metric in sums.metrics:
        found |= values_of(metric, sums, real)
    return found


def values_of(metric: Metric, sums: ImageSums, real: RealImages) -> dict[str, float]:
    """One metric's numbers by name.

    Raises InputError for too few images, statistics without a real square root, and values that are
    not finite.
    """
    found = _computed(metric, sums, real)
    for name, value in found.items():
        if not math.isfinite(value):
            raise InputError(
                found=f"{name} = {value}",
                required="finite features of every image",
                remedy="check the weights that judge the images: Inception's or CLIP's",
            )
    return found


def _computed(metric: Metric, sums: ImageSums, real: RealImages) -> dict[str, float]:
    match metric:
        case Metric.fid:
            assert sums.pool is not None and real.pool is not None
            return {"fid": frechet_distance(sums.pool.gaussian("fid"), real.pool)}
        case Metric.sfid:
            assert sums.spatial is not None and real.spatial is not None
            return {"sfid": frechet_distance(sums.spatial.gaussian("sfid"), real.spatial)}
        case Metric.inception_score:
            assert sums.score is not None
            mean, std = sums.score.score()
            return {"inception_score": mean, "inception_score_std": std}
        case Metric.precision_recall:
            assert sums.rows is not None and real.features is not None
            generated = sums.rows.features()
            return precision_recall(real.features.to(generated.device), generated)._asdict()
        case Metric.clip_score:
            assert sums.clip is not None
            return {"clip_score": sums.clip.mean()}
        case Metric.geneval:
            assert sums.geneval is not None
            return sums.geneval.values()
        case Metric.dpg:
            assert sums.dpg is not None
            return sums.dpg.values()
        case Metric.held_out_loss:
            raise AssertionError("not a metric of images")


def obstacle(
    metric: Metric,
    *,
    images: int,
    reference: Reference | None,
    prompts: bool,
    held_out: bool,
    benchmarks: Benchmarks = NO_BENCHMARKS,
) -> InputError | None:
    """Why a metric cannot be computed from what was given, before anything is; None if it can.

    `images` is how many are to be evaluated, `prompts` whether it is known what they are to show.
    """
    if metric is Metric.held_out_loss:
        return None if held_out else _lacks("held-out set", "--held-out SHARDS")
    if metric in OF_BENCHMARKS and getattr(benchmarks, metric) is None:
        return _lacks(f"prompts of {metric}", f"--{metric} FILE")
    if images == 0:
        return _lacks("images to evaluate", "--prompts-file, --class-balanced, --data or --images")
    if metric is Metric.clip_score and not prompts:
        return _lacks("captions of the images", "--prompts-file or --data")
    if metric in OF_REFERENCE and reference is None:
        return _lacks("reference", "--reference FOLDER, SHARDS or FILE.npz")
    try:
        require_samples(metric, images, IMAGES_NEEDED[metric])
        if reference is not None and metric in metrics_of_real_images({metric}, reference):
            if reference.images is None:
                return _lacks(f"images or statistics of it in {reference.where}", _NPZ)
            require_samples(f"{metric} (reference)", reference.images.count, IMAGES_NEEDED[metric])
    except InputError as error:
        return error
    return None


_NPZ = "--reference with a folder of images, or a .npz that has arr_0"


def _lacks(what: str, option: str) -> InputError:
    return InputError(
        found=f"no {what}", required="what it is computed from", remedy=f"give {option}"
    )
