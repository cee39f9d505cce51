"""The same questions to every trained network, through the commands that a person would use.

`dsr-scale export`, `evaluate` and `outliers` write their own files, which stay beside the run; this
module draws samples of fixed prompts, asks whether they show their prompts, and gathers one number
for each name. A network that was measured is not measured again unless its weights or the questions changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import model_shape
from dsr_scale.config.evaluation import IMAGES_NEEDED
from dsr_scale.config.run import RunConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.evaluate.heldout_loss import HeldOutSet
from dsr_scale.evaluate.inception import find_weights
from dsr_scale.evaluate.reference_set import data_at, open_reference
from dsr_scale.evaluate.sample_sets import spread
from tools.comparison.commands import here
from tools.comparison.runs import RUN, PlannedRun

MEASURES_FILE = "measures.json"
SAMPLES_FILE = "samples.npy"
OUTLIERS = "outliers"
_EVALUATION = "evaluation"
_CANDIDATES = 1000
"""Most training images among which a sample's nearest is sought."""
_LOGGED = 20
"""Last logged losses of training, whose mean is reported."""

MEANINGS = {
    "held_out_loss": "velocity loss on held-out images, mean over ten buckets of model time",
    "train_loss": f"training loss, mean of the last {_LOGGED} logged",
    "recognition": "share of samples whose nearest training image, in pixels, has their very caption",
    "recognition_chance": "the same of a sampler that ignores its prompt",
    "outlier_ratio_mean": "outlier ratio, mean over blocks and timesteps",
    "outlier_ratio_largest": "outlier ratio at the block and timestep where it is largest",
    "max_over_median_mean": "largest over median token norm, mean over blocks and timesteps",
    "max_over_median_largest": "the same where it is largest",
    "max_over_median_without_channels_largest": "… without each image's three channels of largest energy",
    "attention_top_norm_per_token_largest": "attention to the 1 % of image tokens with the largest norms, over uniform, where it is largest",
    "register_over_median_largest": "largest register norm over the median of image tokens, where it is largest",
    "fid": "Fréchet Inception distance",
    "clip_score": "CLIPScore",
    "parameters": "parameters of the network",
    "minutes": "minutes of training, as logged",
}
"""Name → what it is; those of `dsr-scale evaluate` beside these keep their names."""


@dataclass(frozen=True)
class Questions:
    """What every network is asked."""

    prompts: tuple[str, ...] = ()
    """Of the pictured samples."""
    recognition_prompts: int = 0
    """The first so many training captions are sampled and recognised; 0 leaves it out."""
    held_out: str | None = None
    held_out_samples: int | None = None
    outlier_images: int = 64
    timesteps: str = "0.1,0.3,0.5,0.7,0.9"
    outlier_data: str | None = None
    """None is what the run was trained on."""
    reference: str | None = None
    samples: int | None = None
    """Images to draw for FID and CLIPScore, of the prompts in turn."""
    inception_weights: str | None = None
    clip: str | None = None
    seed: int = 1
    batch: int = 16
    device: str = "auto"


def check_questions(asked: Questions, run: RunConfig) -> None:
    """Raises InputError for a question that a trained `run` could not be asked, before it is trained."""
    resolution = run.data.resolution
    if asked.held_out is not None:
        held_out = data_at(asked.held_out, resolution)
        HeldOutSet(held_out, model_shape(run), asked.held_out_samples)
    data = run.data if asked.outlier_data is None else data_at(asked.outlier_data, resolution)
    spread(len(open_samples(data)), asked.outlier_images, data.shards)
    of_fid = (asked.reference, asked.inception_weights)
    if any(of_fid) and not all(of_fid):
        raise InputError(
            found="one of --reference and --inception-weights",
            required="both, for FID",
            remedy="add the other, or leave both out",
        )
    if asked.reference is not None:
        find_weights(Path(str(asked.inception_weights)))
        open_reference(asked.reference, resolution)
    needed = IMAGES_NEEDED["fid"] if all(of_fid) else 1 if asked.clip else 0
    drawn = (asked.samples or len(asked.prompts)) if asked.prompts else 0
    if drawn < needed:
        raise InputError(
            found=f"{drawn} images to draw",
            required=f"at least {needed} for the metrics that were asked for, and their prompts",
            remedy="give --prompt, repeatedly, and --samples",
        )


def measure_run(one: PlannedRun, questions: Questions) -> dict[str, Any]:
    """The record of a trained run: `metrics`, `not_computed` and what they are of. Kept in its place."""
    _export(one)
    digest = json.loads((one.bundle / "bundle.json").read_text())["weights_digest"]
    asked = {"weights": digest, "questions": json.loads(json.dumps(asdict(questions)))}
    path = one.place / MEASURES_FILE
    if path.is_file():
        known = json.loads(path.read_text())
        if known["asked"] == asked:
            return known
    metrics, not_computed = _evaluated(one, questions)
    metrics |= _outliers(one, questions) | _training(one) | _sampled(one, questions)
    record = {
        "variant": one.variant,
        "seed": one.seed,
        "asked": asked,
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "not_computed": not_computed,
    }
    atomic_files.write_json(path, record)
    return record


def _export(one: PlannedRun) -> None:
    if not (one.bundle / "bundle.json").is_file():
        here("export", one.place / RUN, one.bundle)


