"""Samples of the EMA weights while training, for fixed prompts and noise.

All ranks gather the EMA; the first rank draws. It samples through the same pipeline as an exported
bundle, so what is seen here is what an export gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dsr_scale.config.training import GridConfig
from dsr_scale.export.pipeline import Pipeline, build_pipeline
from dsr_scale.parallel.gathering import gather_on_first, write_into
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.telemetry.pictures import image_grid
from dsr_scale.train.build import Training, empty_network


@dataclass(frozen=True)
class TrainingGrids:
    """Draws `grids/step_….png` in the run directory."""

    training: Training
    config: GridConfig
    every_steps: int
    pipeline: Pipeline | None
    """On the first rank; the others only take part in the gathering."""

    @staticmethod
    def for_run(training: Training) -> TrainingGrids | None:
        """None when the config asks for no grids."""
        run = training.run
        if run.grid.every_steps is None:
            return None
        pipeline = training.ranks.is_first and build_pipeline(
            empty_network(training.shape, training.ranks.device),
            shape=training.shape,
            diffusion=run.diffusion,
            timestep_shift=training.timestep_shift,
            encoders=run.encoders,
            resolution=run.data.resolution,
            device=training.ranks.device,
            text_encoder=None if training.feed.encoders is None else training.feed.encoders.text,
        )
        return TrainingGrids(training, run.grid, run.grid.every_steps, pipeline or None)

    def draw(self, step: int, log: MetricsLog | None) -> None:
        """A collective; the picture is written by the first rank."""
        gather_average(self.training, None if self.pipeline is None else self.pipeline.model)
        self.training.ranks.on_first(lambda: self._draw(step, log))

    def _draw(self, step: int, log: MetricsLog | None) -> None:
        assert self.pipeline is not None and log is not None
        run = self.training.run
        images = self.pipeline.sample(
            self.config.prompts, seed=run.seed, sampling=self.config.sampling
        )
        path = Path(run.directory) / "grids" / f"step_{step:08d}.png"
        image_grid(
            [("", images)],
            self.config.prompts,
            path,
            metadata={"step": str(step), "run": run.name},
        )
        log.log_image(step, "grid", path)


@torch.no_grad()
def gather_average(training: Training, network: nn.Module | None) -> None:
    """Fills the first rank's `network` with the averaged weights and the saved buffers. A collective."""
    targets: dict[str, torch.Tensor] = {}
    kind = training.engine.main_average
    if network is not None:
        targets = {f"{kind}.{name}": p for name, p in network.named_parameters()}
        targets |= {f"buffers.{name}": b for name, b in network.named_buffers()}
    gather_on_first(
        training.engine.pieces(owned=True, kinds=(kind,)),
        training.ranks,
        lambda piece: write_into(targets[piece.name], piece),
    )
