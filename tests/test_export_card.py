"""The model card and what lies beside it say what the run recorded, and mark what nobody recorded."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_bundles import small_shape, write_drawn_bundle
from huggingface_hub import ModelCard
from tiny_runs import run_training

from dsr_scale.config.encoders import EncodersConfig, PixelsImage, TransformersText
from dsr_scale.config.load import load_run
from dsr_scale.export.bundle import export_run, read_description
from dsr_scale.export.pipeline import load
from dsr_scale.job.attempt import Attempt, attempt_directory
from dsr_scale.job.record import write_record

OVERRIDES = (
    "grid.every_steps=6",
    "grid.prompts=[skull, taxi]",
    "grid.sampling={steps: 3, guidance: 2.0}",
    "tracking.norms_every_steps=3",
    "name='two | words'",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps; token norms at 3 and 6, a grid at 6, and two attempts that recorded packages."""
    run = run_training(tmp_path_factory.mktemp("card"), *OVERRIDES)
    config = load_run(run / "config.yaml", [])
    for job, started, package in (("10", "2026-01-02", "newest"), ("9", "2026-01-01", "older")):
        directory = attempt_directory(run, job, 0)
        Attempt(job, 0, "", 0, ("n",), None, f"{started}T00:00:00+00:00").write(directory)
        assert not write_record(directory, config, source=run, environment={})
        (directory / "record" / "packages.txt").write_text(f"{package}==1.0\n")
    return run


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    export_run(run, out)
    return out


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tables(card: str) -> dict[str, list[str]]:
    """First cell of every table row → its other cells."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in card.splitlines() if line[:1] == "|"]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_front_matter_is_what_the_hub_reads(bundle: Path) -> None:
    data = ModelCard.load(bundle / "README.md").data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "to-be-filled-in-by-the-owner"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["library_name"] == "dsr-scale"


def test_provenance_recipe_and_measures_are_the_run_s(run: Path, bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    told = tables(card)
    state = json.loads((run / "checkpoints" / "step_00000006" / "run_state.json").read_text())
    assert told["run"] == [r"two \| words"]
    assert told["optimizer steps"] == ["6"]
    assert told["images seen"] == ["48"]
    assert told["data fingerprint"] == [f"`{state['data_fingerprint']}`"]
    assert told["`training.optimizer.learning_rate`"] == ["0.01"]
    assert told["`training.ema_decays`"] == ["[0.9]"]
    assert told["registers; first block with them"] == ["4; 2"]
    last = records(run)[-1]
    assert last["step"] == 6
    for name in ("loss", "learning_rate", "samples_seen", "outlier_ratio", "max_over_median"):
        assert told[f"`{name}`"] == [f"{last[name]:.6g}", "6"], name
    assert not any(name.startswith("`time/") for name in told)


def test_outliers_are_the_largest_over_timesteps(run: Path, bundle: Path) -> None:
    last = records(run)[-1]
    told = tables((bundle / "README.md").read_text())
    columns = told["block"]
    assert columns == ["`max_over_median`", "`outlier_ratio`", "`register_over_median`"]
    for block in range(4):
        for column, cell in zip(columns, told[f"blocks.{block}"], strict=True):
            start = f"{column.strip('`')}/blocks.{block}/t"
            values = [value for name, value in last.items() if name.startswith(start)]
            assert cell == (f"{max(values):.4g}" if values else ""), (block, column)
    assert told["blocks.0"][2] == "" and told["blocks.3"][2] != ""


def test_an_earlier_step_tells_nothing_later(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path)
    assert (tmp_path / "sample_grid.png").read_bytes() == (
        run / "grids" / "step_00000006.png"
    ).read_bytes()
    # Into the same directory: the picture of step 6 must not stay.
    export_run(run, tmp_path, step=3, weights="raw")
    card = (tmp_path / "README.md").read_text()
    third = records(run)[2]
    assert tables(card)["`loss`"] == [f"{third['loss']:.6g}", "3"]
    assert not (tmp_path / "sample_grid.png").exists()
    assert "sample_grid" not in card


def test_links_lead_to_files_of_the_bundle(bundle: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (bundle / "README.md").read_text())
    assert links == ["sample_grid.png"]
    assert all((bundle / link).is_file() for link in links)


def test_packages_of_training_and_of_the_export(bundle: Path) -> None:
    assert (bundle / "training_packages.txt").read_text() == "newest==1.0\n"
    lines = (bundle / "packages.txt").read_text().splitlines()
    assert lines[0].startswith(f"# Python {platform.python_version()}, ")
    for name in ("torch", "safetensors", "diffusers"):
        assert f"{name}=={importlib.metadata.version(name)}" in lines


def test_licences_are_gaps_that_stand_out(bundle: Path) -> None:
    told = tables((bundle / "README.md").read_text())
    for what in ("these weights", "training images", "training captions", "frozen encoders"):
        assert "**TO BE FILLED IN BY THE OWNER**" in told[what][0]


def test_the_null_condition_is_among_the_weights(bundle: Path) -> None:
    """Guidance needs nothing else: changing that tensor changes the negative branch and no other."""
    pipeline = load(bundle, device="cpu")
    condition = pipeline.condition(["skull"])
    x = torch.randn(1, 192, 4, 4, generator=torch.Generator().manual_seed(0))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return pipeline.velocity(condition)(x, 0.5), pipeline.velocity(condition.as_null())(x, 0.5)

    with torch.no_grad():
        before = both()
        pipeline.model.get_parameter("y_embedder.null_token").add_(1.0)
        after = both()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_variants_of_the_network_are_in_the_recipe(tmp_path: Path) -> None:
    shape = small_shape(attention_variant="bias", registers_masked=True)
    write_drawn_bundle(tmp_path / "bias", shape=shape)
    told = tables((tmp_path / "bias" / "README.md").read_text())
    assert told["attention"] == ["bias"] and told["registers"] == ["masked from all other tokens"]
    drawn = load(tmp_path / "bias", device="cpu").sample(["taxi"], seed=0)
    assert drawn.float().std() > 5


def test_without_a_run_the_card_says_less(tmp_path: Path) -> None:
    text = TransformersText(model="google/t5-v1_1-base", revision="abc123", channels=768)
    encoders = EncodersConfig(image=PixelsImage(patch=8), text=text)
    write_drawn_bundle(tmp_path, encoders)
    card = (tmp_path / "README.md").read_text()
    for heading in ("## Metrics", "## Outlier tokens", "## Samples"):
        assert heading not in card
    kind, place = tables(card)["text encoder"]
    assert kind == "transformers, google/t5-v1_1-base @ abc123"
    assert place.startswith("not in this bundle")
    assert read_description(tmp_path).provenance.run_name == "drawn"
    assert not (tmp_path / "training_packages.txt").exists()
