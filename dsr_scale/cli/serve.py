"""`dsr-scale serve`: the frozen encoders of a run file, one server per device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    config: Annotated[Path, typer.Argument(help="Run file (YAML), the same as for train.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. encoder.server.listen=0.0.0.0:7070")
    ] = None,
) -> None:
    """Serve latents and caption tokens to training runs until Ctrl-C or SIGTERM.

    Prints a line for each server that can be asked. Trainers of the same run directory find it.
    """
    from dsr_scale.config.load import load_any_run

    run = load_any_run(config, overrides or [])
    from dsr_scale.encode_service.processes import Servers, check_before_start
    from dsr_scale.encode_service.serving import Ready

    devices = check_before_start(run)
    encoders = run.encoders
    images = getattr(encoders.image, "known_as", getattr(encoders.image, "model", ""))
    captions = getattr(encoders.text, "model", "")

    def ready(server: Ready) -> None:
        typer.echo(
            f"serving {server.address} on {server.device} · "
            f"metrics http://{server.metrics_address}/metrics · "
            f"images {f'{encoders.image.kind} {images}'.strip()} · "
            f"captions {f'{encoders.text.kind} {captions}'.strip()} · "
            f"contract {server.fingerprint}"
        )

    def say(text: str) -> None:
        typer.echo(text, err=True)

    status = Servers(run, devices, ready=ready, say=say).watch()
    if status:
        raise typer.Exit(status)
