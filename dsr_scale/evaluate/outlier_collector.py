"""The reduction of a target's forwards to findings, batch by batch, while they pass.

Activations of all blocks, timesteps and images would be far more than a machine holds. What is kept
are numbers per image, sums over images, and the maps of the few images that a report shows; these grow
with blocks × timesteps and not with the network's width or the number of tokens times images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate import outlier_statistics as statistics
from dsr_scale.evaluate.attention_mass import (
    AttentionReading,
    attention_of,
    cross_attention_measures,
    received,
    self_attention_measures,
)
from dsr_scale.evaluate.outlier_findings import Findings, Timestep
from dsr_scale.evaluate.outlier_statistics import MEASURES, POOLED, RidgeProbe, TokenRows

PICTURED_BLOCKS = 7
PICTURED_IMAGES = 4
PICTURED_REGISTERS = 4


class Collector:
    """Reduces what a target's forwards hand out, batch by batch, to its findings.

    Timesteps are measured one after the other and, within each, images in their order: the first half
    fits the ridge probe that the other half tests. Kept are numbers per image and the maps of the
    first images; no activations.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        timesteps: int,
        grid: tuple[int, int],
        *,
        images: int,
        registers: int,
        threshold: float,
    ) -> None:
        """`registers` are those of the sequence; `threshold` is the norm of the absolute rule."""
        self._blocks = tuple(blocks)
        self._places = {name: place for place, name in enumerate(blocks)}
        self._grid = grid
        self._images, self._threshold = images, threshold
        steps, tokens, shown = timesteps, grid[0] * grid[1], min(images, PICTURED_IMAGES)
        spread = torch.linspace(0, len(blocks) - 1, min(len(blocks), PICTURED_BLOCKS))
        self._pictured = {int(place): row for row, place in enumerate(spread.round())}
        cells = (len(blocks), steps)
        self._values = {
            name: torch.full((*cells, images), math.nan, dtype=torch.float64)
            for name in MEASURES
            if name not in POOLED
        }
        self._predictions = torch.full((2, *cells), math.nan, dtype=torch.float64)
        self._positions = torch.zeros(*cells, tokens, dtype=torch.int64)
        bins = len(statistics.HISTOGRAM_EDGES) - 1
        self._histograms = torch.zeros(2, *cells, bins, dtype=torch.int64)
        self._channels: dict[tuple[int, int], Tensor] = {}
        self._probes: dict[int, RidgeProbe] = {}
        self._norm_maps = torch.full((*cells, shown, tokens), math.nan)
        self._norm_maps_without_channels = torch.full((*cells, shown, tokens), math.nan)
        maps = (len(self._pictured), steps, shown)
        self._component_maps = torch.full((*maps, tokens, statistics.COMPONENTS), math.nan)
        self._received_maps = torch.full((*maps, tokens), math.nan)
        self._top_maps = torch.full((*maps, tokens), math.nan)
        self._top_places = torch.full(maps, -1)
        rows = min(registers, PICTURED_REGISTERS)
        self._register_maps = torch.full((*maps, rows, tokens), math.nan)

    def begin(self, step: int, first: int, rows: Mapping[str, TokenRows], held: Tensor) -> None:
        """Says of what the next calls are: images `first` and on, at timestep `step`.

        `rows` are those of every block; `held` [B,T,C] is what the images' patches hold.
        """
        self._step, self._first, self._rows, self._held = step, first, rows, held

    def tokens(self, block: str, tokens: Tensor, _layout: object = None) -> None:
        """What leaves a block: tokens [B,N,D]. Is a probe of the diffusion transformer."""
        place, step, rows = self._places[block], self._step, self._rows[block]
        image = tokens[:, rows.image]
        found = statistics.block_statistics(tokens, rows, self._grid, threshold=self._threshold)
        self._require_finite(block, torch.cat([found.norms, found.register_norms], dim=1))
        self._record(place, found.values)
        self._positions[place, step] += found.outlying.sum(0).cpu()
        median = found.values["median_norm"]
        for sort, norms in enumerate((found.norms, found.register_norms)):
            self._histograms[sort, place, step] += statistics.norm_histogram(norms, median).cpu()
        chosen = torch.bincount(found.channels.flatten(), minlength=tokens.shape[-1]).cpu()
        self._channels[place, step] = self._channels.get((place, step), 0) + chosen
        pictured, shown = self._shown(len(tokens))
        self._norm_maps[place, step, pictured] = found.norms[:shown].cpu()
        without = found.norms_without_channels[:shown]
        self._norm_maps_without_channels[place, step, pictured] = without.cpu()
        if place in self._pictured and shown:
            scores = statistics.principal_components(image[:shown])
            self._component_maps[self._pictured[place], step, pictured] = scores.cpu()
        self._probe(place, image, found.outlying)

    def attention(self, reading: AttentionReading) -> None:
        """What a block's self-attention computes."""
        place, step, rows = self._places[reading.block], self._step, self._rows[reading.block]
        mass, entropy = received(reading, rows.image)
        self._record(place, self_attention_measures(reading, mass, entropy, rows))
        pictured, shown = self._shown(len(mass))
        if place not in self._pictured or not shown:
            return
        row = self._pictured[place]
        few = reading.of_first(shown)
        over_uniform = mass[:shown, rows.image] * few.visible.sum(1, keepdim=True)
        self._received_maps[row, step, pictured] = over_uniform.cpu()
        top = few.entering[:, rows.image].argmax(1)
        self._top_places[row, step, pictured] = top.cpu()
        of_top = attention_of(few, top[:, None] + rows.image.start)[:, 0, rows.image]
        self._top_maps[row, step, pictured] = of_top.cpu()
        if rows.registers.stop > rows.registers.start:
            kept = range(rows.registers.start, rows.registers.stop)[:PICTURED_REGISTERS]
            registers = torch.tensor(kept, device=top.device)
            of_registers = attention_of(few, registers.expand(shown, -1))[..., rows.image]
            self._register_maps[row, step, pictured] = of_registers.cpu()

    def cross_attention(self, reading: AttentionReading) -> None:
        """What a block's attention to text computes."""
        values = cross_attention_measures(reading, self._rows[reading.block].image)
        self._record(self._places[reading.block], values)

    def end_timestep(self) -> None:
        """Evaluates the probes of this timestep and lets go of them."""
        for place, probe in self._probes.items():
            self._predictions[:, place, self._step] = torch.tensor(probe.r_squared()).double()
        self._probes.clear()

    def findings(
        self,
        name: str,
        kind: Literal["diffusion", "encoder"],
        timesteps: Sequence[Timestep],
        *,
        pictures: Tensor,
        captions: Sequence[str],
        settings: Mapping[str, Any],
    ) -> Findings:
        """All that was collected. `pictures` uint8 [N,3,H,W] and `captions` are of all images."""
        shown = self._norm_maps.shape[2]
        measures = {name: value.nanmean(-1).numpy() for name, value in self._values.items()}
        measures |= self._pooled()
        top = np.stack(np.divmod(self._top_places.numpy(), self._grid[1]), axis=-1)
        top[self._top_places.numpy() < 0] = -1
        cells = self._positions.shape[:2]
        channels = [
            self._channels[place, step].topk(statistics.CHANNELS).indices
            for place in range(cells[0])
            for step in range(cells[1])
        ]
        return Findings(
            name=name,
            kind=kind,
            blocks=self._blocks,
            timesteps=tuple(timesteps),
            images=self._images,
            settings=dict(settings),
            captions=tuple(captions[:shown]),
            pictured_blocks=tuple(self._pictured),
            measures={name: measures[name] for name in MEASURES},
            errors={name: _standard_error(value) for name, value in self._values.items()},
            top_channels=torch.stack(channels).unflatten(0, cells).numpy(),
            position_shares=self._map(self._positions / self._images),
            histogram_edges=statistics.HISTOGRAM_EDGES.numpy(),
            image_histograms=self._histograms[0].numpy(),
            register_histograms=self._histograms[1].numpy(),
            pictures=pictures[:shown].numpy(),
            norm_maps=self._map(self._norm_maps),
            norm_maps_without_channels=self._map(self._norm_maps_without_channels),
            component_maps=self._component_maps.unflatten(-2, self._grid).numpy(),
            received_maps=self._map(self._received_maps),
            register_maps=self._map(self._register_maps),
            top_maps=self._map(self._top_maps),
            top_positions=top,
        )

    def _require_finite(self, block: str, norms: Tensor) -> None:
        """NaN is larger than nothing: it would count as no outlier at all."""
        broken = int((~norms.isfinite().all(1)).sum())
        if broken:
            raise InputError(
                found=f"undefined or infinite numbers in {broken} of {len(norms)} images after {block}, "
                f"timestep {self._step + 1}",
                required="finite tokens, whose norms can be compared",
                remedy="measure an earlier checkpoint; a bundle in fp16 may overflow where fp32 and "
                "bf16 do not",
            )

    def _shown(self, images: int) -> tuple[slice, int]:
        """Which of the kept maps are of this batch's first images, and how many."""
        count = max(0, min(images, self._norm_maps.shape[2] - self._first))
        return slice(self._first, self._first + count), count

    def _record(self, place: int, values: Mapping[str, Tensor]) -> None:
        stacked = torch.stack(list(values.values())).double().cpu()
        images = slice(self._first, self._first + stacked.shape[1])
        for name, of_images in zip(values, stacked, strict=True):
            self._values[name][place, self._step, images] = of_images

    def _probe(self, place: int, tokens: Tensor, outlying: Tensor) -> None:
        if place not in self._probes:
            widths = tokens.shape[-1], self._held.shape[-1]
            self._probes[place] = RidgeProbe(*widths, tokens.device)
        probe = self._probes[place]
        fitted = max(0, min(len(tokens), -(-self._images // 2) - self._first))
        if fitted:
            probe.fit(tokens[:fitted].flatten(0, 1), self._held[:fitted].flatten(0, 1))
        if fitted < len(tokens):
            probe.test(*(part[fitted:].flatten(0, 1) for part in (tokens, self._held, outlying)))

    def _pooled(self) -> dict[str, np.ndarray]:
        pooled = {name: np.full(self._positions.shape[:2], math.nan) for name in POOLED}
        pooled["patch_prediction_outliers"], pooled["patch_prediction_normal"] = (
            self._predictions.numpy()
        )
        outlying = self._values["outlier_ratio"] * self._positions.shape[-1]
        for cell in np.ndindex(*self._positions.shape[:2]):
            counts = self._positions[cell]
            pooled["position_repeat"][cell], pooled["position_chance"][cell] = (
                statistics.position_consistency(counts, outlying[cell].round())
            )
            pooled["border_enrichment"][cell] = statistics.border_enrichment(
                counts.unflatten(0, self._grid)
            )
        return pooled

    def _map(self, flat: Tensor) -> np.ndarray:
        return flat.unflatten(-1, self._grid).float().numpy()


def _standard_error(values: Tensor) -> np.ndarray:
    """Of the mean over the last axis, without its NaN; NaN for fewer than two."""
    counts = values.isfinite().sum(-1)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return (squares / (counts - 1) / counts).sqrt().numpy()
