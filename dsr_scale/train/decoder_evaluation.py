"""Reconstructions by the averaged decoder while training: PSNR, LPIPS, rFID and a picture.

Every rank keeps the whole decoder in float32 beside the one in training and takes its share of the
images; sums of fixed shape are joined at the end, so uneven shares cost nothing but time. Latents have
no noise. The images are the same every time; those that cannot be decoded are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.encoded import Row
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import Samples, UnusableRecord
from dsr_scale.data.transforms import CENTRE, UnreadableImage, cover_and_crop, decode_rgb
from dsr_scale.decoders.network import RaeDecoderNetwork
from dsr_scale.encoders.contract import rounded
from dsr_scale.evaluate.frechet import FeatureMoments, frechet_distance, samples_needed
from dsr_scale.evaluate.inception import POOL_CHANNELS, Inception, find_weights
from dsr_scale.parallel.gathering import gather_on_first, write_into
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.telemetry.pictures import image_grid
from dsr_scale.train.decoder_build import DecoderTraining, new_network

PREFIX = "evaluation/"
"""Of the names in metrics.jsonl and in the tracker."""


class _Pairs(NamedTuple):
    """Images and their latents."""

    images: Tensor
    """uint8 [B,3,H,W] on the device."""
    latents: Tensor
    """[B,C,h,w] float32, unwhitened."""
    names: list[str]


class _Sums:
    """What this rank has seen: number of images, sums of PSNR, L1 and LPIPS."""

    NAMES = ("psnr", "l1", "lpips")

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(1 + len(self.NAMES), dtype=torch.float64, device=device)

    def add(self, made: Tensor, real: Tensor, lpips: Tensor | None) -> None:
        """uint8 images [B,3,H,W] and distances [B]."""
        difference = (made.double() - real.double()) / 255
        squares = difference.square().flatten(1).mean(1)
        # Equal images would be infinitely alike: as if one colour of one pixel differed by 1.
        least = 1 / (255**2 * real[0].numel())
        psnr = -10 * squares.clamp(min=least).log10()
        self.values[0] += len(real)
        self.values[1] += psnr.sum()
        self.values[2] += difference.abs().flatten(1).mean(1).sum()
        if lpips is not None:
            self.values[3] += lpips.double().sum()


@dataclass
class Reconstructions:
    """Measures a run's decoder at intervals. All ranks call `draw` together."""

    training: DecoderTraining
    samples: Samples
    every_steps: int
    network: RaeDecoderNetwork
    inception: Inception | None
    """None where rFID is left out."""
    _real: FeatureMoments | None = field(default=None)
    """Of all images, once they have been seen."""

    @staticmethod
    def for_run(training: DecoderTraining, tell: Callable[[str], None]) -> Reconstructions | None:
        """None when the config asks for none. `tell` is told why rFID is left out. A collective.

        Raises InputError when the images cannot be opened.
        """
        config = training.run.evaluation
        if config.every_steps is None:
            return None
        samples = training.source.samples
        if config.shards is not None:
            samples = open_samples(_held_out(training.run.data, config.shards))
        network = new_network(training.shape, training.run.seed).to(training.ranks.device)
        return Reconstructions(
            training,
            samples,
            config.every_steps,
            network.eval().requires_grad_(False),
            find_inception(training, min(config.images, len(samples)), tell),
        )

    @torch.no_grad()
    def draw(self, step: int, log: MetricsLog | None) -> None:
        """Measures, and writes numbers and picture on the first rank. A collective."""
        self._follow_average()
        device = self.training.ranks.device
        sums, moments, real = _Sums(device), FeatureMoments(POOL_CHANNELS), None
        if self.inception is not None and self._real is None:
            real = FeatureMoments(POOL_CHANNELS)
        shown: list[tuple[Tensor, Tensor, list[str]]] = []
        for pairs in self._batches():
            made = self._decoded(pairs.latents)
            sums.add(made, pairs.images, self._lpips(made, pairs.images))
            shown.append((pairs.images.cpu(), made.cpu(), pairs.names))
            del shown[self.training.run.evaluation.shown :]
            if self.inception is not None:
                moments.add(self.inception(made).pool)
            if self.inception is not None and real is not None:
                real.add(self.inception(pairs.images).pool)
        self._join([sums.values])
        if self.inception is not None:
            self._join(moments.tensors())
        if real is not None:
            self._join(real.tensors())
            self._real = real
        metrics = self._metrics(sums, moments)
        self.training.ranks.on_first(lambda: self._write(step, metrics, shown, log))

    def _follow_average(self) -> None:
        """Fills every rank's network with the averaged weights."""
        ranks, kind = self.training.ranks, self.training.engine.main_average
        parameters = dict(self.network.named_parameters())
        targets = {f"{kind}.{name}": parameter for name, parameter in parameters.items()}
        gather_on_first(
            self.training.engine.pieces(owned=True, kinds=(kind,)),
            ranks,
            lambda piece: write_into(targets[piece.name], piece),
        )
        if ranks.world_size > 1:
            for parameter in parameters.values():
                dist.broadcast(parameter.data, src=0)

    def _batches(self) -> Iterator[_Pairs]:
        """This rank's share of the images, a micro-batch at a time."""
        ranks, run = self.training.ranks, self.training.run
        count = min(run.evaluation.images, len(self.samples))
        first, last = (count * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        size = run.training.microbatch_images
        for start in range(first, last, size):
            rows = [self._row(number) for number in range(start, min(start + size, last))]
            usable = [row for row in rows if row is not None]
            if usable:
                yield self._encoded(usable)

    def _row(self, sample_id: int) -> tuple[Row, np.ndarray] | None:
        """A sample as it is encoded, and its pixels; None where it cannot be used."""
        data = self.training.run.data
        target = (data.resolution, data.resolution)
        try:
            sample = self.samples.read(sample_id)
            pixels = cover_and_crop(decode_rgb(sample.image, data.background, target), target)
        except (UnusableRecord, UnreadableImage):
            return None
        rows = self.training.source.rows
        sends_files = rows is not None and not rows.wants_pixels
        caption = sample.captions[0].text if sample.captions else ""
        image = sample.image if sends_files else pixels
        return Row(sample_id, image, CENTRE, caption), pixels

    def _encoded(self, rows: list[tuple[Row, np.ndarray]]) -> _Pairs:
        source, run = self.training.source, self.training.run
        device = self.training.ranks.device
        images = torch.from_numpy(np.stack([pixels for _, pixels in rows])).to(device)
        if source.rows is not None:
            target = (run.data.resolution, run.data.resolution)
            latents = source.rows.encode([row for row, _ in rows], target).latents.to(device)
        else:
            assert source.encoders is not None and source.encoders.image is not None
            latents = rounded(source.encoders.image.encode(images), run.encoders)
        latents = latents.float()
        if self.training.whitening is not None:
            latents = self.training.whitening.undo(latents)
        return _Pairs(images, latents, [row.caption for row, _ in rows])

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 [B,3,H,W], rounded as when samples are decoded."""
        return (self.network(latents) * 255).round().clamp(0, 255).to(torch.uint8)

    def _lpips(self, made: Tensor, real: Tensor) -> Tensor | None:
        if self.training.perceptual is None:
            return None
        return self.training.perceptual.distance(made.float() / 255, real.float() / 255)

    def _join(self, tensors: list[Tensor]) -> None:
        """Adds up over ranks, on the host."""
        for tensor in tensors:
            if self.training.ranks.world_size > 1:
                on_host = tensor.cpu()
                dist.all_reduce(on_host, group=self.training.ranks.host_group)
                tensor.copy_(on_host)

    def _metrics(self, sums: _Sums, moments: FeatureMoments) -> dict[str, float]:
        count, *totals = sums.values.tolist()
        metrics = {"images": count}
        for name, total in zip(sums.NAMES, totals, strict=True):
            if name != "lpips" or self.training.perceptual is not None:
                metrics[name] = total / count if count else math.nan
        if self.inception is not None and self._real is not None:
            metrics["rfid"] = frechet_distance(
                moments.gaussian("rFID"), self._real.gaussian("rFID")
            )
        return {PREFIX + name: value for name, value in metrics.items()}

    def _write(
        self,
        step: int,
        metrics: dict[str, float],
        shown: list[tuple[Tensor, Tensor, list[str]]],
        log: MetricsLog | None,
    ) -> None:
        assert log is not None
        log.log(step, metrics)
        number = self.training.run.evaluation.shown
        if not number or not shown:
            return
        images = torch.cat([real for real, _, _ in shown])[:number]
        made = torch.cat([decoded for _, decoded, _ in shown])[:number]
        names = [name for _, _, part in shown for name in part][:number]
        path = Path(self.training.run.directory) / "grids" / f"step_{step:08d}.png"
        image_grid(
            [("image", images), ("decoded", made)],
            names,
            path,
            metadata={"step": str(step), "run": self.training.run.name},
        )
        log.log_image(step, "reconstructions", path)


def _held_out(data: DataConfig, shards: str) -> DataConfig:
    """Other shards, read alike; downloaded ones beside those that are trained on."""
    cache = data.cache_directory
    directory = None if cache is None else str(Path(cache) / "evaluation")
    changes = {"shards": shards, "max_samples": None, "cache_directory": directory}
    return data.model_copy(update=changes)


def find_inception(
    training: DecoderTraining, images: int, tell: Callable[[str], None]
) -> Inception | None:
    """The network of rFID, where its weights are on every rank and there are images enough."""
    config, ranks = training.run.evaluation, training.ranks
    needed = samples_needed(POOL_CHANNELS)
    inception, obstacle = None, None
    try:
        if images < needed:
            raise InputError(
                found=f"evaluation.images: {images}",
                required=f"at least {needed}: with fewer rFID depends on their number",
                remedy=f"set evaluation.images to {needed} or more",
            )
        given = None if config.inception_weights is None else Path(config.inception_weights)
        inception = Inception(find_weights(given), ranks.device)
    except InputError as problem:
        obstacle = str(problem)
    obstacles = ranks.gather_on_host([] if obstacle is None else [obstacle])
    if obstacles:
        tell(f"rFID is left out: {obstacles[0]}")
        return None
    return inception
