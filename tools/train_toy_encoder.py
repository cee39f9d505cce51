"""Trains a small vision transformer on pairs, where no pretrained encoder can be had.

    python tools/train_toy_encoder.py CONFIG --out DIR [key=value …]

CONFIG is a run file whose `encoders.image` is the transformer to be made (its width, patch and input
size) and whose `encoders.text` is the frozen language model that it learns from: an image's pooled
vector has to be nearer to its own caption than to the others of the batch, each pair judged alone by
a sigmoid (SigLIP, arXiv:2303.15343). DIR can then be read by `encoders.image: {kind: vit, model: DIR}`.

Minutes on a CPU give an encoder that knows some hundred motifs, not a representation of the world. It
stands in for a pretrained one in a demonstration; nothing measured on it says anything about those.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base import atomic_files, random_keys
from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.derive import VitGeometry, vit_geometry
from dsr_scale.config.encoders import TransformersText, VitImage
from dsr_scale.config.load import load_run
from dsr_scale.config.run import RunConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.encoders.contract import build_text_encoder
from dsr_scale.evaluate.reference_set import data_at
from dsr_scale.evaluate.training_images import training_images
from dsr_scale.telemetry.progress import work_bar

TRAINING_FILE = "training.json"
"""How the encoder was trained and what it learned."""
_SHIFT_PIXELS = 6
_MEAN = _STD = 0.5
_TEXT_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Size and training, beside what the run file says."""

    depth: int = 6
    heads: int = 4
    steps: int = 1500
    batch_images: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


class Towers(nn.Module):
    """The image tower with its attention pooling, a projection of the frozen captions, scale and bias."""

    def __init__(self, geometry: VitGeometry, settings: Settings, text_channels: int) -> None:
        super().__init__()
        declare_torchvision_operators()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.image = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=geometry.channels,
                num_hidden_layers=settings.depth,
                num_attention_heads=settings.heads,
                intermediate_size=4 * geometry.channels,
                image_size=geometry.input_size,
                patch_size=geometry.patch,
            )
        )
        self.text = nn.Linear(text_channels, geometry.channels)
        # As published: most pairs are none, so the bias begins at "no".
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def similarities(self, pixels: Tensor, captions: Tensor) -> Tensor:
        """Cosines of pixels [B,3,R,R] with caption vectors [N,C]: [B,N]."""
        images = self.image(pixel_values=pixels).pooler_output
        return functional.normalize(images, dim=-1) @ functional.normalize(self.text(captions)).mT

    def loss(self, pixels: Tensor, captions: Tensor) -> Tensor:
        """Of B pairs: sum over captions, mean over images, of the sigmoid loss."""
        logits = self.similarities(pixels, captions) * self.log_scale.exp() + self.bias
        signs = 2 * torch.eye(len(logits)) - 1
        return -functional.logsigmoid(signs * logits).sum(1).mean()


def caption_vectors(config: TransformersText, captions: list[str]) -> Tensor:
    """Mean of a caption's token features, of unit length: [N,C]."""
    encoder = build_text_encoder(config, device=torch.device("cpu"))
    assert encoder is not None
    vectors = []
    for start in range(0, len(captions), _TEXT_BATCH):
        text = encoder.encode(captions[start : start + _TEXT_BATCH])
        mean = text.tokens.sum(1) / text.mask.sum(1, keepdim=True)
        vectors.append(functional.normalize(mean, dim=-1))
    return torch.cat(vectors)


def normalised(images: Tensor, shifts: Tensor | None = None) -> Tensor:
    """uint8 [B,3,R,R] → what the transformer sees; each image moved by its `shifts` [B,2] pixels."""
    pixels = (images.float() / 255 - _MEAN) / _STD
    if shifts is None:
        return pixels
    margin, side = _SHIFT_PIXELS, pixels.shape[-1]
    # White around emoji is white, 1 after normalisation.
    wide = functional.pad(pixels, [margin] * 4, value=(1 - _MEAN) / _STD)
    places = (shifts + margin).tolist()
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(wide, places, strict=True)]
    )


