"""`dsr-scale registers`: what it writes serves a run, and what cannot work is refused at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from planted_vit import FIRST, SECOND, SIDE, coloured_images, save_planted_vit, write_run
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.base.token_outliers import outliers
from dsr_scale.cli.main import app
from dsr_scale.config.encoders import VitImage
from dsr_scale.config.load import load_run
from dsr_scale.data.plain_images import plain_images
from dsr_scale.encoders.patch_norms import token_norms
from dsr_scale.encoders.register_file import encoder_identity, load_register_file
from dsr_scale.encoders.vit import VitEncoder

SMALL = ("--images", "pictures", "--count", "16", "--top-k", "2")


def _registers(*words: object) -> str:
    """Runs the command in this process; returns what it printed. Raises what it raises."""
    done = CliRunner().invoke(app, ["registers", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the slow part, where it is not what is tested."""
    monkeypatch.setattr("dsr_scale.telemetry.norm_pictures.norm_map_picture", lambda *_: None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file, in the current folder, beside `pictures`."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path)[0]


def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dsr_scale.encoders.vit.VitEncoder.__init__", refuse)


@pytest.mark.usefixtures("undrawn")
def test_the_file_it_writes_cleans_the_encoder_of_a_run(run: Path) -> None:
    output = _registers(run, *SMALL, "--out", "found/registers.json")
    line = next(line for line in output.splitlines() if line.startswith("encoders.image.outliers="))
    image = load_run(run, [line]).encoders.image
    assert isinstance(image, VitImage)

    file = load_register_file("found/registers.json")
    assert file.neurons == {**FIRST, **SECOND}
    file.require_encoder(encoder_identity(image))
    images = plain_images(load_run(run).data, folder=Path("pictures"))
    list(images.batches(16))
    assert file.search["images"] == {
        "count": 16,
        "fingerprint": images.fingerprint,
        "resolution": SIDE,
    }
    assert file.search["settings"]["top_k"] == 2
    assert [done["highest_layer"] for done in file.search["passes"]] == [1, 4]

    batch, _, _ = coloured_images(8, seed=2)
    cpu = torch.device("cpu")
    plain = VitEncoder(load_run(run).encoders.image, resolution=SIDE, device=cpu)  # type: ignore[arg-type]
    biased = {"kind": "attention_bias", "neurons": "found/registers.json"}
    biased["bias"] = "found/registers.attention_bias.safetensors"
    for config, expected in (
        (plain.config, True),
        (image, False),
        (VitImage.model_validate({**image.model_dump(), "outliers": biased}), False),
    ):
        encoder = VitEncoder(config, resolution=SIDE, device=cpu)
        patches = token_norms(encoder, batch)[-1][:, encoder.patch_rows]
        assert bool(outliers(patches).any()) is expected


def test_it_prints_norms_before_and_after_each_pass_and_draws_maps(run: Path) -> None:
    output = _registers(run, *SMALL, "--out", "registers.json")
    titles = [line.strip() for line in output.splitlines()]
    assert [title for title in titles if title in ("before", "pass 1", "pass 2")] == [
        "before",
        "pass 1",
        "pass 2",
    ]
    assert "outlier ratio" in output and "register / median" in output
    assert "after 2 passes, 4 neurons" in output
    with Image.open("registers.png") as picture:
        assert picture.width > 500 and picture.height > 500
        # Both ends of the colour scale are there: black background norms and bright outliers.
        colours = torch.tensor(picture.convert("RGB").resize((200, 200)).getdata())
        assert len(colours.unique(dim=0)) > 50


def test_an_encoder_without_outliers_gets_no_file(run: Path) -> None:
    save_planted_vit(Path("vit"), planted=False)
    output = _registers(run, *SMALL, "--out", "registers.json")
    assert "needs no registers" in output
    assert not list(Path().glob("registers*"))


@pytest.mark.usefixtures("undrawn")
def test_outliers_that_are_left_are_told(run: Path) -> None:
    output = " ".join(_registers(run, *SMALL, "--passes", 1, "--out", "registers.json").split())
    assert "is not under 0.001 (passes used up): try more --passes" in output
    assert load_register_file("registers.json").neurons == FIRST
    with pytest.raises(InputError, match="lower --threshold"):
        _registers(run, *SMALL, "--threshold", 1e6, "--out", "other.json")


@pytest.mark.usefixtures("undrawn")
def test_the_run_says_how_registers_are_applied(run: Path) -> None:
    override = (
        "encoders.image.outliers={kind: registers, neurons: later.json, maximum: per_neuron, "
        "keep_first_patch: true}"
    )
    output = _registers(run, override, *SMALL, "--out", "later.json")
    assert "neurons: later.json, maximum: per_neuron, keep_first_patch: true}" in output
    settings = load_register_file("later.json").search["settings"]
    assert settings["maximum"] == "per_neuron" and settings["keep_first_patch"] is True


def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_model(monkeypatch)
    with pytest.raises(InputError, match="kind = pixels"):
        pixels = "encoders={image: {kind: pixels, patch: 8}, decoder: {kind: pixels}}"
        _registers(run, pixels, *SMALL, "--out", "registers.json")
    with pytest.raises(InputError, match="16 images in pictures\nrequired: 500 images"):
        _registers(run, "--images", "pictures", "--out", "registers.json")
    with pytest.raises(InputError, match="no folder that holds images"):
        _registers(run, "--images", "nowhere", "--out", "registers.json")
    with pytest.raises(InputError, match="a JSON file to write"):
        _registers(run, *SMALL, "--out", "pictures")
    with pytest.raises(InputError, match=r"run\.yaml is a file"):
        _registers(run, *SMALL, "--out", f"{run}/registers.json")
    with pytest.raises(AssertionError, match="the model was loaded"):
        _registers(run, *SMALL, "--out", "registers.json")


@pytest.mark.usefixtures("undrawn")
def test_the_commands_in_the_documentation_run(run: Path) -> None:
    """Every `dsr-scale registers` of docs/encoders.md, on the planted network and few images."""
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    dsr-scale registers (.*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        words = [str(run) if word.endswith(".yaml") else word for word in shlex.split(command)]
        _registers(*words, *SMALL)
    assert load_register_file("registers.json").neurons == {**FIRST, **SECOND}
