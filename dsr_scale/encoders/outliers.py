"""Outlier treatments of a frozen ViT."""

from __future__ import annotations

from dsr_scale.config.encoders import OutlierTreatment


def treatment_identity(treatment: OutlierTreatment) -> str:
    """What the treatment does to latents, as text that is equal only for equal treatments."""
    return treatment.kind
