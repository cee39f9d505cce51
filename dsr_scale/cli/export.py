"""`dsr-scale export`: a run's checkpoint of any number of ranks → one bundle for one device."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class BundleDtype(StrEnum):
    """Precision of the exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    run: Annotated[Path, typer.Argument(help="Run directory of dsr-scale train.")],
    out: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; the newest by default.")] = None,
    weights: Annotated[
        str,
        typer.Option(help="`raw`, `ema` (the run's first average), or one by name: `ema_9995`."),
    ] = "ema",
    dtype: Annotated[BundleDtype, typer.Option(help="Precision.")] = BundleDtype.fp32,
) -> None:
    """Write safetensors and a description that `dsr-scale sample` reads without the trainer."""
    from rich.console import Console

    from dsr_scale.export.bundle import export_run

    description = export_run(run, out, step=step, weights=weights, dtype=dtype.value)
    Console(stderr=True).print(
        f"step {description.provenance.step} ({description.provenance.weights}, {dtype.value}) of "
        f"{description.provenance.run_name} → {out}"
    )
