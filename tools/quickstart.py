"""The whole system on one machine: train, export, sample, and look.

It runs the commands a person would type, prints each before running it, and measures what came
out. A second network without registers is trained for fewer steps, and compared with the first at
that same step. `--short` proves in two minutes that everything works and is too short for good
pictures; with a GPU the run is longer.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.load import load_run

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("dsr-scale")
OUT = Path("runs/quickstart")

PROMPTS_COMPARED = 64
PROMPTS_SHOWN = 16
NORM_IMAGES = 16
NORM_TIMESTEP = 0.3
"""Model time at which token norms are compared; 1 is pure noise."""


@dataclass(frozen=True)
class Form:
    """Which run file, and how long the network without registers trains."""

    config: Path
    baseline_steps: int


SHORT = Form(ROOT / "configs" / "quickstart_short.yaml", baseline_steps=40)
CPU = Form(ROOT / "configs" / "quickstart.yaml", baseline_steps=100)
GPU = Form(ROOT / "configs" / "quickstart_gpu.yaml", baseline_steps=10_000)

console = Console()


def main() -> None:
    """Everything, in order; stops at the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="about two minutes on 2 CPU cores")
    options = parser.parse_args()
    declare_torchvision_operators()
    import torch

    devices = torch.cuda.device_count()
    form = SHORT if options.short else GPU if devices else CPU
    started_s = time.perf_counter()
    say(
        f"quickstart: {form.config.name} on {f'{devices} GPU(s)' if devices else 'CPU'}, into {OUT}"
    )
    shutil.rmtree(OUT, ignore_errors=True)

    say("1/5 what the config means, before anything is spent")
    run(COMMAND, "plan", form.config)
    say("2/5 train with diffusion registers")
    train(form, devices, f"checkpoint.keep_every_steps={form.baseline_steps}")
    say(f"3/5 train {form.baseline_steps} steps without registers, for comparison at that step")
    train(
        form,
        devices,
        f"directory={OUT / 'baseline'}",
        "model.registers.count=0",
        f"training.steps={form.baseline_steps}",
        "training.schedule.decay=constant",
        "grid.every_steps=null",
    )
    say("4/5 export the averaged weights to one device, and sample")
    run(COMMAND, "export", OUT / "registers", OUT / "bundle")
    prompts = ["--prompt", "teapot", "--prompt", "rocket"]
    run(COMMAND, "sample", OUT / "bundle", *prompts, "--out", OUT / "two_prompts.png")
    for name in ("registers", "baseline"):
        step = ["--step", str(form.baseline_steps)]
        run(COMMAND, "export", OUT / name, OUT / f"{name}_early", *step)
    say("5/5 measure and draw")
    draw_samples(form)
    draw_loss()
    draw_norms(form)
    minutes = (time.perf_counter() - started_s) / 60
    say(
        f"done in {minutes:.1f} minutes. In {OUT}: samples.png (prompts beside their nearest training "
        "images), loss.png, token_norms.png, two_prompts.png, bundle/, registers/ (checkpoints, "
        "metrics.jsonl, grids). Try next: "
        f"{COMMAND.relative_to(Path.cwd()) if COMMAND.is_relative_to(Path.cwd()) else COMMAND} "
        f'sample {OUT / "bundle"} --prompt "red heart" and docs/quickstart.md'
    )


def say(text: str) -> None:
    """One line to the person watching."""
    console.print(f"[bold green]{text}[/bold green]", soft_wrap=True, highlight=False)


def run(*words: object) -> None:
    """Shows a command and runs it; ends with its status when it fails."""
    command = [str(word) for word in words]
    console.print(f"[dim]$ {shlex.join(command)}[/dim]", soft_wrap=True, highlight=False)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def train(form: Form, devices: int, *overrides: str) -> None:
    """Trains in one process, or in one per GPU under torchrun."""
    launcher: list[object] = [COMMAND]
    if devices > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={devices}", COMMAND]
    run(*launcher, "train", form.config, *overrides)


def draw_samples(form: Form) -> None:
    """Samples training prompts, finds each one's nearest training image, prints how many match."""
    from dsr_scale.evaluate.nearest import nearest_match
    from dsr_scale.evaluate.training_images import training_images
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import image_grid
    from dsr_scale.telemetry.progress import work_bar

    data = load_run(form.config).data
    assert data.max_samples is not None
    images, captions = training_images(data, data.max_samples)
    prompts = captions[:PROMPTS_COMPARED]
    sampling = read_description(OUT / "bundle").sampling
    with work_bar(console) as bar:
        task = bar.add_task("sampling", total=-(-len(prompts) // 16) * sampling.steps)
        samples = load(OUT / "bundle").sample(
            prompts,
            seed=1,
            sampling=sampling,
            on_step=lambda done, total: bar.advance(task),
        )
    match = nearest_match(samples, prompts, images, captions)
    say(str(match))
    shown = list(range(min(PROMPTS_SHOWN, len(prompts))))
    image_grid(
        [
            ("sample", samples[shown]),
            ("nearest", images[[match.nearest[i] for i in shown]]),
        ],
        [prompts[i] for i in shown],
        OUT / "samples.png",
        metadata={"match": str(match)},
    )


def draw_loss() -> None:
    """The loss of both runs."""
    from dsr_scale.telemetry.metrics import read_metrics
    from dsr_scale.telemetry.pictures import loss_curve

    loss_curve(
        {
            "with registers": read_metrics(OUT / "registers"),
            "without registers": read_metrics(OUT / "baseline"),
        },
        OUT / "loss.png",
    )


def draw_norms(form: Form) -> None:
    """Token norms by block of both networks after the same number of steps."""
    import torch

    from dsr_scale.encoders.contract import build_image_encoder
    from dsr_scale.evaluate.norms import block_norms
    from dsr_scale.evaluate.training_images import training_images
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import token_norm_picture

    images, captions = training_images(load_run(form.config).data, NORM_IMAGES)
    measured = {}
    for name, folder in (("registers", "registers_early"), ("no registers", "baseline_early")):
        description = read_description(OUT / folder)
        pipeline = load(OUT / folder)
        encoder = build_image_encoder(
            description.encoders.image,
            resolution=description.resolution,
            device=torch.device(pipeline.device),
        )
        measured[name] = block_norms(pipeline, encoder, images, captions, timestep=NORM_TIMESTEP)
    rows, columns = description.shape.grid
    patch = description.shape.patch
    token_norm_picture(
        measured,
        (rows // patch, columns // patch),
        f"Image-token norms after each block, both after {form.baseline_steps} steps, model time "
        f"{NORM_TIMESTEP}; maps: '{captions[0]}', in units of the block's median",
        OUT / "token_norms.png",
    )


if __name__ == "__main__":
    main()