def train(
    images: Tensor,
    vectors: Tensor,
    geometry: VitGeometry,
    settings: Settings,
    console: Console | None = None,
) -> tuple[Towers, list[float]]:
    """Trains on images uint8 [N,3,R,R] with caption vectors [N,C]; returns the towers and the losses."""
    torch.manual_seed(settings.seed)
    towers = Towers(geometry, settings, vectors.shape[1]).train()
    optimizer = torch.optim.AdamW(towers.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    draws = random_keys.generator(settings.seed, "toy encoder")
    losses = []
    with work_bar(console or Console(quiet=True)) as bar:
        task = bar.add_task("training the encoder", total=settings.steps)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, settings.steps)
            chosen = draws.choice(len(images), min(settings.batch_images, len(images)), False)
            shifts = draws.integers(-_SHIFT_PIXELS, _SHIFT_PIXELS + 1, (len(chosen), 2))
            rows = torch.from_numpy(chosen)
            pixels = normalised(images[rows], torch.from_numpy(shifts))
            loss = towers.loss(pixels, vectors[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.advance(task)
    return towers.eval(), losses


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear over the first 5 % of steps, then a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.inference_mode()
def retrieval(towers: Towers, images: Tensor, vectors: Tensor) -> dict[str, float]:
    """How often an image's own caption is the nearest, or among the five nearest, of all N."""
    cosines = torch.cat(
        [towers.similarities(normalised(part), vectors) for part in images.split(_TEXT_BATCH)]
    )
    # Captions that are equal are equally right.
    better = (cosines > cosines.diagonal()[:, None]).sum(1)
    return {
        "images": len(images),
        "top_1": (better < 1).float().mean().item(),
        "top_5": (better < 5).float().mean().item(),
        "chance_top_1": 1 / len(images),
    }


def save(towers: Towers, out: Path, record: dict[str, Any]) -> None:
    """Writes a transformers directory, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    towers.image.save_pretrained(partial)
    processor = {"image_mean": [_MEAN] * 3, "image_std": [_STD] * 3}
    atomic_files.write_json(partial / "preprocessor_config.json", processor)
    atomic_files.write_json(partial / TRAINING_FILE, record)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def towers_of(run: RunConfig) -> tuple[VitImage, TransformersText]:
    """The encoders of a run file. Raises InputError for kinds that cannot be trained so."""
    image, text = run.encoders.image, run.encoders.text
    if not isinstance(image, VitImage) or not isinstance(text, TransformersText):
        raise InputError(
            found=f"encoders.image.kind = {image.kind}, encoders.text.kind = {text.kind}",
            required="vit, which is trained, and transformers, which it learns from",
            remedy="start from configs/demonstration/baseline.yaml",
        )
    if vit_geometry(image).input_size != run.data.resolution:
        raise InputError(
            found=f"encoders.image.input_size = {vit_geometry(image).input_size}, "
            f"data.resolution = {run.data.resolution}",
            required="one size: images are not scaled for this encoder",
            remedy="set both to the same",
        )
    return image, text


def make_encoder(
    run: RunConfig,
    settings: Settings,
    out: Path,
    *,
    held_out: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains the encoder of a run file on its data and writes it to `out`; returns the record."""
    image, text = towers_of(run)
    started_s = time.perf_counter()
    images, captions = training_images(run.data, len(open_samples(run.data)))
    vectors = caption_vectors(text, captions)
    towers, losses = train(images, vectors, vit_geometry(image), settings, console)
    record: dict[str, Any] = {
        "settings": asdict(settings),
        "images": len(images),
        "parameters": sum(p.numel() for p in towers.image.parameters()),
        "loss_first": sum(losses[:20]) / len(losses[:20]),
        "loss_last": sum(losses[-20:]) / len(losses[-20:]),
        "retrieval_train": retrieval(towers, images[:500], vectors[:500]),
    }
    if held_out is not None:
        data = data_at(held_out, run.data.resolution)
        unseen, named = training_images(data, len(open_samples(data)))
        record["retrieval_held_out"] = retrieval(towers, unseen, caption_vectors(text, named))
    record["minutes"] = (time.perf_counter() - started_s) / 60
    save(towers, out, record)
    return record


def main() -> None:
    """Reads the command line, trains and writes."""
    parser = argparse.ArgumentParser(description="A small vision transformer from pairs.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", help="shards to measure retrieval on")
    for name, default in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    options = parser.parse_args()
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    try:
        run = load_run(options.config, options.overrides)
        console = Console(stderr=True)
        record = make_encoder(
            run, settings, options.out, held_out=options.held_out, console=console
        )
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
