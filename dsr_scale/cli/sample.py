"""`dsr-scale sample`: a bundle and prompts → a PNG grid that remembers how it was made, or a page."""

from __future__ import annotations

import importlib.util
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsr_scale import __version__
from dsr_scale.base.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from dsr_scale.config.diffusion import SamplingConfig
    from dsr_scale.evaluate.demo import Demo
    from dsr_scale.export.pipeline import Pipeline


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


class Dtype(StrEnum):
    """Precision to compute in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


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
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Model times (after the shift; 1 is noise) between which guidance applies; "
            "default: the bundle's.",
        ),
    ] = None,
    autoguidance: Annotated[
        Path | None, typer.Option(help="Bundle of a weaker model to guide away from.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the bundle's.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks first: for many images.")
    ] = False,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Instead of writing a PNG, serve a page on this machine that draws images and shows "
            "their token norms; it begins with the settings given here.",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Of that page; default: the first free from 7860 on."),
    ] = None,
) -> None:
    """Draw one image per prompt."""
    from rich.console import Console

    prompts = list(prompt or [])
    if serve:
        _require_servable(prompts, prompts_file)
    else:
        prompts = _prompts(prompts, prompts_file)
    given = {
        "steps": steps,
        "solver": solver and solver.value,
        "guidance": guidance,
        "guidance_interval": guidance_interval and _interval(guidance_interval),
    }
    from dsr_scale.base.atomic_files import require_writable_directory
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import image_grid
    from dsr_scale.telemetry.progress import work_bar

    if not serve:
        require_writable_directory(out.parent)
    description = read_description(bundle)
    sampling = _sampling(description.sampling, given)
    precision = None if dtype is None else dtype.value
    pipeline = load(bundle, device=device.value, dtype=precision, compile=compile)
    weaker = None
    if autoguidance is not None:
        weaker = load(autoguidance, device=device.value, dtype=precision, compile=compile)
        _require_same_latents(pipeline, bundle, weaker, autoguidance)
    origin = {
        "bundle": str(bundle),
        "model": json.dumps(description.identity),
        "device": str(pipeline.device),
        "dtype": precision or description.dtype,
        "compile": str(compile).lower(),
        "software": f"dsr-scale {__version__}",
    }
    if autoguidance is not None:
        origin["autoguidance"] = json.dumps(read_description(autoguidance).identity)
    console = Console(stderr=True)
    if serve:
        from dsr_scale.evaluate.demo import Demo

        made_by = description.provenance
        title = f"{bundle.resolve().name}: {made_by.run_name}, step {made_by.step}"
        first = prompts[0] if prompts else ""
        _serve(Demo(pipeline, sampling, title, first, seed, weaker, origin), port, console)
        return
    with work_bar(console) as bar:
        task = bar.add_task("sampling", total=-(-len(prompts) // batch) * sampling.steps)
        images = pipeline.sample(
            prompts,
            seed=seed,
            sampling=sampling,
            batch=batch,
            weaker=weaker,
            on_step=lambda done, total: bar.advance(task),
        )
    settings = {"seed": str(seed), "sampling": sampling.model_dump_json(), "batch": str(batch)}
    metadata = {"prompts": "\n".join(prompts), **settings, **origin}
    image_grid([("", images)], prompts, out, side=max(96, images.shape[-1]), metadata=metadata)
    console.print(f"{len(prompts)} images → {out}", markup=False)


def _require_servable(prompts: list[str], prompts_file: Path | None) -> None:
    """Raises InputError for what a page cannot begin with, and without what it is made of."""
    if prompts_file is not None or len(prompts) > 1:
        raise InputError(
            found="--serve with several prompts",
            required="one --prompt at most: the page draws one image at a time",
            remedy="leave --serve out to draw them all, or give the first alone",
        )
    if importlib.util.find_spec("gradio") is None:
        raise InputError(
            found="no package gradio",
            required="what the page of --serve is made of",
            remedy="pip install 'dsr-scale[web]'",
        )


def _serve(demo: Demo, port: int | None, console: Console) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    import signal
    import threading

    from dsr_scale.evaluate.demo import serving

    over = threading.Event()
    # Set even where they are ignored, as by a shell for what it starts in the background.
    before = {
        number: signal.signal(number, lambda *_: over.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with serving(demo, port=port) as address:
            console.print(f"{demo.title} → {address} (Ctrl-C ends it)", markup=False)
            over.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
        fits = 0 <= low < high <= 1
    except ValueError:
        fits, low, high = False, 0.0, 0.0
    if not fits:
        raise InputError(
            found=f"--guidance-interval {text}",
            required="LOW,HIGH with 0 ≤ LOW < HIGH ≤ 1, in model time: 0 is data, 1 is noise",
            remedy="write for example --guidance-interval 0.1,0.9; 0,1 is everywhere",
        )
    return low, high


def _sampling(chosen: SamplingConfig, given: dict[str, object]) -> SamplingConfig:
    """The bundle's settings with those that were given in their place."""
    from pydantic import ValidationError

    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return type(chosen).model_validate(chosen.model_dump() | changes)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        raise InputError(
            found=f"--{name} {changes[name]}",
            required=problem["msg"],
            remedy="correct it, or leave it out for the bundle's own",
        ) from error


def _require_same_latents(
    pipeline: Pipeline, bundle: Path, weaker: Pipeline, autoguidance: Path
) -> None:
    if weaker.latent_space != pipeline.latent_space:
        raise InputError(
            found=f"latents of {pipeline.latent_space} in {bundle}, {weaker.latent_space} in {autoguidance}",
            required="two models of the same latents",
            remedy="guide with a smaller or less trained model of the same encoder and resolution",
        )


def _prompts(given: list[str], file: Path | None) -> list[str]:
    from dsr_scale.evaluate.sample_sets import read_prompts

    prompts = [*given, *(read_prompts(file) if file is not None else ())]
    if not prompts:
        raise InputError(
            found="no prompt",
            required="at least one caption",
            remedy='give --prompt "…" or --prompts-file FILE',
        )
    return prompts
