"""A tiny SigLIP with planted register neurons, in two populations born at different depths.

Channel 0 of the patch embedding answers to red patches and channel 1 to blue ones; everything else
is random and knows no colour. Two MLP units of block 1 fire on red patches alone and push their
norm up about ten times, two of block 4 do so on blue ones. Of what a pretrained encoder does it
shows the mechanism only: that these tokens are also *used* must be planted as well (`reader=True`: all
tokens attend to them in the last block and copy what they find), so no number here says how much a
real encoder needs its registers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import VitImage
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.vit import VitEncoder

WIDTH, DEPTH, HIDDEN, PATCH, SIDE = 32, 6, 64, 4, 32
GRID = SIDE // PATCH
FIRST = {1: (7, 40)}
"""The population of the red patches: layer → units."""
SECOND = {4: (3, 22)}
"""The population of the blue patches."""
RED, BLUE = (255, 0, 0), (0, 0, 255)


def save_planted_vit(directory: Path, *, planted: bool = True, reader: bool = False) -> Path:
    """Writes the checkpoint; with `planted=False` the same network without the four units' output."""
    declare_torchvision_operators()
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=HIDDEN,
        patch_size=PATCH,
        image_size=SIDE,
        hidden_act="gelu",
    )
    model: Any = transformers.SiglipVisionModel(config).vision_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(std=0.1)
        _plant_colours(model.embeddings)
        # Orthonormal directions without a mean, apart from the colours' channels.
        basis = torch.randn(WIDTH, 6)
        basis[:2] = 0
        basis[2:] -= basis[2:].mean(dim=0)
        directions = torch.linalg.qr(basis).Q.T
        for number, (colour, population) in enumerate([(0, FIRST), (1, SECOND)]):
            for layer, units in population.items():
                for unit, direction in zip(units, directions[2 * number :], strict=False):
                    _plant_unit(
                        model.encoder.layers[layer].mlp, unit, colour, direction * 15 * planted
                    )
        if reader:
            sought = directions[0] + directions[1]
            _plant_reader(model.encoder.layers[-1].self_attn, sought, directions[4])
    whole = transformers.SiglipVisionModel(config)
    whole.vision_model = model
    whole.save_pretrained(directory)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def planted_config(directory: Path, **changes: Any) -> VitImage:
    """The encoder section for a planted network."""
    return VitImage(model=str(directory), channels=WIDTH, patch=PATCH, input_size=SIDE, **changes)


def planted_encoder(directory: Path, **options: Any) -> VitEncoder:
    """A planted network, written and loaded."""
    config = planted_config(save_planted_vit(directory, **options))
    encoder = build_image_encoder(config, resolution=SIDE, device="cpu")
    assert isinstance(encoder, VitEncoder)
    return encoder


def coloured_images(count: int, *, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 images [N,3,S,S] of noise, and where they are red and blue: bool [N,T] each.

    Every image is grey noise with two red patches and a blue one; the last is noise alone.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(64, 192, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    red, blue = (torch.zeros(count, GRID * GRID, dtype=torch.bool) for _ in range(2))
    for image in range(count - 1):
        places = torch.randperm(GRID * GRID, generator=generator)[:3].tolist()
        for place, colour, where in zip(places, (RED, RED, BLUE), (red, red, blue), strict=True):
            y, x = PATCH * (place // GRID), PATCH * (place % GRID)
            patch = images[image, :, y : y + PATCH, x : x + PATCH]
            patch[:] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
            where[image, place] = True
    return images, red, blue


def write_run(folder: Path, **image: Any) -> tuple[Path, Path]:
    """A run file with the planted network, and a folder of 16 images that it has outliers on."""
    vit = save_planted_vit(folder / "vit")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, pixels in enumerate(coloured_images(16)[0]):
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(pictures / f"{number:02}.png")
    settings = {**planted_config(vit).model_dump(exclude_unset=True), "kind": "vit", **image}
    run = folder / "run.yaml"
    run.write_text(
        yaml.safe_dump(
            {
                "name": "planted",
                "directory": str(folder / "run"),
                "data": {"shards": "package:emoji", "max_samples": 40, "resolution": SIDE},
                "encoders": {"image": settings, "decoder": {"kind": "none"}},
                "model": {"width": 64, "depth": 2, "heads": 4},
            }
        )
    )
    return run, pictures


def _plant_colours(embeddings: Any) -> None:
    weight = embeddings.patch_embedding.weight
    weight.normal_(std=0.02)
    weight[:2] = 0
    # 2.5 for a patch of the full colour becomes 5; noise averages out.
    pixel = 2.5 / PATCH**2
    weight[0, 0], weight[0, 1:] = pixel, -pixel / 2
    weight[1, 2], weight[1, :2] = pixel, -pixel / 2
    embeddings.position_embedding.weight.normal_()
    embeddings.position_embedding.weight[:, :2] = 0


def _plant_unit(mlp: Any, unit: int, colour: int, pushes: Tensor) -> None:
    """The unit is silent until the normed channel `colour` exceeds 2."""
    mlp.fc1.weight[unit] = 0
    mlp.fc1.weight[unit, colour] = 2
    mlp.fc1.bias[unit] = -4
    mlp.fc2.weight[:, unit] = pushes


def _plant_reader(attention: Any, sought: Tensor, written: Tensor) -> None:
    """Head 0 looks for tokens along `sought`, whatever asks, and writes `written` when it finds any."""
    head = WIDTH // 2
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:head] = 0
    attention.q_proj.bias[0] = 2 * math.sqrt(head)
    attention.k_proj.weight[0] = sought
    attention.v_proj.weight[0] = sought
    attention.out_proj.weight[:, :head] = 0
    attention.out_proj.weight[:, 0] = written
