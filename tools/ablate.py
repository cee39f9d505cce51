"""Runs a list of run files at small scale, several seeds of each, and compares them.

    python tools/ablate.py configs/ablation/{baseline,diffusion_registers,deeper_baseline}.yaml \\
        --size small --seeds 2 --out runs/ablation --prompt "red apple"

All files are loaded and checked before the first is trained; then the runs follow one another, since
one machine trains one run best alone. Stopped, the same command goes on: finished runs are not trained
again, an interrupted one continues from its checkpoint. Differences are to the first file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsr_scale.base.errors import InputError
from tools.comparison import commands
from tools.comparison.compare import compare
from tools.comparison.measures import Questions, check_questions
from tools.comparison.report import REPORT_FILE
from tools.comparison.runs import Size, plan_runs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ablate(
    configs: Annotated[list[Path], typer.Argument(help="Run files; the first is the reference.")],
    out: Annotated[Path, typer.Option(help="Directory of all runs and of the report.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each file, with seeds from 0.")] = 2,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override in every file; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of every run.")] = None,
    size: Annotated[
        Size,
        typer.Option(
            help="small: pixels of the shipped emoji, width 96, 1000 steps, depth as written, registers "
            "in proportion to image tokens."
        ),
    ] = Size.as_written,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Drawn by every run; repeatable.")
    ] = None,
    recognition: Annotated[
        int, typer.Option(min=0, help="Training captions to sample and recognise; 0 is off.")
    ] = 0,
    held_out: Annotated[str | None, typer.Option(help="Shards for the held-out loss.")] = None,
    held_out_samples: Annotated[int | None, typer.Option(min=1)] = None,
    outlier_images: Annotated[int, typer.Option(min=2)] = 64,
    timesteps: Annotated[
        str, typer.Option(help="For outliers; 1 is noise.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    reference: Annotated[str | None, typer.Option(help="Real images for FID.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Images for FID and CLIPScore, of the prompts in turn."),
    ] = None,
    inception_weights: Annotated[str | None, typer.Option(help="For FID.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP model for CLIPScore.")] = None,
    device: Annotated[str, typer.Option(help="For measuring: cpu, cuda or auto.")] = "auto",
) -> None:
    """Train, measure and compare."""
    questions = Questions(
        prompts=tuple(prompt or ()),
        recognition_prompts=recognition,
        held_out=held_out,
        held_out_samples=held_out_samples,
        outlier_images=outlier_images,
        timesteps=timesteps,
        reference=reference,
        samples=samples,
        inception_weights=inception_weights,
        clip=clip,
        device=device,
    )
    runs = plan_runs(configs, seeds, out, overrides=settings or (), size=size, steps=steps)
    for run in runs:
        check_questions(questions, run.run)
    failures = compare(runs, questions, out, title=f"{configs[0].stem} and others")
    commands.console.print(f"→ {out / REPORT_FILE}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def main() -> None:
    """Mistakes of input end with status 2 and three readable parts."""
    from dsr_scale.cli.main import show_input_error

    try:
        app()
    except InputError as error:
        show_input_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
