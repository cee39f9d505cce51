"""Tiny runs that are evaluated while they train, and what they are evaluated with.

The networks that judge can be stood in for by a few numbers of the pixels: then every metric needs ten
images instead of thousands, and a run of three ranks takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import typer
from data_fixtures import write_list
from PIL import Image
from torch import Tensor, nn
from train_driver import drive
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.cli.evaluate import evaluate
from dsr_scale.config import evaluation as config
from dsr_scale.data.pack import pack
from dsr_scale.evaluate import counting, metrics
from dsr_scale.evaluate.inception import InceptionFeatures, find_weights
from dsr_scale.train import evaluation

SIDE = 32
PROMPTS = ("a red cat", "two dogs", "the bus", "a photo", "blue", "a tree", "nothing")
POOL, SPATIAL, CLASSES = 5, 4, 3
NEEDED: dict[config.ImageMetric, int] = {
    "fid": POOL + 1,
    "sfid": SPATIAL + 1,
    "inception_score": CLASSES,
}

ALL_METRICS = "fid, sfid, inception_score, precision_recall, clip_score, held_out_loss"


class Data(NamedTuple):
    """Where what an evaluation needs was written."""

    prompts: Path
    reference: Path
    """A folder of nine images."""
    held_out: Path
    """Shards of five samples."""
    weights: Path
    """A file that takes the place of Inception's."""


def write_data(folder: Path) -> Data:
    """Seven prompts, real images and held-out samples."""
    prompts, reference, weights = folder / "prompts.txt", folder / "real", folder / "weights"
    prompts.write_text("\n".join(PROMPTS))
    weights.write_text("none")
    reference.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(reference / f"{number}.png")
    pack(str(write_list(folder / "list", 5, height=SIDE, width=SIDE)), folder / "held_out")
    return Data(prompts, reference, folder / "held_out", weights)


def evaluated(data: Data, metrics_wanted: str = ALL_METRICS, *, images: int = 11) -> list[str]:
    """Overrides of the tiny run file: four steps, evaluated after the second and the fourth."""
    return [
        "training.steps=4",
        "training.global_batch_images=6",
        "training.microbatch_images=3",
        "model.depth=2",
        "encoders.text.max_length=16",
        "data.workers=0",
        "checkpoint.every_steps=2",
        "grid.sampling={steps: 2, guidance: 2.0}",
        "evaluation.every_steps=2",
        f"evaluation.metrics=[{metrics_wanted}]",
        f"evaluation.images={images}",
        "evaluation.batch_images=2",
        f"evaluation.prompts_file={data.prompts}",
        f"evaluation.reference={data.reference}",
        f"evaluation.held_out={data.held_out}",
        f"evaluation.inception_weights={data.weights}",
    ]


def offline(bundle: Path, data: Data, metrics_wanted: str, *more: object) -> dict[str, float]:
    """The numbers of `dsr-scale evaluate` for the same images and samples."""
    app = typer.Typer()
    app.command()(evaluate)
    words = [
        *(bundle, "--metrics", metrics_wanted.replace(" ", ""), "--prompts-file", data.prompts),
        *("--reference", data.reference, "--held-out", data.held_out),
        *("--inception-weights", data.weights, "--out", bundle / "numbers", "--device", "cpu"),
        *more,
    ]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((bundle / "numbers" / "evaluation.json").read_text())["metrics"]


class StandInInception:
    """Features that are linear in the pixels."""

    weights_sha256 = "none"
    batches: ClassVar[int] = 0
    """Counted in this process."""
    before_batch: ClassVar[Callable[[int], None]] = staticmethod(lambda batch: None)

    def __init__(self, weights: Path, device: torch.device) -> None:
        assert weights.is_file()

    def __call__(self, images: Tensor) -> InceptionFeatures:
        StandInInception.batches += 1
        StandInInception.before_batch(StandInInception.batches)
        pixels = images.double().flatten(1) / 255
        generator = torch.Generator().manual_seed(7)
        directions = torch.randn(
            pixels.shape[1], POOL + SPATIAL + CLASSES, generator=generator, dtype=torch.float64
        )
        features = (pixels @ directions / 10).float()
        return InceptionFeatures(*features.split([POOL, SPATIAL, CLASSES], dim=1))


class StandInClip:
    """Scores that depend on image and prompt."""

    def __init__(self, model: str, device: torch.device) -> None:
        pass

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return images.double().flatten(1).mean(1) + lengths


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Replaces what judges images, and what that needs."""
    patch.setattr(counting, "Inception", StandInInception)
    patch.setattr(counting, "ClipScorer", StandInClip)
    patch.setattr(metrics, "POOL_CHANNELS", POOL)
    patch.setattr(metrics, "SPATIAL_CHANNELS", SPATIAL)
    patch.setattr(metrics, "CLASSES", CLASSES)
    for metric, needed in NEEDED.items():
        patch.setitem(metrics.IMAGES_NEEDED, metrics.Metric(metric), needed)
        patch.setitem(config.IMAGES_NEEDED, metric, needed)


def drive_judged(
    config_file: Path, ids_file: Path, overrides: list[str], event: str = "none"
) -> tuple[str, int]:
    """Trains in this process, which is a rank's own; what became of it, and batches it judged.

    What it prints goes to `printed_RANK` beside the run file. `event` happens to the last rank when it
    judges its second batch: `signal`, which the others see before they go on, `error` or `input error`.
    `no weights` is its lack of Inception's, from the start.
    """
    patch = pytest.MonkeyPatch()
    stand_in(patch)
    rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    is_last = rank == world_size - 1
    signalled = config_file.with_name("signalled")
    if event == "no weights" and is_last:
        patch.setattr(counting, "find_weights", lambda given: find_weights(Path("/nowhere")))

    def before_batch(batch: int) -> None:
        if batch != 2:
            return
        if event == "signal" and not is_last:
            while not signalled.exists():
                time.sleep(0.05)
            time.sleep(1)
        if not is_last:
            return
        match event:
            case "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
                signalled.touch()
            case "error":
                raise ValueError("a broken judge")
            case "input error":
                raise InputError(found="nothing to see", required="a picture", remedy="look again")

    empty_network, networks = evaluation.empty_network, []

    def only_network(*arguments: Any) -> nn.Module:
        assert not any(network() for network in networks), "of an evaluation that is over"
        network = empty_network(*arguments)
        networks.append(weakref.ref(network))
        return network

    patch.setattr(evaluation, "empty_network", only_network)
    StandInInception.before_batch = before_batch
    with (
        config_file.with_name(f"printed_{rank}").open("w") as printed,
        contextlib.redirect_stderr(printed),
    ):
        try:
            drive(config_file, ids_file, 0, overrides)
        except Exception as error:
            return f"{type(error).__name__}: {error}", StandInInception.batches
    return "done", StandInInception.batches
