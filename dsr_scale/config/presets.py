"""The published sizes (architecture tables of RAE, Scale-RAE and DSR), by name."""

from __future__ import annotations

from dsr_scale.base.errors import InputError
from dsr_scale.config.model import HeadConfig, ModelConfig

_BODIES: dict[str, tuple[int, int, int]] = {
    "DiT-S": (384, 12, 6),
    "DiT-B": (768, 12, 12),
    "DiT-L": (1024, 24, 16),
    "DiT-XL": (1152, 28, 16),
    "T2I-0.5B": (1280, 16, 32),
    "T2I-2.4B": (2048, 32, 32),
    "T2I-3.3B": (2304, 32, 32),
    "T2I-5.5B": (3072, 32, 32),
    "T2I-9.8B": (4096, 32, 32),
}
"""Name → (width, depth, heads) of the body."""

PRESET_NAMES = tuple(_BODIES) + tuple(
    name.replace("DiT-", "DiT-DH-") for name in _BODIES if name.startswith("DiT-")
)
"""`DiT-DH-*` are the same bodies with the published head, 2048 wide, 2 deep, 16 heads."""


def with_preset(model: ModelConfig) -> ModelConfig:
    """`model` with its preset's sizes where it names none itself; `head: null` is a choice, no head.

    Raises InputError for an unknown preset, or when neither preset nor sizes are given.
    """
    sizes = {"width": model.width, "depth": model.depth, "heads": model.heads}
    head = model.head
    if model.preset is not None:
        if model.preset not in PRESET_NAMES:
            raise InputError(
                found=f"model.preset = {model.preset!r}",
                required="one of " + ", ".join(PRESET_NAMES),
                remedy="choose one of these, or give model.width, model.depth and model.heads",
            )
        body = _BODIES[model.preset.replace("-DH-", "-")]
        sizes = {
            key: given or preset for (key, given), preset in zip(sizes.items(), body, strict=True)
        }
        if "-DH-" in model.preset and "head" not in model.model_fields_set:
            head = HeadConfig()
    missing = [f"model.{key}" for key, value in sizes.items() if not value]
    if missing:
        raise InputError(
            found="no " + ", no ".join(missing),
            required="a preset, or width, depth and heads",
            remedy="set model.preset to one of "
            + ", ".join(PRESET_NAMES)
            + ", or give the missing sizes",
        )
    return model.model_copy(update={**sizes, "head": head})
