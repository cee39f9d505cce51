"""`dsr-scale export`: a run's checkpoint of any number of ranks → one bundle for one device.

Of a run that trained a decoder it is the folder that `encoders.decoder` of other runs names.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsr_scale.base.errors import InputError


class BundleDtype(StrEnum):
    """Precision of the exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Quantization(StrEnum):
    """8-bit weights in the blocks."""

    int8 = "int8"
    fp8 = "fp8"


def export(
    run: Annotated[Path, typer.Argument(help="Run directory of dsr-scale train.")],
    out: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; the newest by default.")] = None,
    weights: Annotated[
        str,
        typer.Option(help="`raw`, `ema` (the run's first average), or one by name: `ema_9995`."),
    ] = "ema",
    dtype: Annotated[BundleDtype, typer.Option(help="Precision.")] = BundleDtype.fp32,
    quantize: Annotated[
        Quantization | None,
        typer.Option(
            help="8-bit weights for the linears in the blocks; the rest stays in --dtype."
        ),
    ] = None,
    copy_encoders: Annotated[
        bool,
        typer.Option(
            "--copy-encoders", help="Copy the frozen networks too: no hub, no other path needed."
        ),
    ] = False,
) -> None:
    """Write a bundle that `dsr-scale sample` and diffusers read without the trainer; of a decoder,
    the folder that `encoders.decoder.model` names."""
    from rich.console import Console

    from dsr_scale.checkpoint import directory

    if "decoder" in directory.read_run_state(directory.find_checkpoint(run, step))["config"]:
        if dtype != BundleDtype.fp32 or quantize is not None or copy_encoders:
            raise _decoder_as_it_is()
        _export_decoder(run, out, step, weights)
        return
    from dsr_scale.export.bundle import export_run

    description = export_run(
        run,
        out,
        step=step,
        weights=weights,
        dtype=dtype.value,
        quantization=None if quantize is None else quantize.value,
        copy_encoders=copy_encoders,
    )
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console = Console(stderr=True)
    console.print(
        f"step {description.provenance.step} ({description.provenance.weights}, "
        f"{description.precision}) of {description.provenance.run_name} → {out}, "
        f"{size_bytes / 2**20:.1f} MiB",
        markup=False,
    )
    console.print(
        f"before publishing it, fill in the licences in {out / 'README.md'}", markup=False
    )


def _export_decoder(run: Path, out: Path, step: int | None, weights: str) -> None:
    from dsr_scale.train.decoder_export import export_decoder

    written = export_decoder(run, out, step=step, weights=weights)
    typer.echo(
        f"step {written.step} ({written.weights}) of {written.run_name} → {out}; use it as "
        f"encoders.decoder: {{kind: rae, model: {out}}}",
        err=True,
    )


def _decoder_as_it_is() -> InputError:
    return InputError(
        found="--dtype, --quantize or --copy-encoders for a decoder",
        required="none of them: its folder holds the decoder alone, in float32",
        remedy="leave them out; the bundle of a diffusion transformer copies decoders",
    )
