"""Findings made by hand: random numbers in plausible ranges, for tests of figures and reports."""

from __future__ import annotations

import math

import numpy as np

from dsr_scale.evaluate.outlier_findings import Findings, Timestep
from dsr_scale.evaluate.outlier_statistics import MEASURES

BLOCKS = ("blocks.0", "blocks.1", "blocks.2", "head.0", "output")
PICTURED = (0, 2, 4)
GRID = (3, 4)
ATTENTION = ("registers", "top_norm", "text", "special", "extra_key", "rest")


def made_findings(name: str, *, seed: int, registers: bool = True, steps: int = 2) -> Findings:
    """Findings of random numbers in plausible ranges; `steps` of 0 is an encoder."""
    random = np.random.default_rng(seed)
    blocks, times, pictured, pictures = len(BLOCKS), max(1, steps), len(PICTURED), 2
    measures = {measure: random.uniform(0.01, 1, (blocks, times)) for measure in MEASURES}
    for measure in MEASURES:
        if "over_median" in measure:
            measures[measure] *= 30
        if "register" in measure:
            measures[measure][: 2 if registers else blocks] = math.nan
        if measure.startswith(("attention", "cross")):
            measures[measure][-1] = math.nan
    masses = np.nan_to_num(np.stack([measures[f"attention_{part}"] for part in ATTENTION]))
    masses /= np.maximum(masses.sum(0), 1e-9)
    for part, mass in zip(ATTENTION, masses, strict=True):
        missing = np.isnan(measures[f"attention_{part}"])
        measures[f"attention_{part}"] = np.where(missing, math.nan, mass)

    cells = (pictured, times, pictures)
    received = random.uniform(0.1, 3, (*cells, *GRID))
    of_registers = random.uniform(0, 0.1, (*cells, 2 if registers else 0, *GRID))
    of_registers[0] = math.nan
    of_top = random.uniform(0.01, 0.1, (*cells, *GRID))
    for array in (received, of_registers, of_top):
        array[-1] = math.nan
    positions = random.integers(0, 3, (*cells, 2))
    positions[-1] = -1
    histogram = random.integers(1, 50, (blocks, times, 6))
    return Findings(
        name=name,
        kind="diffusion" if steps else "encoder",
        blocks=BLOCKS,
        timesteps=tuple(Timestep(model=t, preshift=t / 7) for t in (0.1, 0.5, 0.9)[:steps]),
        images=16,
        settings={"step": 1200, "data": "shards/test", "seed": 5},
        captions=("a red apple", f"{name} in the rain")[: 2 if steps else 0],
        pictured_blocks=PICTURED,
        measures=measures,
        errors={"outlier_ratio": np.full((blocks, times), 0.0123)},
        top_channels=random.integers(0, 8, (blocks, times, 3)),
        position_shares=random.uniform(0, 0.5, (blocks, times, *GRID)).astype(np.float32),
        histogram_edges=np.logspace(-1, 2, 7),
        image_histograms=histogram,
        register_histograms=histogram[::-1] * registers,
        pictures=random.integers(0, 256, (pictures, 3, 12, 16)).astype(np.uint8),
        norm_maps=random.uniform(1, 40, (blocks, times, pictures, *GRID)).astype(np.float32),
        norm_maps_without_channels=random.uniform(1, 4, (blocks, times, pictures, *GRID)).astype(
            np.float32
        ),
        component_maps=random.normal(size=(*cells, *GRID, 3)).astype(np.float32),
        received_maps=received.astype(np.float32),
        register_maps=of_registers.astype(np.float32),
        top_maps=of_top.astype(np.float32),
        top_positions=positions,
    )


def two_targets() -> list[Findings]:
    return [
        made_findings("baseline", seed=1, registers=False),
        made_findings("with registers", seed=2),
    ]
