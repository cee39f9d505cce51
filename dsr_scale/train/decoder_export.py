"""A decoder's checkpoint of any number of ranks → the folder that runs of diffusion transformers name.

`encoders.decoder: {kind: rae, model: FOLDER}` reads it, and so does diffusers' `AutoencoderRAE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dsr_scale.base import atomic_files
from dsr_scale.checkpoint import directory
from dsr_scale.config.decoder import DecoderRun, DecoderShape
from dsr_scale.config.encoders import VitImage
from dsr_scale.decoders.network import save_autoencoder
from dsr_scale.export.bundle import load_checkpoint_weights, weights_kind
from dsr_scale.train.decoder_build import new_network


class ExportedDecoder(NamedTuple):
    """What was written."""

    run_name: str
    step: int
    weights: str
    """`weights`, or the average by name."""


def export_decoder(
    run_directory: Path, out: Path, *, step: int | None = None, weights: str = "ema"
) -> ExportedDecoder:
    """Writes the decoder in float32; `weights` are `raw`, `ema`, or an average by name.

    Reads in one process whatever number of ranks saved; memory is the decoder. Raises InputError for
    a missing checkpoint, an average that was not kept, or a directory that cannot be written.
    """
    checkpoint = directory.find_checkpoint(run_directory, step)
    atomic_files.require_writable_directory(out)
    state = directory.read_run_state(checkpoint)
    run = directory.saved_section(checkpoint, DecoderRun, state["config"])
    kind = weights_kind(weights, list(run.training.ema_decays))
    shape = directory.saved_section(checkpoint, DecoderShape, state["model_shape"])
    network = new_network(shape, run.seed)
    load_checkpoint_weights(checkpoint, network, kind)
    save_autoencoder(network, out, encoder_name=_encoder_name(run))
    return ExportedDecoder(run.name, state["step"], kind)


def _encoder_name(run: DecoderRun) -> str:
    """The encoder, and what is done about its outlier tokens."""
    image = run.encoders.image
    assert isinstance(image, VitImage), "no other encoder's decoder is trained"
    treated = "" if image.outliers.kind == "none" else f" with {image.outliers.kind}"
    return f"{image.known_as}{treated}"
