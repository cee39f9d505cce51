"""What is measured of a run while it trains, and how often (docs/evaluation.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.section import Section

ImageMetric = Literal["fid", "sfid", "inception_score", "precision_recall", "clip_score"]
MetricName = ImageMetric | Literal["held_out_loss"]

IMAGES_NEEDED: dict[ImageMetric, int] = {
    "fid": 2049,
    "sfid": 2024,
    "inception_score": 1008,
    "precision_recall": 4,
    "clip_score": 1,
}
"""The fewest generated images with which a metric is a number, those of `dsr-scale evaluate`."""

OF_REFERENCE: frozenset[MetricName] = frozenset({"fid", "sfid", "precision_recall"})


class EvaluationConfig(Section):
    """Measures of the first average of the weights while training, divided over all ranks: the numbers
    that `dsr-scale evaluate` gives for the exported bundle."""

    every_steps: int | None = Field(default=None, gt=0)
    """None measures nothing."""
    metrics: tuple[MetricName, ...] = ()
    """Those without their weights on disk are named at the start and left out."""
    images: int | None = Field(default=None, gt=0)
    """Images to draw, for all metrics but `held_out_loss`: at least 2049 for `fid`, 2024 for `sfid`, 1008
    for `inception_score`, 4 for `precision_recall`, 1 for `clip_score`."""
    prompts_file: str | None = None
    """One caption per line, from the first on again when they end; needed by models of captions. Models
    of classes draw all classes in turn."""
    reference: str | None = None
    """Real images for `fid`, `sfid` and `precision_recall`: a folder, packed shards, or an ADM `.npz`."""
    held_out: str | None = None
    """Shards that are not trained on, for `held_out_loss`."""
    held_out_samples: int | None = Field(default=None, gt=0)
    """Of these shards, spread evenly; None is all, at most 1000."""
    seed: int = Field(default=0, ge=0)
    """Of the noise of images and of the held-out loss; not the run's, so that runs compare."""
    batch_images: int = Field(default=32, gt=0)
    """Images at a time on each rank. A signal is heeded between two batches."""
    sampling: SamplingConfig | None = None
    """None is `grid.sampling`, which an exported bundle has too."""
    inception_weights: str | None = None
    """torch-fidelity's file; None is the one in torch's cache."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP model for `clip_score`: a directory or a hub name."""
