"""`dsr-scale evaluate --geneval` and `--dpg`: through the command as by the judges themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from evaluate_command import run
from PIL import Image
from tiny_bundles import write_tiny_bundle
from tiny_detectors import save_tiny_vilt, save_tiny_yolos
from tiny_judges import save_tiny_clip

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.detection import ObjectDetector
from dsr_scale.evaluate.dpg import DpgSums, open_dpg
from dsr_scale.evaluate.geneval import GenEvalJudge, GenEvalSums, open_geneval
from dsr_scale.evaluate.object_colors import ColorClassifier
from dsr_scale.evaluate.visual_questions import VisualQuestions
from dsr_scale.export.pipeline import load

CPU = torch.device("cpu")
GENEVAL = (
    {"tag": "single_object", "include": [{"class": "couch", "count": 1}], "prompt": "a couch"},
    {
        "tag": "colors",
        "include": [{"class": "couch", "count": 1, "color": "red"}],
        "prompt": "a red couch",
    },
)
DPG = """item_id,text,proposition_id,dependency,tuple,question_natural_language
a,a red cat,1,0,entity - whole (cat),cat
a,a red cat,2,1,attribute - color (cat),a red cat
b,two dog,1,0,entity - whole (dog),cat
b,two dog,2,0,other - count (dog),dog
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(DPG)
    return path


def test_geneval_of_images_that_exist(
    geneval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = save_tiny_yolos(tmp_path / "yolos", {0: "person", 1: "dog", 2: "sofa"})
    clip = save_tiny_clip(tmp_path / "clip")
    folder = tmp_path / "images"
    folder.mkdir()
    blocks = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    pixels = blocks[[3, 4, 5, 0, 1, 2]].repeat(8, 1).repeat(8, 2)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    loaded: list[str] = []
    library = transformers.CLIPModel.from_pretrained

    def noted(source: str, **options: Any) -> Any:
        loaded.append(source)
        return library(source, **options)

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", noted)
    report = run(
        tmp_path / "out",
        *("--images", folder, "--geneval", geneval, "--metrics", "geneval,clip_score"),
        *("--detector", detector, "--clip", clip, "--batch", 4),
    )
    assert loaded == [str(clip)]  # once, for colours and for CLIPScore
    benchmark = open_geneval(geneval)
    sums = GenEvalSums(benchmark, 6)
    colors = ColorClassifier(ClipScorer(str(clip), CPU))
    judge = GenEvalJudge(benchmark, ObjectDetector(str(detector), CPU), colors)
    sums.add(judge, torch.from_numpy(pixels).permute(0, 3, 1, 2), 0)
    assert 0 < sums.values()["geneval_colors"] < 1 and report["metrics"]["clip_score"] > 0.1
    assert {n: v for n, v in report["metrics"].items() if "geneval" in n} == sums.values()
    assert report["settings"]["geneval"]["detector"] == str(detector)
    assert "mmdet" in report["settings"]["geneval"]["scores_are"]
    assert report["settings"]["prompts"].startswith(str(geneval))


def test_dpg_of_images_that_are_drawn(bundle: Path, dpg: Path, tmp_path: Path) -> None:
    vqa = save_tiny_vilt(tmp_path / "vilt")
    report = run(
        tmp_path / "out", bundle, "--dpg", dpg, "--metrics", "dpg", "--vqa", vqa, "--batch", 3
    )
    benchmark = open_dpg(dpg)
    images = load(bundle, device="cpu").sample(benchmark.sample_set().prompts, seed=0)
    sums = DpgSums(benchmark, 8)
    sums.add(VisualQuestions(str(vqa), CPU), images, 0)
    assert report["metrics"] == pytest.approx(sums.values())
    assert report["metrics"]["dpg"] == 75  # the second prompt's images show no cat
    assert report["settings"]["images"] == 8
    assert "mplug" in report["settings"]["dpg"]["scores_are"]


def test_what_is_missing_is_named(
    bundle: Path, geneval: Path, dpg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    asked = ("--metrics", "geneval,clip_score", "--clip", clip)
    report = run(out, bundle, "--geneval", geneval, *asked, "--detector", "no-one/no-detector")
    assert report["metrics"].keys() == {"clip_score"}
    assert "hf download no-one/no-detector" in report["not_computed"]["geneval"]
    with pytest.raises(InputError, match="give --dpg FILE"):
        run(out, bundle, "--geneval", geneval, "--metrics", "dpg")
    with pytest.raises(InputError, match="--geneval and --dpg"):
        run(out, bundle, "--geneval", geneval, "--dpg", dpg)
    with pytest.raises(InputError, match="--samples with --geneval"):
        run(out, bundle, "--geneval", geneval, "--samples", 2)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    with pytest.raises(InputError, match="3 images for 2 prompts"):
        run(out, "--images", folder, "--geneval", geneval)


def test_grids_among_the_images_do_not_count(geneval: Path, tmp_path: Path) -> None:
    """GenEval's own program puts a grid beside the samples of a prompt: a fifth image, as numbers go."""
    for prompt in ("00000", "00001"):
        folder = tmp_path / "images" / prompt
        (folder / "samples").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(folder / "samples" / f"{number:05}.png")
        Image.new("RGB", (12, 42)).save(folder / "grid.png")
    clip = save_tiny_clip(tmp_path / "clip")
    asked = ("--images", tmp_path / "images", "--geneval", geneval, "--metrics", "clip_score")
    with pytest.raises(InputError, match=r"00000/grid\.png in [\s\S]*12×42 pixels"):
        run(tmp_path / "out", *asked, "--clip", clip)
    for grid in tmp_path.glob("images/*/grid.png"):
        grid.unlink()
    assert run(tmp_path / "out", *asked, "--clip", clip)["settings"]["images"] == 8
