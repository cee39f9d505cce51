"""A whole run: what one YAML file describes.

Of a diffusion transformer here; of a decoder in `decoder.py`. Data, encoders and training are the same.
"""

from __future__ import annotations

from pydantic import Field

from dsr_scale.config.data import DataConfig
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.encoder_access import EncoderAccess
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.config.evaluation import EvaluationConfig
from dsr_scale.config.model import ModelConfig
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.config.section import Section
from dsr_scale.config.training import (
    CheckpointConfig,
    GridConfig,
    TrackingConfig,
    TrainingConfig,
)


class AnyRun(Section):
    """What every run has, whatever it trains. `directory` holds all it writes."""

    name: str
    """Shown in logs, and the run's name in wandb."""
    directory: str
    """Run directory: checkpoints, metrics, grids and the resolved config."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, data order, noise and dropout are functions of it."""
    data: DataConfig
    encoders: EncodersConfig = EncodersConfig()
    encoder: EncoderAccess = EncoderAccess()
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    tracking: TrackingConfig = TrackingConfig()


class RunConfig(AnyRun):
    """Every setting of a run that trains a diffusion transformer."""

    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    grid: GridConfig = GridConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
