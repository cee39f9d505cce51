"""From a run to images on one device: `load` opens a bundle, `DSRPipeline` opens it through diffusers.

Both names are looked up when they are first used, since torch and diffusers take seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsr_scale.export.diffusers_pipeline import DSRPipeline
    from dsr_scale.export.pipeline import load

__all__ = ["DSRPipeline", "load"]


def __getattr__(name: str) -> Any:
    match name:
        case "load":
            from dsr_scale.export.pipeline import load

            return load
        case "DSRPipeline":
            from dsr_scale.export.diffusers_pipeline import DSRPipeline

            return DSRPipeline
    raise AttributeError(f"module {__name__} has no attribute {name}")
