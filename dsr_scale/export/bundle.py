"""An exported model: one directory with weights, the network's shape, and what surrounds it.

    model.safetensors               weights in the bundle's dtype, by parameter name
    bundle.json                     shape, diffusion and sampling settings, encoders, provenance
    model_index.json                how diffusers opens the bundle
    latent_statistics.safetensors   of a whitened ViT encoder: the decoder undoes them
    text_encoder/ …                 copies of the frozen networks, when asked for
    README.md, sample_grid.png      the model card
    packages.txt                    what exported; training_packages.txt what trained

Frozen encoders are referenced by name and revision unless copies are asked for. The whole of it is
read without DeepSpeed, megatron-core or streaming. What guidance calls the null condition is a learned
tensor among the weights.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from dsr_scale import __version__
from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory, tensors
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig, SamplingConfig
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.config.section import Section
from dsr_scale.config.training import ema_name
from dsr_scale.export.card import CARD_FILE, GRID_FILE, model_card
from dsr_scale.export.encoder_files import (
    MODEL_DIRECTORIES,
    check_sources,
    copy_files,
    copy_models,
    models_to_copy,
    relocated,
    remove_left_over,
)
from dsr_scale.export.history import RunHistory, read_history
from dsr_scale.export.quantization import Quantization, quantize_blocks
from dsr_scale.job.record import packages_text
from dsr_scale.model.build import build_on_meta

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "bundle.json"
DIFFUSERS_FILE = "model_index.json"
PACKAGES_FILE = "packages.txt"
TRAINING_PACKAGES_FILE = "training_packages.txt"
FORMAT = 1

BundleDtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[BundleDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Provenance(Section):
    """Where the weights come from."""

    run_name: str
    step: int
    samples_seen: int
    weights: str
    """`raw`, or the average by name."""
    data_fingerprint: str
    versions: dict[str, str]


class BundleDescription(Section):
    """The content of bundle.json."""

    format: int
    written_by: str
    dtype: BundleDtype
    """Of the weights that are not quantized."""
    quantization: Quantization | None = None
    """Of the linears inside the blocks."""
    resolution: int
    shape: ModelShape
    diffusion: DiffusionConfig
    timestep_shift: float
    encoders: EncodersConfig
    copied_models: dict[str, str] = Field(default_factory=dict)
    """Directory in the bundle → the frozen network that its files are a copy of."""
    sampling: SamplingConfig
    """Defaults of `dsr-scale sample`."""
    provenance: Provenance
    weights_digest: str = ""
    """BLAKE2 of the weights file, 32 hexadecimal digits; filled in when it is written."""

    @property
    def precision(self) -> str:
        """What the weights are stored in, for people."""
        return (
            f"{self.quantization} in the blocks, else {self.dtype}"
            if self.quantization
            else self.dtype
        )

    @property
    def identity(self) -> dict[str, str]:
        """What tells this model from others: kept with everything made from it."""
        origin = self.provenance
        return {
            "run": origin.run_name,
            "step": str(origin.step),
            "weights": origin.weights,
            "precision": self.precision,
            "digest": self.weights_digest,
        }


def export_run(
    run_directory: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    dtype: BundleDtype = "fp32",
    quantization: Quantization | None = None,
    copy_encoders: bool = False,
) -> BundleDescription:
    """Writes the bundle of a run's checkpoint, the newest unless `step` is given.

    `weights` are `raw`, `ema` for the run's first average, or an average by name (`ema_9995`).

    Reads in one process whatever number of ranks saved, one tensor group at a time: memory is the
    model in fp32 and in `dtype`, never the optimizer. Raises InputError for a missing checkpoint, one of
    another model, encoder files that are not there, or a directory that cannot be written.
    """
    checkpoint = directory.find_checkpoint(run_directory, step)
    _require_place(out)
    state = directory.read_run_state(checkpoint)
    shape = directory.saved_section(checkpoint, ModelShape, state["model_shape"])
    config = state["config"]
    kind = weights_kind(weights, config["training"]["ema_decays"])
    encoders = directory.saved_section(checkpoint, EncodersConfig, config["encoders"])
    check_sources(encoders, out, copy_models=copy_encoders, replaced=_copied_before(out))
    copied = models_to_copy(encoders) if copy_encoders else {}
    description = BundleDescription(
        format=FORMAT,
        written_by=f"dsr-scale {__version__}",
        dtype=dtype,
        quantization=quantization,
        resolution=config["data"]["resolution"],
        shape=shape,
        diffusion=directory.saved_section(checkpoint, DiffusionConfig, config["diffusion"]),
        timestep_shift=state["timestep_shift"],
        encoders=relocated(encoders, lambda name: name, copied),
        copied_models=copied,
        sampling=directory.saved_section(checkpoint, SamplingConfig, config["grid"]["sampling"]),
        provenance=Provenance(
            run_name=config["name"],
            step=state["step"],
            samples_seen=state["samples_seen"],
            weights=weights if kind == "weights" else kind,
            data_fingerprint=state["data_fingerprint"],
            versions=state["versions"],
        ),
    )
    model = build_on_meta(shape).to_empty(device="cpu")
    load_checkpoint_weights(checkpoint, model, kind)
    history = read_history(run_directory, state["step"], config)
    return write_bundle(out, model, description, encoders, history=history)


def write_bundle(
    out: Path,
    model: nn.Module,
    description: BundleDescription,
    encoders: EncodersConfig,
    *,
    history: RunHistory | None = None,
) -> BundleDescription:
    """Writes `model`, which it casts and quantizes in place as described, and what belongs to it.

    A bundle that is in `out` is replaced, the model card included; other files there stay.
    `encoders` says where the files are now that the description places in the bundle. `history` is
    what the model card tells of the run. Returns the description as written, with the digest of the
    weights. Raises InputError for a directory that cannot be written, or a file that is not there.
    """
    _require_place(out)
    before, copied = _copied_before(out), description.copied_models
    check_sources(encoders, out, copy_models=bool(copied), replaced=before)
    if (out / DESCRIPTION_FILE).exists():
        remove_left_over(out, encoders, before - copied.keys())
    # Without its description a directory is no bundle: an export cut short leaves none.
    (out / DESCRIPTION_FILE).unlink(missing_ok=True)
    copy_files(encoders, out)
    if copied:
        copy_models(encoders, out)
    if description.quantization is not None:
        quantize_blocks(model, description.quantization)
    digest = _write_weights(out / WEIGHTS_FILE, model.to(DTYPES[description.dtype]))
    description = description.model_copy(update={"weights_digest": digest})
    atomic_files.write_json(out / DIFFUSERS_FILE, _diffusers_index())
    _write_texts(out, description, history)
    atomic_files.write_json(out / DESCRIPTION_FILE, description.model_dump(mode="json"))
    return description


def _require_place(out: Path) -> None:
    """Raises InputError for a directory that cannot be written, or whose README.md is no model card."""
    atomic_files.require_writable_directory(out)
    # The index is written before the card.
    if (out / CARD_FILE).exists() and not (out / DIFFUSERS_FILE).exists():
        raise InputError(
            found=f"{out / CARD_FILE}, which belongs to no bundle",
            required="a new directory, or one with a bundle that may be replaced",
            remedy="choose another directory",
        )


def _copied_before(out: Path) -> set[str]:
    """Directories of models that an earlier bundle in `out`, of whatever version, says are its copies."""
    try:
        copied = json.loads((out / DESCRIPTION_FILE).read_text())["copied_models"]
        return {name for name in copied if name in MODEL_DIRECTORIES}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _diffusers_index() -> dict[str, object]:
    """Names the classes of `diffusers_pipeline`, written out to leave diffusers unimported."""
    return {
        "_class_name": "DSRPipeline",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "transformer": ["dsr_scale.export.diffusers_pipeline", "BundleTransformer"],
    }


def _write_texts(out: Path, description: BundleDescription, history: RunHistory | None) -> None:
    """The model card with its picture, and the packages that trained and exported."""
    optional = {
        GRID_FILE: history.grid.read_bytes() if history and history.grid else None,
        TRAINING_PACKAGES_FILE: history.packages.encode() if history and history.packages else None,
    }
    for name, content in optional.items():
        if content is None:
            # Of an earlier export into the same directory.
            (out / name).unlink(missing_ok=True)
        else:
            atomic_files.write_bytes(out / name, content)
    machine = f"# Python {platform.python_version()}, {platform.platform()}\n"
    atomic_files.write_bytes(out / PACKAGES_FILE, (machine + packages_text()).encode())
    atomic_files.write_bytes(out / CARD_FILE, model_card(description, history).encode())


def _write_weights(path: Path, model: nn.Module) -> str:
    """Writes the weights; returns the digest of the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(content, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        # The library makes files that their owner alone may read.
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        atomic_files.rename(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            found=f"{path} could not be written: {error}",
            required="room for the weights, and permission to write them",
            remedy="free space or choose another directory",
        ) from error
    return digest.hexdigest()


def weights_kind(weights: str, ema_decays: list[float]) -> str:
    """What a checkpoint calls the wanted weights. Raises InputError for an average it does not hold."""
    names = [ema_name(decay) for decay in ema_decays]
    kinds = {"raw": "weights", "ema": names[0], **{name: name for name in names}}
    if weights not in kinds:
        raise InputError(
            found=f"weights {weights}",
            required="one of " + ", ".join(kinds),
            remedy="choose one of these with --weights; ema is the run's first average",
        )
    return kinds[weights]


@torch.no_grad()
def load_checkpoint_weights(checkpoint: Path, model: nn.Module, kind: str) -> None:
    """Fills `model` with a training checkpoint's weights or an average, and its saved buffers."""
    parameters = dict(model.named_parameters())
    targets: dict[str, torch.Tensor] = {f"{kind}.{n}": p for n, p in parameters.items()}
    targets |= {
        f"buffers.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name not in parameters
    }
    shapes = {name: target.shape for name, target in targets.items()}
    tensors.load(checkpoint, shapes, lambda name, tensor: targets[name].copy_(tensor))


def read_description(bundle: Path) -> BundleDescription:
    """Reads bundle.json. Raises InputError for a directory that is no bundle or of another format."""
    path = bundle / DESCRIPTION_FILE
    if not path.is_file():
        raise InputError(
            found=f"no {DESCRIPTION_FILE} in {bundle}",
            required="a directory written by dsr-scale export",
            remedy="export a run first: dsr-scale export RUN OUT",
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            found=f"{path} is damaged: {error}",
            required="the file as dsr-scale export wrote it",
            remedy="export the run again",
        ) from error
    if content.get("format") != FORMAT:
        raise InputError(
            found=f"bundle format {content.get('format')} in {path}",
            required=f"format {FORMAT}",
            remedy="export the run again with this version of dsr-scale",
        )
    try:
        description = BundleDescription.model_validate(content)
    except ValidationError as error:
        raise InputError(
            found=f"{path}, {content.get('written_by', 'of an unknown version')}, does not describe "
            f"a bundle: {error}",
            required=f"the file as dsr-scale {__version__} writes it",
            remedy="export the run again with this version, or use the one that wrote it",
        ) from error
    encoders = relocated(
        description.encoders, lambda name: str(bundle / name), description.copied_models
    )
    return description.model_copy(update={"encoders": encoders})


def read_model(bundle: Path, description: BundleDescription, device: torch.device) -> nn.Module:
    """The network of a bundle in evaluation mode. Raises InputError for weights that do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = bundle / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(
            found=f"no {WEIGHTS_FILE} in {bundle}",
            required="a complete bundle",
            remedy="export the run again",
        )
    model = build_on_meta(description.shape)
    if description.quantization is not None:
        quantize_blocks(model, description.quantization)
    try:
        # Takes the tensors of the file, of whatever dtype, instead of filling as many others.
        model.load_state_dict(load_file(path), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            found=f"{path} does not fit the network in {DESCRIPTION_FILE}: {error}",
            required="the weights written with that description",
            remedy="export the run again",
        ) from error
    return model.to(device).eval().requires_grad_(False)
