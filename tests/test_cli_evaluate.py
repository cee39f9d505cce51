"""`dsr-scale evaluate`: numbers, reasons where there are none, and mistakes found before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fixtures import write_list
from evaluate_command import app, run
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bundles import SIDE, write_tiny_bundle
from tiny_judges import save_random_inception, save_tiny_clip
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.data.pack import pack
from dsr_scale.evaluate import offline
from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.inception import Inception
from dsr_scale.evaluate.precision_recall import precision_recall
from dsr_scale.export.pipeline import load

PROMPTS = ("a red cat", "two dog", "the bus", "a photo", "blue")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pack(str(write_list(folder / "list", 6, height=SIDE, width=SIDE)), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(autouse=True)
def no_cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_metrics_without_weights_are_named_and_the_others_run(
    bundle: Path, clip: Path, shards: Path, prompts: Path, tmp_path: Path
) -> None:
    asked = ("--metrics", "precision_recall,clip_score,held_out_loss")
    given = ("--prompts-file", prompts, "--reference", shards, "--held-out", shards)
    report = run(tmp_path, bundle, *asked, *given, "--clip", clip, "--batch", 2, "--seed", 3)
    assert report["not_computed"].keys() == {"precision_recall"}
    assert "releases/download" in report["not_computed"]["precision_recall"]
    assert "--inception-weights" in report["not_computed"]["precision_recall"]

    pipeline = load(bundle, device="cpu")
    images = pipeline.sample(PROMPTS, seed=3)
    expected = float(ClipScorer(str(clip), CPU).scores(images, PROMPTS).mean())
    metrics = report["metrics"]
    assert metrics["clip_score"] == pytest.approx(expected, rel=0.05) and expected > 0.1
    buckets = [metrics[f"held_out_loss_t{bucket}"] for bucket in range(10)]
    assert metrics["held_out_loss"] == pytest.approx(np.mean(buckets))
    assert len(metrics) == 12
    settings = report["settings"]
    assert (settings["seed"], settings["images"]) == (3, 5)
    assert settings["sampling"]["guidance"] == 2.0
    assert (settings["held_out"]["where"], settings["held_out"]["samples"]) == (str(shards), 6)
    assert settings["reference"]["images"] == 6
    assert {"dsr-scale", "torch", "transformers"} <= report["versions"].keys()

    other = run(tmp_path, bundle, *asked, *given, "--clip", clip, "--batch", 5, "--seed", 3)
    for name, value in metrics.items():
        assert other["metrics"][name] == pytest.approx(value, rel=1e-3), name


def test_images_that_exist_against_real_ones(
    bundle: Path, clip: Path, prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch_fidelity")
    weights = save_random_inception(tmp_path / "inception.pth")
    generator = np.random.default_rng(0)
    real = generator.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8).repeat(5, 1).repeat(5, 2)
    # All drawn images are nearly one of the real ones: precise, and most of what is real is missed.
    images = np.repeat(real[:1] // 2, 5, axis=0) + generator.integers(0, 4, (5, 1, 1, 3), np.uint8)
    real[0] = images[0]
    (tmp_path / "drawn").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"drawn/{number}.png")
    (tmp_path / "real").mkdir()
    for number, pixels in enumerate(real):
        Image.fromarray(pixels).save(tmp_path / f"real/{number}.png")
    (tmp_path / "real/2a.png").write_bytes(b"no image")
    report = run(
        tmp_path / "out",
        *("--images", tmp_path / "drawn", "--prompts-file", prompts, "--clip", clip),
        *("--reference", tmp_path / "real", "--inception-weights", weights, "--batch", 3),
    )
    inception = Inception(weights, CPU)

    def pool(pictures: np.ndarray) -> torch.Tensor:
        return inception(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()).pool

    expected = precision_recall(pool(real), pool(images))
    assert expected.precision > 2 * expected.recall > 0
    metrics = report["metrics"]
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(tuple(expected))
    assert metrics.keys() == {"precision", "recall", "clip_score"}
    # By default what cannot be computed is left out, and said to be.
    reasons = report["not_computed"]
    without = {"fid", "sfid", "inception_score", "geneval", "dpg", "held_out_loss"}
    assert reasons.keys() == without
    assert "at least 2049" in reasons["fid"] and "at least 1008" in reasons["inception_score"]
    settings = report["settings"]
    assert len(settings["inception_weights_sha256"]) == 64 and settings["resolution"] == 40
    assert "1 of 6 images unusable: 2a.png" in settings["reference"]["unusable"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "fid,kid"], "of which kid is unknown"),
        (["--metrics", "fid", "--prompts-file", "P", "--reference", "S"], "at least 2049"),
        (["--metrics", "fid", "--prompts-file", "P", "--samples", "3000"], "no reference"),
        (["--metrics", "held_out_loss"], "no held-out set"),
        (["--prompts-file", "P", "--data", "S"], "--prompts-file and --data"),
        (["--images", "S", "--samples", "3"], "--samples with --images"),
        (["--images", "S", "--steps", "3"], "--steps with --images"),
        (["--held-out", "S", "--guidance", "3"], "--guidance with nothing to draw"),
        (["--prompts-file", "P", "--held-out-samples", "3"], "--held-out-samples with"),
        (["--class-balanced", "7"], "conditioned by cross_attention"),
        (["--images", "S", "--prompts-file", "P"], "5 prompts in"),
        ([], "nothing to compute: clip_score, fid, .*, sfid: no images to evaluate;"),
        (["--prompts-file", "P", "--clip", "no such model"], "nothing to compute"),
        (["--data", "S", "--samples", "7"], "required: 7 samples"),
        (["--prompts-file", "P", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_mistakes(
    bundle: Path, shards: Path, prompts: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    words = [{"P": str(prompts), "S": str(shards)}.get(word, word) for word in options]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(
            app, [str(bundle), "--out", str(tmp_path), *words], catch_exceptions=False
        )
    assert not (tmp_path / "evaluation.json").exists()


def test_without_a_bundle_there_is_nothing_to_draw(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle"):
        run(tmp_path, "--data", shards)
    with pytest.raises(InputError, match="no bundle"):
        run(tmp_path, "--images", shards, "--held-out", shards)
    with pytest.raises(InputError, match="no image to begin with"):
        run(tmp_path, "--images", tmp_path / "nothing.npz")
    with pytest.raises(InputError) as missing:
        run(tmp_path, "--images", tmp_path / "nothing")
    assert missing.value.remedy == "correct the path"


def test_an_image_that_cannot_be_read_ends_the_evaluation(
    clip: Path, prompts: Path, tmp_path: Path
) -> None:
    for number in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    asked = ("--images", tmp_path, "--prompts-file", prompts, "--clip", clip)
    with pytest.raises(InputError, match=r"found: 2\.png in "):
        run(tmp_path / "out", *asked)
    # With a header that can be read, what is wrong shows only with the pixels.
    (tmp_path / "2.png").unlink()
    Image.effect_noise((8, 8), 99).save(tmp_path / "2.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"1 of 5 images unusable: 2\.jpg"):
        run(tmp_path / "out", *asked)
    (tmp_path / "2.jpg").unlink()
    Image.new("RGB", (8, 9)).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2\.png in [\s\S]*8×9 pixels[\s\S]*8×8 pixels"):
        run(tmp_path / "out", *asked)


def test_a_metric_that_is_no_number_takes_no_other_with_it(
    bundle: Path, shards: Path, prompts: Path, tmp_path: Path
) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    weights = load_file(clip / "model.safetensors")
    weights["text_projection.weight"][0, 0] = torch.nan
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no number of clip_score[\s\S]*the other metrics are in"):
        run(out, bundle, "--prompts-file", prompts, "--held-out", shards, "--clip", clip)
    report = json.loads((out / "evaluation.json").read_text())
    assert "clip_score = nan" in report["failed"]["clip_score"]
    assert "held_out_loss" in report["metrics"] and "clip_score" not in report["metrics"]


def test_an_encoder_that_is_not_there_is_found_before_anything_is_drawn(
    bundle: Path,
    clip: Path,
    shards: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise InputError(found="no encoder", required="one", remedy="hf download it")

    monkeypatch.setattr(offline, "build_image_encoder", missing)
    asked = (bundle, "--prompts-file", prompts, "--held-out", shards)
    report = run(tmp_path, *asked, "--clip", clip)
    assert "hf download it" in report["not_computed"]["held_out_loss"]
    assert report["metrics"].keys() == {"clip_score"}
    monkeypatch.setattr(offline, "draw", lambda *_, **__: pytest.fail("drew"))
    with pytest.raises(InputError, match="nothing to compute"):
        run(tmp_path, *asked, "--metrics", "held_out_loss")
