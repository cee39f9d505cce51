"""A representation autoencoder end to end: whitened ViT latents in, bundle elsewhere, pixels out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_encoders_autoencoders import WIDTH, _rae
from tiny_runs import CONFIG, run_training

from dsr_scale.config.data import DataConfig
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.encoders.contract import build_decoder, build_image_encoder
from dsr_scale.encoders.register_file import RegisterFile, save_register_file
from dsr_scale.encoders.statistics import LatentStatistics, save_statistics
from dsr_scale.encoders.whitening import statistics_identity
from dsr_scale.evaluate.training_images import training_images
from dsr_scale.export.bundle import export_run, read_description
from dsr_scale.export.encoder_files import NEURONS_FILE, STATISTICS_FILE
from dsr_scale.export.pipeline import load

SAMPLING = "grid.sampling={steps: 4, guidance: 1.5}"


def encoders_config(
    folder: Path, statistics: Path | None, neurons: Path | None = None
) -> dict[str, object]:
    image: dict[str, object] = {
        "kind": "vit",
        "model": str(folder / "vit"),
        "channels": WIDTH,
        "patch": 14,
        "input_size": 56,
    }
    if statistics is not None:
        image["statistics"] = str(statistics)
    if neurons is not None:
        image["outliers"] = {"kind": "registers", "neurons": str(neurons)}
    return {
        "image": image,
        "text": {"kind": "bytes"},
        "decoder": {"kind": "rae", "model": str(folder / "rae")},
    }


def test_whitened_latents_train_and_a_bundle_carries_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rae(tmp_path)
    data = DataConfig(shards="package:emoji", resolution=32)
    images, _ = training_images(data, 20)
    neurons = tmp_path / "registers.json"
    vit = str(tmp_path / "vit")
    save_register_file(neurons, RegisterFile(vit, None, 56, {0: (1, 3), 1: (2,)}, "by hand", {}))
    plain = EncodersConfig.model_validate(encoders_config(tmp_path, None, neurons))
    encoder = build_image_encoder(plain.image, resolution=32, device=torch.device("cpu"))
    path = tmp_path / "statistics.safetensors"
    assert isinstance(plain.image, VitImage)
    identity = statistics_identity(plain.image, 32)
    save_statistics(path, LatentStatistics.of(encoder.encode(images)), identity)
    whitened = EncodersConfig.model_validate(encoders_config(tmp_path, path, neurons))
    latents = build_image_encoder(whitened.image, resolution=32, device=torch.device("cpu")).encode(
        images
    )
    torch.testing.assert_close(latents.mean(0), torch.zeros_like(latents[0]), atol=1e-4, rtol=0)

    # The driver reads this folder's tiny.yaml; only the encoders differ.
    overrides = [
        f"encoders={yaml.safe_dump(encoders_config(tmp_path, path, neurons), default_flow_style=True)}"
    ]
    assert CONFIG["model"]["width"] < WIDTH
    run = run_training(tmp_path, *overrides, SAMPLING, "training.steps=3")
    export_run(run, tmp_path / "bundle")

    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "bundle", elsewhere)
    path.unlink()
    neurons.unlink()
    description = read_description(elsewhere)
    assert description.encoders.image.statistics == str(elsewhere / STATISTICS_FILE)  # type: ignore[union-attr]
    assert description.encoders.image.outliers.neurons == str(elsewhere / NEURONS_FILE)  # type: ignore[union-attr]
    monkeypatch.chdir("/")
    pipeline = load(elsewhere, device="cpu")
    drawn = pipeline.sample(["skull", "taxi"], seed=0, sampling=description.sampling)
    latents = pipeline.latents(["skull", "taxi"], seed=0, sampling=description.sampling)
    decoder = build_decoder(description.encoders, resolution=32, device=torch.device("cpu"))
    assert decoder is not None
    assert torch.equal(drawn, decoder.decode(latents))
    assert drawn.float().std() > 5