def _evaluated(one: PlannedRun, asked: Questions) -> tuple[dict[str, float], dict[str, str]]:
    """What `dsr-scale evaluate` computes of what was asked, and why the rest is not there."""
    metrics = ["held_out_loss"] if asked.held_out else []
    words: list[object] = ["--seed", asked.seed, "--batch", asked.batch, "--device", asked.device]
    if asked.held_out:
        words += ["--held-out", asked.held_out]
    if asked.held_out_samples:
        words += ["--held-out-samples", asked.held_out_samples]
    if asked.reference and asked.inception_weights:
        metrics.append("fid")
        words += ["--reference", asked.reference, "--inception-weights", asked.inception_weights]
    if asked.clip:
        metrics.append("clip_score")
        words += ["--clip", asked.clip]
    left_out = {} if asked.held_out else {"held_out_loss": "no --held-out"}
    if "fid" not in metrics:
        left_out["fid"] = "no --reference with --inception-weights"
    if "clip_score" not in metrics:
        left_out["clip_score"] = "no --clip"
    if not metrics:
        return {}, left_out
    if metrics != ["held_out_loss"]:
        prompts = one.place / "prompts.txt"
        atomic_files.write_bytes(prompts, "".join(f"{p}\n" for p in asked.prompts).encode())
        words += ["--prompts-file", prompts]
        words += ["--samples", asked.samples] if asked.samples else []
    out = one.place / _EVALUATION
    names = ",".join(metrics)
    here("evaluate", one.bundle, "--metrics", names, *words, "--out", out)
    report = json.loads((out / "evaluation.json").read_text())
    return report["metrics"], {**left_out, **report["not_computed"]}


def _outliers(one: PlannedRun, asked: Questions) -> dict[str, float]:
    """`dsr-scale outliers` of the bundle, and a few numbers of its report."""
    from dsr_scale.evaluate.outlier_findings import load_findings

    out = one.place / OUTLIERS
    # A bundle does not know its data.
    data = asked.outlier_data or one.run.data.shards
    words = ["--data", data, "--images", asked.outlier_images, "--timesteps", asked.timesteps]
    words += ["--batch", asked.batch, "--device", asked.device, "--out", out]
    here("outliers", one.bundle, *words)
    (found,) = load_findings(out)
    return outlier_summary(found.measures)


def outlier_summary(measures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean and largest over blocks and timesteps of measures [L,S] whose last row is the output.

    What the network puts out is no block, and left out; so is what does not exist.
    """
    summary: dict[str, float] = {}
    for name in ("outlier_ratio", "max_over_median"):
        summary[f"{name}_mean"] = float(np.nanmean(measures[name][:-1]))
    for name in (
        "outlier_ratio",
        "max_over_median",
        "max_over_median_without_channels",
        "attention_top_norm_per_token",
        "register_over_median",
    ):
        inside = measures[name][:-1]
        inside = inside[np.isfinite(inside)]
        if inside.size:
            summary[f"{name}_largest"] = float(inside.max())
    return summary


def _training(one: PlannedRun) -> dict[str, float]:
    """Of the metrics file and the network's size."""
    from dsr_scale.model.build import build_on_meta
    from dsr_scale.telemetry.metrics import read_metrics

    records = [record for record in read_metrics(one.place / RUN) if "loss" in record]
    losses = [record["loss"] for record in records][-_LOGGED:]
    model = build_on_meta(model_shape(one.run))
    seen, speed = (
        [record[name] for record in records if record.get(name)]
        for name in ("samples_seen", "images_per_s")
    )
    found = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    if losses:
        found["train_loss"] = sum(losses) / len(losses)
    if seen and speed:
        found["minutes"] = seen[-1] * sum(1 / s for s in speed) / len(speed) / 60
    return found


def _sampled(one: PlannedRun, asked: Questions) -> dict[str, float]:
    """Draws the fixed prompts into a picture, and samples training captions to recognise them."""
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import image_grid

    by_class = one.run.model.conditioning.kind == "class"
    if not asked.prompts and not asked.recognition_prompts:
        return {}
    pipeline = load(one.bundle, device=asked.device)
    if asked.prompts:
        images = pipeline.sample(asked.prompts, seed=asked.seed, batch=asked.batch)
        np.save(one.place / SAMPLES_FILE, images.numpy())
        image_grid([(one.title, images)], asked.prompts, one.place / "samples.png")
    if not asked.recognition_prompts or by_class:
        return {}
    return _recognised(one, asked, pipeline)


def _recognised(one: PlannedRun, asked: Questions, pipeline: Any) -> dict[str, float]:
    from dsr_scale.evaluate.nearest import nearest_match
    from dsr_scale.evaluate.training_images import training_images

    images, captions = training_images(one.run.data, one.run.data.max_samples or _CANDIDATES)
    prompts = captions[: asked.recognition_prompts]
    samples = pipeline.sample(prompts, seed=asked.seed, batch=asked.batch)
    match = nearest_match(samples, prompts, images, captions)
    return {"recognition": match.rate, "recognition_chance": match.chance}


def pictured(runs: Sequence[PlannedRun], prompts: Sequence[str], path: Path) -> None:
    """One picture of the fixed prompts, a row for each measured run."""
    import torch

    from dsr_scale.telemetry.pictures import image_grid

    rows = [
        (one.title, torch.from_numpy(np.load(one.place / SAMPLES_FILE)))
        for one in runs
        if (one.place / SAMPLES_FILE).is_file()
    ]
    if rows and prompts:
        image_grid(rows, prompts, path, side=64)
