"""Copies of the frozen networks: a bundle with them needs neither the hub nor the paths of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from drawn_bundles import description_of, small_shape, write_drawn_bundle
from test_encoders_autoencoders import WIDTH as RAE_WIDTH
from test_encoders_autoencoders import _rae, _vae
from tiny_language_models import WIDTH, save_tiny
from tiny_runs import run_training

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    EncodersConfig,
    RaeDecoder,
    TransformersText,
    VaeDecoder,
    VaeImage,
    VitImage,
)
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.export.bundle import export_run, read_description
from dsr_scale.export.encoder_files import copy_models, models_to_copy
from dsr_scale.export.pipeline import load

PROMPTS = ["a red bus", "two cat"]


def text(model: str, revision: str | None = None) -> TransformersText:
    return TransformersText(model=model, channels=WIDTH, max_length=8, revision=revision)


def write_copy(out: Path, encoders: EncodersConfig, channels: int, grid: int) -> Path:
    """A bundle of a drawn network around these encoders, with their files in it."""
    shape = small_shape(
        channels=channels,
        grid=(grid, grid),
        text_kind="features",
        text_channels=WIDTH,
        text_length=8,
    )
    return write_drawn_bundle(out, encoders, shape=shape, copy_encoders=True)


def test_a_vae_and_a_language_model_travel_with_the_bundle(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    save_tiny(origin / "t5", "t5")
    _vae(origin / "vae", scaling_factor=0.3)
    (origin / "t5" / "pytorch_model.bin").write_bytes(b"another format, which is not read")
    image = VaeImage(model=str(origin / "vae"), channels=5, downsample=4)
    encoders = EncodersConfig(
        image=image, text=text(str(origin / "t5")), decoder=VaeDecoder(model=image.model)
    )
    bundle = write_copy(tmp_path / "bundle", encoders, channels=5, grid=8)
    expected = load(bundle, device="cpu").sample(PROMPTS, seed=1)
    assert expected.float().std() > 5

    moved = tmp_path / "moved"
    bundle.rename(moved)
    shutil.rmtree(origin)
    assert torch.equal(load(moved, device="cpu").sample(PROMPTS, seed=1), expected)
    directories = {path.name for path in moved.iterdir() if path.is_dir()}
    assert directories == {"text_encoder", "image_encoder"}, "encoder and decoder share one"
    assert not (moved / "text_encoder" / "pytorch_model.bin").exists()
    card = (moved / "README.md").read_text()
    assert str(origin / "t5") in card and "`text_encoder/`" in card


def test_a_vit_keeps_its_name_and_an_rae_its_decoder(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    _rae(origin)
    image = VitImage(
        model=str(origin / "vit"), name="owner/vit", channels=RAE_WIDTH, patch=14, input_size=56
    )
    save_tiny(origin / "t5", "t5 encoder")
    encoders = EncodersConfig(
        image=image, text=text(str(origin / "t5")), decoder=RaeDecoder(model=str(origin / "rae"))
    )
    bundle = write_copy(tmp_path / "bundle", encoders, channels=RAE_WIDTH, grid=4)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    latents = build_image_encoder(image, resolution=32, device="cpu").encode(images)
    shutil.rmtree(origin)
    found = read_description(bundle).encoders
    assert isinstance(found.image, VitImage) and found.image.known_as == "owner/vit"
    assert torch.equal(
        build_image_encoder(found.image, resolution=32, device="cpu").encode(images), latents
    )
    assert load(bundle, device="cpu").sample(PROMPTS, seed=1).shape == (2, 3, 32, 32)


def test_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a model that was downloaded before is copied at the pinned commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--t5" / "snapshots" / commit
    save_tiny(snapshot, "t5")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoders = EncodersConfig(text=text("owner/t5", revision=commit))
    copy_models(encoders, tmp_path)
    for file in snapshot.iterdir():
        assert (tmp_path / "text_encoder" / file.name).read_bytes() == file.read_bytes()
    assert models_to_copy(encoders) == {"text_encoder": f"owner/t5 @ {commit}"}
    with pytest.raises(InputError, match="hf download owner/other"):
        copy_models(EncodersConfig(text=text("owner/other")), tmp_path)


def test_exporting_again_leaves_nothing_of_the_bundle_before(tmp_path: Path) -> None:
    origin, out = tmp_path / "t5", tmp_path / "bundle"
    save_tiny(origin, "t5")
    encoders = EncodersConfig(text=text(str(origin)))
    write_copy(out, encoders, channels=192, grid=4)
    assert (out / "text_encoder" / "config.json").is_file()
    (out / "attention_bias.safetensors").write_bytes(b"of an encoder before")
    (out / "notes.txt").write_text("mine")
    write_copy(out, encoders, channels=192, grid=4)
    assert (out / "text_encoder" / "config.json").is_file()
    write_drawn_bundle(out)
    left = {path.name for path in out.iterdir()}
    assert left == {
        "README.md",
        "bundle.json",
        "model.safetensors",
        "model_index.json",
        "notes.txt",
        "packages.txt",
    }
    assert load(out, device="cpu").sample(["taxi"], seed=1).float().std() > 5


def test_what_is_not_of_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    """A person's own directories and README, and frozen networks that lie where a bundle would go."""
    save_tiny(tmp_path / "t5", "t5")
    encoders = EncodersConfig(text=text(str(tmp_path / "t5")))
    others = {
        "documented": ("README.md", "belongs to no bundle"),
        "taken": ("text_encoder/weights.bin", "which no bundle there mentions"),
    }
    for name, (file, message) in others.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(InputError, match=message):
            write_copy(tmp_path / name, encoders, channels=192, grid=4)
        kept = [one for one in (tmp_path / name).rglob("*") if one.is_file()]
        assert kept == [path] and path.read_text() == "mine"

    bundle = write_copy(tmp_path / "bundle", encoders, channels=192, grid=4)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    inside = EncodersConfig(text=text(str(bundle / "text_encoder")))
    for copy in (True, False):
        with pytest.raises(InputError, match="inside"):
            write_drawn_bundle(bundle, inside, copy_encoders=copy)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no weights in"):
        copy_models(EncodersConfig(text=text(str(tmp_path / "model"))), tmp_path)


def test_export_copies_when_asked_and_says_early_what_is_missing(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t5", "t5")
    config = text(str(tmp_path / "t5")).model_dump(mode="json")
    run = run_training(tmp_path, f"encoders.text={json.dumps(config)}", "training.steps=3")
    referenced, copied = tmp_path / "referenced", tmp_path / "copied"
    export_run(run, referenced)
    export_run(run, copied, copy_encoders=True)
    assert not (referenced / "text_encoder").exists()
    expected = load(referenced, device="cpu").sample(PROMPTS, seed=0)
    shutil.rmtree(tmp_path / "t5")
    assert torch.equal(load(copied, device="cpu").sample(PROMPTS, seed=0), expected)
    with pytest.raises(InputError, match="no directory"):
        export_run(run, tmp_path / "late", copy_encoders=True)
    assert not (tmp_path / "late" / "model.safetensors").exists()


def test_nothing_is_copied_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert models_to_copy(EncodersConfig()) == {}
    copy_models(EncodersConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert description_of(small_shape()).copied_models == {}
