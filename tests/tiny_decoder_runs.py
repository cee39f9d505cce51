"""Runs that train a decoder in a second or two, on the shipped emoji, with weights made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rank_processes import run_ranks

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.encoders import VitImage
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.statistics import LatentStatistics, save_statistics
from dsr_scale.encoders.whitening import statistics_identity
from dsr_scale.evaluate.training_images import training_images

RESOLUTION, WIDTH, PATCH = 32, 24, 4


def config(folder: Path) -> dict[str, Any]:
    """The run file; weights lie in `folder`, where `write_weights` put them."""
    return {
        "name": "tiny decoder",
        "directory": str(folder / "run"),
        "seed": 3,
        "data": {
            "shards": "package:emoji",
            "max_samples": 24,
            "resolution": RESOLUTION,
            "workers": 0,
        },
        "encoders": {
            "image": {
                "kind": "vit",
                "model": str(folder / "vit"),
                "channels": WIDTH,
                "patch": PATCH,
                "input_size": 16,
                "statistics": str(folder / "statistics.safetensors"),
            },
            "text": {"kind": "none"},
        },
        "decoder": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "noise_tau": 0.2,
            "losses": {"lpips": {"network": "alex", "backbone": str(folder / "alexnet.pth")}},
            "adversarial": {
                "model": str(folder / "dino"),
                "blocks": [0, 1],
                "discriminator_start_step": 1,
                "generator_start_step": 2,
                "optimizer": {"learning_rate": 1e-3, "eps": 1e-4},
            },
        },
        "training": {
            "steps": 6,
            "global_batch_images": 8,
            "microbatch_images": 4,
            "precision": "fp32",
            "device": "cpu",
            # A key bias has no gradient but rounding; Adam's usual eps would blow that up.
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "eps": 1e-4},
            "ema_decays": [0.9],
        },
        "checkpoint": {"every_steps": 3, "keep_last": 5},
        "evaluation": {"every_steps": None, "images": 12, "shown": 3},
        "tracking": {"log_every_steps": 1, "wandb": "off"},
    }


def write_weights(folder: Path) -> None:
    """A random encoder with registers, latent statistics, a discriminator's ViT, LPIPS' AlexNet."""
    declare_torchvision_operators()
    import transformers
    from tiny_vision_transformers import save_vit

    folder.mkdir(exist_ok=True)
    save_vit(folder / "vit", "dinov2 with registers")
    torch.manual_seed(1)
    dino = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            patch_size=8,
            image_size=RESOLUTION,
        ),
        add_pooling_layer=False,
    )
    dino.save_pretrained(folder / "dino")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": RESOLUTION}
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.save(alexnet_features(), folder / "alexnet.pth")
    _write_statistics(folder)


def alexnet_features() -> dict[str, torch.Tensor]:
    """The convolutions of torchvision's AlexNet by name, at random."""
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {}
    for number, (out, into, kernel) in sizes.items():
        scale = (2 / (into * kernel**2)) ** 0.5
        weights[f"features.{number}.weight"] = torch.randn(out, into, kernel, kernel) * scale
        weights[f"features.{number}.bias"] = torch.zeros(out)
    return weights


def _write_statistics(folder: Path) -> None:
    run = load(folder)
    image = run.encoders.image
    assert isinstance(image, VitImage)
    plain = image.model_copy(update={"statistics": None})
    encoder = build_image_encoder(plain, resolution=RESOLUTION, device="cpu")
    images, _ = training_images(run.data, 24)
    identity = statistics_identity(image, RESOLUTION)
    path = folder / "statistics.safetensors"
    save_statistics(path, LatentStatistics.of(encoder.encode(images)), identity)


def load(folder: Path, **sections: Any) -> DecoderRun:
    """The run in this process; `sections` are merged over the file's."""
    values = merged(config(folder), sections)
    return DecoderRun.model_validate_json(json.dumps(values), strict=True)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def write_config(weights: Path, folder: Path) -> Path:
    """The run file over `weights`, writing into `folder`/run."""
    folder.mkdir(exist_ok=True)
    path = folder / "decoder.yaml"
    values = config(weights) | {"directory": str(folder / "run")}
    path.write_text(yaml.safe_dump(values))
    return path


def run_decoder(weights: Path, folder: Path, *overrides: str, ranks: int = 1) -> Path:
    """Trains in new processes; returns the run directory."""
    run_ranks(drive, ranks, write_config(weights, folder), list(overrides))
    return folder / "run"


def drive(path: Path, overrides: list[str]) -> None:
    """Trains in this process."""
    from dsr_scale.config.load import load_any_run
    from dsr_scale.train.loop import train

    train(load_any_run(path, overrides))
