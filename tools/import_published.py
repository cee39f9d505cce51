"""Converts the released checkpoints of RAE and DSR into this project's files, and back.

    python tools/import_published.py statistics STAT.pt OUT.safetensors --encoder siglip2-b
    python tools/import_published.py bundle CHECKPOINT.pt OUT --encoder siglip2-b --statistics FILE
    python tools/import_published.py checkpoint CHECKPOINT.pt CONFIG [key=value …]
    python tools/import_published.py export BUNDLE_OR_RUN OUT.pt

A bundle samples; it takes the encoder, the decoder and how the network was trained from a list of what was
released, because no checkpoint says any of it. A checkpoint trains; there a run file says everything, and
the network in the file has to be the run's. Weights are compared with the network before anything
is written, and every key that does not fit is named.

With the optimizer that the released trainer saves, a run goes on as that trainer would have; the data
order is the run's own. Released files without one start a run: at step 0 with moments of zero.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsr_scale.base.errors import InputError
from dsr_scale.cli.export import BundleDtype
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.encoders import EncodersConfig, NoDecoder, NoText, RaeDecoder
from dsr_scale.export.published_settings import (
    IMAGENET_IMAGES,
    PUBLISHED_BATCH_IMAGES,
    PUBLISHED_SAMPLING,
    SETTINGS,
    Setting,
    released_for,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dsr_scale.base.boxes import Piece
    from dsr_scale.config.run import RunConfig
    from dsr_scale.export.published_files import PublishedFile
    from dsr_scale.train.state import RunState

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Kind(StrEnum):
    """Weights of a training file."""

    model = "model"
    ema = "ema"


class Output(StrEnum):
    """What the network puts out."""

    data = "data"
    velocity = "velocity"


EncoderOption = Annotated[
    str, typer.Option(help=f"Whose latents they are of: {', '.join(SETTINGS)}.")
]


@app.command()
def statistics(
    source: Annotated[Path, typer.Argument(help="Released file with mean and var.")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    encoder: EncoderOption,
    images: Annotated[int, typer.Option(help="Images that they are of.")] = IMAGENET_IMAGES,
) -> None:
    """Convert latent statistics; what whitens with them adds the same 1e-5 as the released code."""
    from dsr_scale.encoders.statistics import LatentStatistics, save_statistics
    from dsr_scale.encoders.whitening import statistics_identity
    from dsr_scale.export.published_files import read_statistics

    setting = released_for(encoder)
    mean, variance = read_statistics(source, setting.latents)
    save_statistics(
        out,
        LatentStatistics(images, mean, variance * images),
        statistics_identity(setting.image, setting.resolution),
    )
    _say(f"{out}: statistics {list(mean.shape)} of {setting.image.known_as}")


@app.command()
def bundle(
    source: Annotated[Path, typer.Argument(help="Released training file or state dict.")],
    out: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    encoder: EncoderOption,
    statistics: Annotated[
        Path, typer.Option(help="Latent statistics that `statistics` wrote, or dsr-scale stats.")
    ],
    weights: Annotated[Kind | None, typer.Option(help="The average, if there is one.")] = None,
    dtype: Annotated[BundleDtype, typer.Option(help="Precision.")] = BundleDtype.fp32,
    decoder: Annotated[
        str | None, typer.Option(help="AutoencoderRAE: hub name or directory; else as released.")
    ] = None,
    prediction: Annotated[
        Output | None, typer.Option(help="What the network puts out; else as released.")
    ] = None,
    register_start: Annotated[
        int | None, typer.Option(help="Block where registers enter; else ceil(2·depth/7).")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, where rotary tables were left out.")
    ] = None,
    head_heads: Annotated[int | None, typer.Option(help="The same of the DDT head.")] = None,
    head_depth: Annotated[
        int, typer.Option(help="Blocks of a DDT head that is as wide as the body.")
    ] = 2,
) -> None:
    """Write a bundle that `dsr-scale sample` reads."""
    from dsr_scale.export import published
    from dsr_scale.export.published_files import read_published

    setting = released_for(encoder)
    if prediction is not None:
        setting = setting._replace(prediction=prediction.value)
    file = read_published(source)
    kind = file.kind(weights)
    unstated = published.Unstated(register_start, heads, head_heads, head_depth)
    shape = published.infer_shape(file.states[kind], unstated)
    setting.check_network(shape)
    encoders = _encoders(setting, statistics, decoder)
    _tell_drift(published.check_published(file.states[kind], shape, f"{source} ({kind})"))
    _write_bundle(out, file, kind, shape, setting, encoders, dtype.value)
    _say(f"{out}: {kind} of {source}, {encoder}; registers enter at block {shape.register_start}")
    if isinstance(encoders.decoder, NoDecoder):
        _say("no decoder was released for this encoder: give one with --decoder to draw images")


def _encoders(setting: Setting, statistics: Path, decoder: str | None) -> EncodersConfig:
    """Raises InputError for statistics of another encoder."""
    import torch

    from dsr_scale.encoders.whitening import load_whitening

    image = setting.image.model_copy(update={"statistics": str(statistics)})
    load_whitening(image, resolution=setting.resolution, device=torch.device("cpu"))
    model = decoder or setting.decoder
    return EncodersConfig(
        image=image,
        text=NoText(),
        decoder=NoDecoder() if model is None else RaeDecoder(model=model),
    )


def _write_bundle(
    out: Path,
    file: PublishedFile,
    kind: str,
    shape: ModelShape,
    setting: Setting,
    encoders: EncodersConfig,
    dtype: Literal["fp32", "bf16", "fp16"],
) -> None:
    import torch

    import dsr_scale
    from dsr_scale.export import bundle
    from dsr_scale.export.encoder_files import relocated
    from dsr_scale.export.published import from_published
    from dsr_scale.model.build import build_on_meta

    description = bundle.BundleDescription(
        format=bundle.FORMAT,
        written_by=f"dsr-scale {dsr_scale.__version__}",
        dtype=dtype,
        resolution=setting.resolution,
        shape=shape,
        diffusion=DiffusionConfig(
            prediction=setting.prediction, shift=setting.shift or "dimension"
        ),
        timestep_shift=setting.timestep_shift(),
        encoders=relocated(encoders, lambda name: name),
        sampling=PUBLISHED_SAMPLING,
        provenance=bundle.Provenance(
            run_name=file.path.name,
            step=file.step or 0,
            samples_seen=(file.step or 0) * PUBLISHED_BATCH_IMAGES,
            weights="raw" if kind == "model" else kind,
            data_fingerprint="published",
            versions={"torch": torch.__version__},
        ),
    )
    model = build_on_meta(shape)
    model.load_state_dict(from_published(file.states[kind], shape), assign=True)
    bundle.write_bundle(out, model, description, encoders)


@app.command()
def checkpoint(
    source: Annotated[Path, typer.Argument(help="Released training file or state dict.")],
    config: Annotated[Path, typer.Argument(help="Run file of the run that goes on from it.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    step: Annotated[
        int | None, typer.Option(help="Step to go on from; else the file's, or 0 without moments.")
    ] = None,
    fresh_optimizer: Annotated[
        bool, typer.Option("--fresh-optimizer", help="Leave the file's moments out.")
    ] = False,
) -> None:
    """Write a training checkpoint into the run directory of CONFIG, which `dsr-scale train` resumes."""
    from dsr_scale.checkpoint import directory, saver
    from dsr_scale.config.derive import model_shape
    from dsr_scale.config.load import load_run
    from dsr_scale.config.shape_checks import check_shape
    from dsr_scale.export.published import check_published
    from dsr_scale.export.published_files import published_moments, read_published

    run = load_run(config, overrides or [])
    shape = model_shape(run)
    check_shape(shape)
    if held := directory.complete_steps(Path(run.directory)):
        raise InputError(
            found=f"checkpoints of steps {', '.join(map(str, held))} in {run.directory}",
            required="the directory of a run that has not begun",
            remedy="set another: directory=…",
        )
    file = read_published(source)
    for kind, weights in file.states.items():
        _tell_drift(check_published(weights, shape, f"{source} ({kind})"))
    moments = None if fresh_optimizer else published_moments(file, shape)
    if step is None:
        step = 0 if moments is None else file.step or moments[1]
    skipped = 0 if moments is None else max(0, step - moments[1])
    target = directory.step_directory(Path(run.directory), step)
    state = _run_state(run, shape, step, skipped).to_json()
    pieces = _pieces(file, shape, run.training.ema_decays, moments and moments[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        saver.save(target, pieces, state, group=None)
    what = "moments of zero" if moments is None else "AdamW's moments"
    _say(f"{target}: weights, averages, {what}. The data are other ones, so go on with")
    changed = "checkpoint.allow_changed=[data.fingerprint]"
    _say(shlex.join(["dsr-scale", "train", str(config), *(overrides or []), changed]))


def _run_state(run: RunConfig, shape: ModelShape, step: int, skipped: int) -> RunState:
    from dsr_scale.config.derive import timestep_shift
    from dsr_scale.train.state import RunState, library_versions

    return RunState(
        step=step,
        samples_seen=step * run.training.global_batch_images,
        skipped_steps=skipped,
        skipped_in_a_row=0,
        guard=(0.0,) * 5,
        corrupt_seen=0,
        data_fingerprint="published",
        data_samples=0,
        config=run.model_dump(mode="json"),
        model_shape=shape.model_dump(mode="json"),
        timestep_shift=timestep_shift(run, shape),
        tracker_run_id=None,
        layout={"tp": 1, "pp": 1, "dp": 1, "zero": run.parallel.zero},
        versions=library_versions(),
    )


def _pieces(
    file: PublishedFile,
    shape: ModelShape,
    ema_decays: Sequence[float],
    moments: Mapping[str, Mapping[str, Tensor]] | None,
) -> Iterator[Piece]:
    """Everything that a checkpoint of this network holds, each tensor whole."""
    import torch

    from dsr_scale.config.training import ema_name
    from dsr_scale.export.published import FREQUENCIES, from_published
    from dsr_scale.export.published_files import MOMENTS, frequencies

    average = from_published(file.states[file.kind(None)], shape)
    weights = from_published(file.states["model"], shape) if "model" in file.states else average
    weights = {name: value for name, value in weights.items() if name != FREQUENCIES}
    yield _whole(f"buffers.{FREQUENCIES}", frequencies(file))
    for name, weight in weights.items():
        yield _whole(f"weights.{name}", weight)
        for decay in ema_decays:
            yield _whole(f"{ema_name(decay)}.{name}", average[name])
    for kind in MOMENTS:
        padded = None if moments is None else from_published(moments[kind], shape)
        for name, weight in weights.items():
            value = torch.zeros_like(weight) if padded is None else padded[name]
            yield _whole(f"{kind}.{name}", value)


def _whole(name: str, value: Tensor) -> Piece:
    from dsr_scale.base.boxes import Box, Piece

    shape = tuple(value.shape)
    return Piece(name, shape, Box((0,) * len(shape), shape), value.contiguous())


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A bundle, or a run directory.")],
    out: Annotated[Path, typer.Argument(help="File to write, .pt.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; the newest.")] = None,
    average: Annotated[
        str | None, typer.Option(help="Average of a run, such as ema_9995; its first.")
    ] = None,
) -> None:
    """Write `model` and `ema` as the released code loads them; a bundle has one set for both."""
    import torch

    from dsr_scale.base import atomic_files
    from dsr_scale.export.bundle import DESCRIPTION_FILE

    atomic_files.require_writable_directory(out.parent)
    if (source / DESCRIPTION_FILE).is_file():
        content = _of_bundle(source)
    else:
        content = _of_run(source, step, average)
    temporary = out.with_name(f".{out.name}.partial")
    with atomic_files.storage_errors(out):
        torch.save(content, temporary)
        atomic_files.rename(temporary, out)
    _say(f"{out}: step {content['step']} of {source}")


def _of_bundle(source: Path) -> dict[str, Any]:
    import torch

    from dsr_scale.export.bundle import read_description, read_model
    from dsr_scale.export.published import to_published

    description = read_description(source)
    if description.quantization is not None:
        raise InputError(
            found=f"weights quantized to {description.quantization} in {source}",
            required="weights as they were trained",
            remedy="give a bundle that is not quantized, or the run",
        )
    model = read_model(source, description, torch.device("cpu"))
    state = to_published(model.state_dict(), description.shape)
    return {"step": description.provenance.step, "model": state, "ema": state}


def _of_run(source: Path, step: int | None, average: str | None) -> dict[str, Any]:
    from dsr_scale.checkpoint import directory
    from dsr_scale.config.training import ema_name
    from dsr_scale.export.bundle import load_checkpoint_weights
    from dsr_scale.export.published import to_published
    from dsr_scale.model.build import build_on_meta

    saved = directory.find_checkpoint(source, step)
    state = directory.read_run_state(saved)
    averages = [ema_name(decay) for decay in state["config"]["training"]["ema_decays"]]
    if average is not None and average not in averages:
        raise InputError(
            found=f"--average {average}",
            required=f"one of {', '.join(averages)}",
            remedy="choose an average that the run keeps",
        )
    shape = ModelShape.model_validate(state["model_shape"])
    content: dict[str, Any] = {"step": state["step"]}
    for released, kind in (("model", "weights"), ("ema", average or averages[0])):
        model = build_on_meta(shape).to_empty(device="cpu")
        load_checkpoint_weights(saved, model, kind)
        content[released] = to_published(model.state_dict(), shape)
    return content


def _tell_drift(drift: float) -> None:
    from dsr_scale.export.published import TABLE_TOLERANCE

    if drift > TABLE_TOLERANCE:
        _say(
            f"stored positions differ by up to {drift:.1g} from exact ones, as the released trainer's "
            "averaging leaves them; the network computes exact ones"
        )


def _say(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """Mistakes of input end with status 2 and three readable parts."""
    try:
        app()
    except InputError as error:
        _say(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
