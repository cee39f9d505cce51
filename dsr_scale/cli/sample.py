"""`dsr-scale sample`: prompts and a bundle → a PNG grid that remembers how it was made."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Solver(StrEnum):
    """Solvers of the sampling ODE."""

    euler = "euler"
    heun = "heun"
    dpm = "dpm++"


class Device(StrEnum):
    """Where to compute; `auto` takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def sample(
    bundle: Annotated[Path, typer.Argument(help="Directory written by dsr-scale export.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A caption; repeatable.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One caption per line.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="Default: the bundle's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="1 is off; default: the bundle's.")
    ] = None,
    autoguidance: Annotated[
        Path | None, typer.Option(help="Bundle of a weaker model to guide away from.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
) -> None:
    """Draw one image per prompt."""
    from rich.console import Console

    prompts = _prompts(prompt or [], prompts_file)
    from dsr_scale.base.errors import InputError
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import image_grid
    from dsr_scale.telemetry.progress import work_bar

    chosen = read_description(bundle).sampling
    given = {"steps": steps, "solver": solver and solver.value, "guidance": guidance}
    sampling = type(chosen).model_validate(
        chosen.model_dump() | {key: value for key, value in given.items() if value is not None}
    )
    pipeline = load(bundle, device=device.value)
    weaker = None if autoguidance is None else load(autoguidance, device=device.value)
    if weaker is not None and weaker.latent_space != pipeline.latent_space:
        raise InputError(
            found=f"latents of {pipeline.latent_space} in {bundle}, {weaker.latent_space} in {autoguidance}",
            required="two models of the same latents",
            remedy="guide with a smaller or less trained model of the same encoder and resolution",
        )
    console = Console(stderr=True)
    with work_bar(console) as bar:
        chunks = -(-len(prompts) // batch)
        task = bar.add_task("sampling", total=chunks * sampling.steps)
        images = pipeline.sample(
            prompts,
            seed=seed,
            sampling=sampling,
            batch=batch,
            weaker=weaker,
            on_step=lambda done, total: bar.advance(task),
        )
    metadata = {
        "prompts": "\n".join(prompts),
        "seed": str(seed),
        "sampling": sampling.model_dump_json(),
        "bundle": str(bundle),
        "autoguidance": str(autoguidance),
    }
    image_grid([("", images)], prompts, out, side=max(96, images.shape[-1]), metadata=metadata)
    console.print(f"{len(prompts)} images → {out}")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    from dsr_scale.base.errors import InputError

    prompts = list(given)
    if file is not None:
        if not file.is_file():
            raise InputError(
                found=f"no prompt file {file}",
                required="a text file with one caption per line",
                remedy="check the path given with --prompts-file",
            )
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(
                found=f"{file} is not UTF-8 text: {error}",
                required="one caption per line, in UTF-8",
                remedy="convert the file",
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(
            found="no prompt",
            required="at least one caption",
            remedy='give --prompt "…" or --prompts-file FILE',
        )
    return prompts
