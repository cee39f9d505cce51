"""The whole system on one machine: serve encoders, train, export, sample, and look.

It runs the commands a person would type, prints each before running it, and measures what came
out. A second network without registers is trained alike, so that token norms can be compared.
`--short` does the same with 16 images in under two minutes; with a GPU the run is longer.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.load import load_run

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("dsr-scale")
OUT = Path("runs/quickstart")

PROMPTS_COMPARED = 64
NORM_IMAGES = 16
NORM_TIMESTEP = 0.3
"""Model time at which token norms are compared; 1 is pure noise."""


SHORT = ROOT / "configs" / "quickstart_short.yaml"
CPU = ROOT / "configs" / "quickstart.yaml"
GPU = ROOT / "configs" / "quickstart_gpu.yaml"

console = Console()


def main() -> None:
    """Everything, in order; stops at the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="about two minutes on 2 CPU cores")
    options = parser.parse_args()
    declare_torchvision_operators()
    import torch

    devices = torch.cuda.device_count()
    config = SHORT if options.short else GPU if devices else CPU
    started_s = time.perf_counter()
    where = f"{devices} GPU(s)" if devices else "CPU"
    say(f"quickstart: {config.name} on {where}, into {OUT}")
    if OUT.exists():
        previous = OUT.with_name(f"{OUT.name}.previous")
        say(f"the results of an earlier quickstart go to {previous}, replacing what is there")
        if previous.exists():
            shutil.rmtree(previous)
        OUT.rename(previous)
    training = load_run(config).training
    processes = data_parallel(training.global_batch_images, devices)
    share = training.global_batch_images // processes
    micro = f"training.microbatch_images={largest_divisor(share, training.microbatch_images)}"

    say("1/5 what the config means, before anything is spent")
    run(COMMAND, "plan", config, micro, "--devices", processes)
    registry = f"encoder.registry={OUT / 'encoder_servers'}"
    with encoder_service(config, registry):
        through_it = ["encoder.mode=service", registry]
        say("2/5 train with diffusion registers, on what the encoder service gives")
        train(config, processes, micro, *through_it)
        say("3/5 train the same without registers, to compare token norms")
        no_registers = ["model.registers.count=0", f"directory={OUT / 'baseline'}", "name=baseline"]
        train(config, processes, micro, *through_it, *no_registers, "grid.every_steps=null")
    say("4/5 export the averaged weights to one device, and sample")
    for name in ("registers", "baseline"):
        run(COMMAND, "export", OUT / name, OUT / f"{name}_bundle")
    prompts = ["--prompt", "lobster", "--prompt", "taxi"]
    run(COMMAND, "sample", OUT / "registers_bundle", *prompts, "--out", OUT / "two_prompts.png")
    say("5/5 measure and draw")
    draw_samples(config)
    draw_loss()
    draw_norms(config)
    minutes = (time.perf_counter() - started_s) / 60
    command = COMMAND.relative_to(Path.cwd()) if COMMAND.is_relative_to(Path.cwd()) else COMMAND
    say(
        f"done in {minutes:.1f} minutes. In {OUT}: samples.png (prompts beside their nearest training "
        "images), loss.png, token_norms.png, two_prompts.png, registers_bundle/, registers/ "
        "(checkpoints, metrics.jsonl, grids). Next: "
        f'{command} sample {OUT / "registers_bundle"} --prompt "green apple", and docs/quickstart.md'
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


@contextlib.contextmanager
def encoder_service(*words: object) -> Iterator[None]:
    """The frozen encoders in a process of their own; ends when it is left, however that is."""
    command = [str(word) for word in (COMMAND, "serve", *words)]
    console.print(f"[dim]$ {shlex.join(command)} &[/dim]", soft_wrap=True, highlight=False)
    service = subprocess.Popen(command)
    try:
        yield
    finally:
        service.terminate()
        service.wait()


def data_parallel(global_batch_images: int, devices: int) -> int:
    """Processes to start: one per GPU, but no more than share the global batch evenly; at least one."""
    return largest_divisor(global_batch_images, max(1, devices))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def train(config: Path, processes: int, *overrides: str) -> None:
    """Trains in one process, or in one per GPU under torchrun."""
    launcher: list[object] = [COMMAND]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={processes}", COMMAND]
    run(*launcher, "train", config, *overrides)


def draw_samples(config: Path) -> None:
    """Samples training prompts, finds each one's nearest training image, prints how many match."""
    from dsr_scale.evaluate.nearest import nearest_match
    from dsr_scale.evaluate.training_images import training_images
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import image_grid
    from dsr_scale.telemetry.progress import work_bar

    settings = load_run(config)
    data = settings.data
    assert data.max_samples is not None
    images, captions = training_images(data, data.max_samples)
    prompts = captions[:PROMPTS_COMPARED]
    sampling = read_description(OUT / "registers_bundle").sampling
    with work_bar(console) as bar:
        task = bar.add_task("sampling", total=-(-len(prompts) // 16) * sampling.steps)
        samples = load(OUT / "registers_bundle").sample(
            prompts,
            seed=1,
            sampling=sampling,
            on_step=lambda done, total: bar.advance(task),
        )
    match = nearest_match(samples, prompts, images, captions)
    say(str(match))
    shown = [prompts.index(prompt) for prompt in settings.grid.prompts]
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


def draw_norms(config: Path) -> None:
    """Token norms by block of both networks."""
    import torch

    from dsr_scale.encoders.contract import build_image_encoder
    from dsr_scale.evaluate.norms import block_norms
    from dsr_scale.evaluate.training_images import training_images
    from dsr_scale.export.bundle import read_description
    from dsr_scale.export.pipeline import load
    from dsr_scale.telemetry.pictures import token_norm_picture

    images, captions = training_images(load_run(config).data, NORM_IMAGES)
    measured = {}
    for name, folder in (("registers", "registers_bundle"), ("no registers", "baseline_bundle")):
        description = read_description(OUT / folder)
        pipeline = load(OUT / folder)
        encoder = build_image_encoder(
            description.encoders.image,
            resolution=description.resolution,
            device=torch.device(pipeline.device),
        )
        measured[name] = block_norms(pipeline, encoder, images, captions, timestep=NORM_TIMESTEP)
        worst = max(measured[name], key=lambda block: block.outlier_ratio)
        say(
            f"{name}: at most {worst.outlier_ratio:.1%} outlier tokens (after {worst.block}), largest "
            f"norm {max(block.max_over_median for block in measured[name]):.1f} times the median"
        )
    rows, columns = description.shape.grid
    patch = description.shape.patch
    token_norm_picture(
        measured,
        (rows // patch, columns // patch),
        f"Norms of image tokens after each block, step {description.provenance.step}, model time "
        f"{NORM_TIMESTEP}; maps of '{captions[0]}' in units of the block's median; "
        f"curves: mean of {len(images)} images",
        OUT / "token_norms.png",
    )


if __name__ == "__main__":
    main()
