"""The flow-matching objective and how samples are drawn from the trained model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsr_scale.config.section import Section


class TimestepsConfig(Section):
    """How training timesteps are drawn before the shift; t = 1 is pure noise."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Of the timestep: `logit_normal` is the sigmoid of a normal draw."""
    mean: float = 0.0
    """Of the normal draw; above 0 is more noise."""
    std: float = Field(default=1.0, gt=0)
    """Of the normal draw."""


class DiffusionConfig(Section):
    """x_t = (1−t)·x + t·ε, velocity ε − x, loss always in velocity space (docs/method.md §3)."""

    prediction: Literal["data", "velocity", "noise"] = "data"
    """What the network puts out."""
    denominator_clamp: float = Field(default=0.05, gt=0, lt=1)
    """Smallest divisor when a data or noise prediction is turned into a velocity."""
    timesteps: TimestepsConfig = TimestepsConfig()
    shift: Literal["dimension"] | Annotated[float, Field(gt=0)] = "dimension"
    """α of t ← αt/(1+(α−1)t): `dimension` is √(tokens·channels/4096); 1.0 is no shift."""
    weighting: Literal["none", "min_snr"] = "none"
    """Weight of the loss by timestep."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """Largest signal-to-noise ratio that counts in full, for `min_snr`."""
    mask_token_norm: float | None = Field(default=None, gt=0)
    """Leave latent tokens whose norm, after whitening, reaches this out of the loss, and weigh the
    image's other tokens up by as much (a negative result of the paper, at 100)."""


class SamplingConfig(Section):
    """One way of turning noise into latents; used for grids, evaluation and as a bundle's default."""

    solver: Literal["euler", "heun", "dpm++"] = "euler"
    """How the flow is integrated from noise to data."""
    steps: int = Field(default=50, gt=0)
    """Network evaluations of Euler; Heun spends two per step but the last."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance scale; 1 is off, and then the unconditional branch is not computed."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps (model time, 1 is noise) between which guidance applies."""
