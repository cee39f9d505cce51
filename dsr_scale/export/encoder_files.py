"""What a bundle holds of the frozen encoders: small files always, whole models when asked for.

Statistics, register neurons and attention biases are files of the run's owner and decide what latents
mean, so a bundle always brings its own copies. Networks are referenced by name and revision, which
keeps a bundle small; copied, they make it sample without a hub. What is copied are the files of the
checkpoint, byte for byte, of the one weight format that the libraries would read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    EncodersConfig,
    RaeDecoder,
    TransformersText,
    VaeDecoder,
    VaeImage,
    VitImage,
)
from dsr_scale.encoders.loading import loading_errors
from dsr_scale.encoders.locate import PACKAGE_SCHEME, Location, is_place, locate

STATISTICS_FILE = "latent_statistics.safetensors"
NEURONS_FILE = "register_neurons.json"
BIAS_FILE = "attention_bias.safetensors"

TEXT_DIRECTORY = "text_encoder"
IMAGE_DIRECTORY = "image_encoder"
DECODER_DIRECTORY = "decoder"
MODEL_DIRECTORIES = (TEXT_DIRECTORY, IMAGE_DIRECTORY, DECODER_DIRECTORY)

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configs and tokenizers."""
_SAFETENSORS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
)
_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "diffusion_pytorch_model.bin")
"""Taken only where a checkpoint has no safetensors."""


def relocated(
    encoders: EncodersConfig, place: Callable[[str], str], copied: Collection[str] = ()
) -> EncodersConfig:
    """`encoders` with every small file, and each model in `copied`, at `place(name in the bundle)`.

    Files that ship with this package stay where they are.
    """
    changes: dict[str, object] = {}
    image = encoders.image
    if isinstance(image, VitImage):
        changes["image"] = image = _with_files_at(image, place)
    for part, directory in _directories(encoders).items():
        if directory not in copied:
            continue
        model = image if part == "image" else getattr(encoders, part)
        moved: dict[str, object] = {"model": place(directory)}
        if isinstance(model, VitImage):
            # Its name and revision say which network statistics and register files belong to.
            moved["name"] = model.known_as
        else:
            moved["revision"] = None
        changes[part] = model.model_copy(update=moved)
    return encoders.model_copy(update=changes)


def _with_files_at(image: VitImage, place: Callable[[str], str]) -> VitImage:
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
    return image.model_copy(update=changes)


def models_to_copy(encoders: EncodersConfig) -> dict[str, str]:
    """Directory in a bundle → model and revision that belong there, for people; empty without models."""
    return {
        directory: f"{model} @ {revision}" if revision else model
        for directory, (model, revision) in _models(encoders).items()
    }


def check_sources(
    encoders: EncodersConfig, out: Path, *, copy_models: bool, replaced: Collection[str] = ()
) -> None:
    """Checks what a bundle in `out` is made of, where the model directories `replaced` are its own.

    Raises InputError when a file, or a local model to be copied, is not where the run had it, when a
    model lies in `out`, where it would be replaced, or when another's directory is in the way.
    """
    for name, path in _paths(encoders).items():
        if not Path(path).expanduser().is_file():
            raise InputError(
                found=f"no file at {path}",
                required=f"the {name} of the encoder that the run was trained with",
                remedy="export where that path is valid",
            )
    for model, _ in _models(encoders).values():
        if is_place(model) and not model.startswith(PACKAGE_SCHEME):
            place = Path(model).expanduser().resolve()
            if place.is_relative_to(out.resolve()):
                raise InputError(
                    found=f"the frozen network {model} inside {out}",
                    required="frozen networks outside of the directory that is written",
                    remedy="export into another directory",
                )
    if not copy_models:
        return
    for directory in _locations(encoders):
        if (out / directory).exists() and directory not in replaced:
            raise InputError(
                found=f"{out / directory}, which no bundle there mentions",
                required="a directory in which an export may put its copies",
                remedy="move it away, or export into another directory",
            )


