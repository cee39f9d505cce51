"""Run files of decoders: what they hold, what is refused, what `plan` counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_decoder_runs import config, load
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.cli.main import app
from dsr_scale.config import decoder_costs
from dsr_scale.config.checks import check_run
from dsr_scale.config.decoder import DecoderRun, decoder_shape
from dsr_scale.config.load import dump_run, load_any_run, load_run
from dsr_scale.config.reference import reference
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.config.schema_paths import leaf_paths
from dsr_scale.train.decoder_build import new_network

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED_GMACS = {"b": 22.2, "l": 78.1, "xl": 106.7}
"""RAE, table of decoders."""


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config(folder) | sections))
    return path


def test_the_section_decides_what_a_file_trains(tmp_path: Path) -> None:
    decoder = load_any_run(write(tmp_path))
    assert isinstance(decoder, DecoderRun)
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(decoder))
    assert load_any_run(again) == decoder
    transformer = load_any_run(CONFIGS / "quickstart.yaml")
    assert isinstance(transformer, RunConfig)
    assert load_run(CONFIGS / "quickstart.yaml") == transformer
    with pytest.raises(InputError, match="a run that trains a decoder"):
        load_run(again)


def test_unknown_keys_are_those_of_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean decoder\.noise_tau\?"):
        load_any_run(write(tmp_path), ["decoder.noise_taw=1"])
    with pytest.raises(InputError, match="model"):
        load_any_run(write(tmp_path, model={"preset": "DiT-S"}))


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"parallel": {"pp": 2}}, "parallel.pp = 2"),
        ({"parallel": {"offload": True}}, "offload = true"),
        ({"training": {"compile": True}}, "training.compile"),
        ({"training": {"recompute": "selective"}}, "selective"),
        ({"data": {"buckets": [[32, 16]]}}, "data.buckets"),
        ({"decoder": {"heads": 5}}, "decoder.heads = 5"),
        ({"decoder": {"width": None}}, "decoder.width"),
        ({"decoder": {"losses": {"l1": 0, "lpips": {"weight": 0}}}}, "a loss of reconstruction"),
        (
            {"decoder": {"adversarial": {"discriminator_start_step": 9}}},
            "generator_start_step = 2",
        ),
        ({"encoder": {"mode": "cache"}, "evaluation": {"shards": "x"}}, "evaluation.shards"),
        ({"checkpoint": {"allow_changed": ["model.width"]}}, "which is no setting"),
        ({"training": {"schedule": {"warmup_steps": 9}}}, "warmup_steps = 9"),
    ],
    ids=str,
)
def test_what_does_not_fit_together(tmp_path: Path, changes: dict[str, Any], needle: str) -> None:
    check_run(load(tmp_path), devices=2)
    with pytest.raises(InputError) as caught:
        check_run(load(tmp_path, **changes), devices=1)
    assert needle in str(caught.value)


def test_counted_parameters_are_the_network(tmp_path: Path) -> None:
    run = load(tmp_path, decoder={"width": 48, "depth": 3, "heads": 4, "mlp_width": 100})
    shape = decoder_shape(run)
    network = new_network(shape, seed=0)
    counted = decoder_costs.parameters(shape)
    assert sum(counted.values()) == sum(p.numel() for p in network.parameters())
    assert counted["blocks"] == sum(p.numel() for p in network.decoder.decoder_layers.parameters())


@pytest.mark.parametrize("preset", ["b", "l", "xl"])
def test_presets_cost_what_was_published(preset: str) -> None:
    """The published table leaves out attention's own products."""
    run = load_any_run(CONFIGS / "decoder" / "dinov2_b.yaml", [f"decoder.preset={preset}"])
    assert isinstance(run, DecoderRun)
    shape = decoder_shape(run)
    rows = shape.grid**2 + 1
    attention = shape.depth * 4 * rows**2 * shape.width
    macs = (sum(decoder_costs.forward_flops(shape).values()) - attention) / 2
    assert macs / 1e9 == pytest.approx(PUBLISHED_GMACS[preset], rel=0.01)


@pytest.mark.parametrize("name", ["siglip2_b_registers", "dinov2_b", "quickstart"])
def test_shipped_files_are_planned(name: str) -> None:
    path = CONFIGS / "decoder" / f"{name}.yaml"
    shown = CliRunner().invoke(app, ["plan", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["batch"]["global_images"] == report["batch"]["per_rank_images"]
    memory = report["memory_bytes_per_gpu"]
    assert memory["optimizer"] == 12 * report["parameters"]["total"]
    assert CliRunner().invoke(app, ["plan", str(path)]).exit_code == 0


def test_every_field_is_in_the_manual() -> None:
    text = reference()
    for path in set(leaf_paths(DecoderRun)) - set(leaf_paths(AnyRun)):
        assert f"`{path.rpartition('.')[2]}`" in text or f"`{path}`" in text, path
