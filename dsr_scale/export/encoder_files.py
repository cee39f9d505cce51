"""The small files that the frozen encoders of a run read, carried inside its bundle.

Weights are referenced by name and revision; statistics, register neurons and attention biases are
files of the run's owner and decide what latents mean, so a bundle brings its own copies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.encoders.locate import PACKAGE_SCHEME

STATISTICS_FILE = "latent_statistics.safetensors"
NEURONS_FILE = "register_neurons.json"
BIAS_FILE = "attention_bias.safetensors"


def relocated(encoders: EncodersConfig, place: Callable[[str], str]) -> EncodersConfig:
    """`encoders` with every file it names at `place(name in the bundle)`; shipped ones stay."""
    image = encoders.image
    if not isinstance(image, VitImage):
        return encoders
    changes: dict[str, object] = {}
    if image.statistics is not None:
        changes["statistics"] = place(STATISTICS_FILE)
    moved = {
        field: place(name)
        for field, name in (("neurons", NEURONS_FILE), ("bias", BIAS_FILE))
        if not getattr(image.outliers, field, PACKAGE_SCHEME).startswith(PACKAGE_SCHEME)
    }
    if moved:
        changes["outliers"] = image.outliers.model_copy(update=moved)
    return encoders.model_copy(update={"image": image.model_copy(update=changes)})


def copy_files(encoders: EncodersConfig, out: Path) -> None:
    """Copies them into a bundle. Raises InputError when one is not where the run had it."""
    sources = _paths(encoders)
    for name, target in _paths(relocated(encoders, lambda name: str(out / name))).items():
        source = Path(sources[name]).expanduser()
        if not source.is_file():
            raise InputError(
                found=f"no file at {source}",
                required=f"the {name} of the encoder that the run was trained with",
                remedy="export where that path is valid",
            )
        atomic_files.write_bytes(Path(target), source.read_bytes())


def _paths(encoders: EncodersConfig) -> dict[str, str]:
    """What is named, by what it is; without what ships with the package."""
    image = encoders.image
    if not isinstance(image, VitImage):
        return {}
    named = {
        "statistics": image.statistics,
        "neurons": getattr(image.outliers, "neurons", None),
        "attention bias": getattr(image.outliers, "bias", None),
    }
    return {
        name: path
        for name, path in named.items()
        if path is not None and not path.startswith(PACKAGE_SCHEME)
    }