def remove_left_over(out: Path, encoders: EncodersConfig, copied: Collection[str]) -> None:
    """Removes from an earlier bundle in `out` the files and models that one of `encoders` lacks.

    `copied` are the model directories of the earlier bundle that the new one has no copy of.
    """
    kept = {Path(path).name for path in _paths(relocated(encoders, str)).values()}
    with atomic_files.storage_errors(out):
        for name in {STATISTICS_FILE, NEURONS_FILE, BIAS_FILE} - kept:
            (out / name).unlink(missing_ok=True)
        for directory in copied:
            shutil.rmtree(out / directory, ignore_errors=True)


def copy_files(encoders: EncodersConfig, out: Path) -> None:
    """Copies the small files into a bundle."""
    sources = _paths(encoders)
    for name, target in _paths(relocated(encoders, lambda name: str(out / name))).items():
        atomic_files.write_bytes(Path(target), Path(sources[name]).expanduser().read_bytes())


def copy_models(encoders: EncodersConfig, out: Path) -> None:
    """Copies the checkpoints of text encoder, image encoder and decoder into a bundle.

    From the hub they are downloaded first. Raises InputError when one cannot be had.
    """
    for directory, location in _locations(encoders).items():
        source = _local_files(location)
        weights = _matching(source, _SAFETENSORS) or _matching(source, _PICKLES)
        if not weights:
            raise InputError(
                found=f"no weights in {source}",
                required=f"one of {', '.join(_SAFETENSORS + _PICKLES)}",
                remedy="give a directory as save_pretrained writes it",
            )
        target = out / directory
        with atomic_files.storage_errors(target):
            # Copied beside it first, so that a directory of that name is a whole model.
            partial = out / f".{directory}.partial"
            for old in (partial, target):
                if old.exists():
                    shutil.rmtree(old)
            partial.mkdir()
            for file in [*_matching(source, _SMALL_FILES), *weights]:
                shutil.copyfile(file, partial / file.name)
            partial.rename(target)


def _local_files(location: Location) -> Path:
    """A directory with the checkpoint's files."""
    if location.is_local:
        return Path(location.source)
    from huggingface_hub import snapshot_download

    with loading_errors(location):
        for weights in (_SAFETENSORS, _PICKLES):
            folder = snapshot_download(
                location.source,
                revision=location.revision,
                allow_patterns=[*_SMALL_FILES, *weights],
            )
            if _matching(Path(folder), weights):
                break
    return Path(folder)


def _matching(directory: Path, patterns: Collection[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def _locations(encoders: EncodersConfig) -> dict[str, Location]:
    """Directory in a bundle → where the checkpoint is. Raises InputError as `locate` does."""
    named = encoders.image.known_as if isinstance(encoders.image, VitImage) else None
    return {
        directory: locate(model, revision, name=named if directory == IMAGE_DIRECTORY else None)
        for directory, (model, revision) in _models(encoders).items()
    }


def _models(encoders: EncodersConfig) -> dict[str, tuple[str, str | None]]:
    """Directory in a bundle → model and revision."""
    parts = (
        (directory, getattr(encoders, part)) for part, directory in _directories(encoders).items()
    )
    return {directory: (model.model, model.revision) for directory, model in parts}


def _directories(encoders: EncodersConfig) -> dict[str, str]:
    """Part of the config → directory in a bundle, for parts with a checkpoint.

    An autoencoder that is encoder and decoder has one directory.
    """
    found: dict[str, str] = {}
    image, text, decoder = encoders.image, encoders.text, encoders.decoder
    if isinstance(image, VitImage | VaeImage):
        found["image"] = IMAGE_DIRECTORY
    if isinstance(text, TransformersText):
        found["text"] = TEXT_DIRECTORY
    if isinstance(decoder, RaeDecoder | VaeDecoder):
        shared = isinstance(image, VaeImage) and (image.model, image.revision) == (
            decoder.model,
            decoder.revision,
        )
        found["decoder"] = IMAGE_DIRECTORY if shared else DECODER_DIRECTORY
    return found


def _paths(encoders: EncodersConfig) -> dict[str, str]:
    """The small files, by what they are; without what ships with the package."""
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
