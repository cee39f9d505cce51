"""Samples of the EMA weights while training, for fixed prompts and noise.

All ranks gather the EMA; the first rank draws. It samples through the same pipeline as an exported
bundle, so what is seen here is what an export gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsr_scale.config.training import GridConfig
from dsr_scale.export.pipeline import Pipeline, build_pipeline
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.telemetry.pictures import image_grid
from dsr_scale.train.build import Training, empty_network


@dataclass(frozen=True)
class TrainingGrids:
    """Draws `grids/step_….png` in the run directory."""

    training: Training
    config: GridConfig
    every_steps: int
    pipeline: Pipeline

    @staticmethod
    def for_run(training: Training) -> TrainingGrids | None:
        """None when the config asks for no grids."""
        run = training.run
        if run.grid.every_steps is None:
            return None
        pipeline = build_pipeline(
            empty_network(training.shape, training.ranks.device),
            shape=training.shape,
            diffusion=run.diffusion,
            timestep_shift=training.timestep_shift,
            encoders=run.encoders,
            resolution=run.data.resolution,
            device=training.ranks.device,
            text_encoder=training.objective.text_encoder,
        )
        return TrainingGrids(training, run.grid, run.grid.every_steps, pipeline)

    def draw(self, step: int, log: MetricsLog | None) -> None:
        """A collective; the picture is written by the first rank."""
        self.training.engine.copy_ema_into(self.pipeline.model)
        if log is None:
            return
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
