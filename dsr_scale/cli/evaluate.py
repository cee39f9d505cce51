"""`dsr-scale evaluate`: a bundle, or images that exist, → metrics as a table and a JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from dsr_scale.config.diffusion import SamplingConfig
    from dsr_scale.evaluate.metrics import Benchmarks, Metric
    from dsr_scale.evaluate.offline import Subject
    from dsr_scale.evaluate.reference_set import ReferenceImages
    from dsr_scale.evaluate.report import Report
    from dsr_scale.evaluate.sample_sets import SampleSet
    from dsr_scale.export.bundle import BundleDescription


def evaluate(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory written by dsr-scale export.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid, sfid, inception_score, precision_recall, clip_score, geneval, dpg, held_out_loss, "
            "separated by commas; default: all that the other options allow."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images: a folder, shards, or an ADM .npz.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt per line, for images to draw or for --images.")
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option(help="evaluation_metadata.jsonl: four images of each prompt of GenEval."),
    ] = None,
    dpg: Annotated[
        Path | None, typer.Option(help="dpg_bench.csv: four images of each prompt of DPG-Bench.")
    ] = None,
    class_balanced: Annotated[
        int | None, typer.Option(min=1, help="Draw this many images, of all classes in turn.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Draw images for the captions or classes of these shards.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Images to draw for --prompts-file or --data; default: one each."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Draw none, evaluate these: a folder, shards, or a .npz."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Shards that were not trained on, for held_out_loss.")
    ] = None,
    held_out_samples: Annotated[
        int | None, typer.Option(min=1, help="Default: all, at most 1000.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's file; default: the one in torch's cache.")
    ] = None,
    clip: Annotated[
        str, typer.Option(help="CLIP model: a directory or a hub name.")
    ] = "openai/clip-vit-large-patch14",
    detector: Annotated[
        str, typer.Option(help="Object detector for geneval: a directory or a hub name.")
    ] = "facebook/mask2former-swin-small-coco-instance",
    vqa: Annotated[
        str, typer.Option(help="VQA model for dpg: a directory or a hub name.")
    ] = "Salesforce/blip-vqa-capfilt-large",
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json.")] = Path("evaluation"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="1 is off; default: the bundle's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = "auto",
) -> None:
    """Measure images against real ones and their prompts, and the loss on held-out data."""
    from rich.console import Console

    from dsr_scale.base.atomic_files import require_writable_directory
    from dsr_scale.cli.placement import usable_device
    from dsr_scale.evaluate.counting import JudgeWeights
    from dsr_scale.evaluate.offline import Settings
    from dsr_scale.evaluate.offline import evaluate as compute
    from dsr_scale.telemetry.progress import work_bar

    chosen = None if metrics is None else _metrics(metrics)
    given = _Given(
        bundle=bundle,
        images=images,
        prompts_file=prompts_file,
        geneval=geneval,
        dpg=dpg,
        class_balanced=class_balanced,
        data=data,
        samples=samples,
        reference=reference,
        held_out=held_out,
        held_out_samples=held_out_samples,
        steps=steps,
        guidance=guidance,
    )
    _require_consistent(given)
    subject = _subject(given)
    settings = Settings(
        sampling=_sampling(subject.description, given),
        seed=seed,
        batch=batch,
        device=usable_device(device),
        weights=JudgeWeights(inception_weights, clip, detector, vqa),
    )
    require_writable_directory(out)
    console = Console(stderr=True, highlight=False)
    with work_bar(console) as bar:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(name, total=total)
            return lambda count: bar.advance(task, count)

        report = compute(subject, chosen, settings, begin)
    path = report.write(out)
    _show(report, Console())
    console.print(f"numbers, settings and versions → {path}", markup=False)
    _require_numbers(report, path)


@dataclass(frozen=True)
class _Given:
    """The options that say which images, and against what."""

    bundle: Path | None
    images: str | None
    prompts_file: Path | None
    geneval: Path | None
    dpg: Path | None
    class_balanced: int | None
    data: str | None
    samples: int | None
    reference: str | None
    held_out: str | None
    held_out_samples: int | None
    steps: int | None
    guidance: float | None

    def named(self, *names: str) -> list[str]:
        """Those of the options that were given, as they are written."""
        return ["--" + name.replace("_", "-") for name in names if getattr(self, name) is not None]


def _metrics(text: str) -> list[Metric]:
    from dsr_scale.base.errors import InputError
    from dsr_scale.evaluate.metrics import Metric

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in list(Metric)]
    if unknown:
        raise InputError(
            found=f"--metrics {text}, of which {', '.join(unknown)} is unknown",
            required="some of " + ", ".join(Metric),
            remedy="correct the names; separate them by commas",
        )
    return [Metric(name) for name in names]


def _require_consistent(given: _Given) -> None:
    """Raises InputError for options that contradict each other, have no effect, or lack the bundle."""
    from dsr_scale.base.errors import InputError

    prompts = given.named("prompts_file", "geneval", "dpg")
    drawn = given.named("class_balanced", "data")
    images = given.named("images")
    sources = prompts + drawn + images
    if len(prompts + drawn) > 1 or (images and drawn):
        raise InputError(
            found=" and ".join(sources),
            required="one set of images: --prompts-file, --geneval, --dpg, --class-balanced N, --data "
            "or --images; of --images, the prompts may be said",
            remedy="leave one of them out",
        )
    if given.bundle is None and (not images or given.held_out is not None):
        raise InputError(
            found="no bundle",
            required="a directory written by dsr-scale export, unless --images are evaluated",
            remedy="name the bundle first: dsr-scale evaluate BUNDLE …",
        )
    counted = not images and (given.prompts_file is not None or given.data is not None)
    without_effect = [
        *([] if counted else given.named("samples")),
        *([] if sources and not images else given.named("steps", "guidance")),
        *([] if given.held_out is not None else given.named("held_out_samples")),
    ]
    if without_effect:
        raise InputError(
            found=f"{' and '.join(without_effect)} with {' and '.join(sources) or 'nothing to draw'}",
            required="--samples with --prompts-file or --data, --steps and --guidance where images are "
            "drawn, --held-out-samples with --held-out",
            remedy="leave it out, or give the option that it goes with",
        )


def _subject(given: _Given) -> Subject:
    """Opens all that is named. Raises InputError for what is not there or does not fit."""
    from dsr_scale.evaluate.heldout_loss import HeldOutSet
    from dsr_scale.evaluate.offline import Subject
    from dsr_scale.evaluate.reference_set import (
        data_at,
        image_side,
        open_existing,
        open_reference,
    )
    from dsr_scale.export.bundle import read_description

    description = None if given.bundle is None else read_description(given.bundle)
    if description is not None:
        resolution = description.resolution
    else:
        assert given.images is not None
        resolution = image_side(given.images)
    existing = None if given.images is None else open_existing(given.images, resolution)
    benchmarks = _benchmarks(given.geneval, given.dpg)
    held_out = None
    if given.held_out is not None:
        assert description is not None
        source = data_at(given.held_out, resolution)
        held_out = HeldOutSet(source, description.shape, given.held_out_samples)
    return Subject(
        bundle=given.bundle,
        description=description,
        resolution=resolution,
        samples=_sample_set(given, description, benchmarks, existing),
        images=existing,
        reference=None if given.reference is None else open_reference(given.reference, resolution),
        benchmarks=benchmarks,
        held_out=held_out,
    )


def _benchmarks(geneval: Path | None, dpg: Path | None) -> Benchmarks:
    from dsr_scale.evaluate.dpg import open_dpg
    from dsr_scale.evaluate.geneval import open_geneval
    from dsr_scale.evaluate.metrics import Benchmarks

    return Benchmarks(
        None if geneval is None else open_geneval(geneval), None if dpg is None else open_dpg(dpg)
    )


def _sample_set(
    given: _Given,
    description: BundleDescription | None,
    benchmarks: Benchmarks,
    existing: ReferenceImages | None,
) -> SampleSet | None:
    from dsr_scale.evaluate import sample_sets
    from dsr_scale.evaluate.reference_set import data_at

    if given.prompts_file is not None and existing is not None:
        return sample_sets.prompts_of_images(given.prompts_file, existing.count)
    if given.prompts_file is not None:
        return sample_sets.prompts_in_turn(given.prompts_file, given.samples)
    for benchmark in benchmarks:
        if benchmark is not None:
            return benchmark.sample_set(None if existing is None else existing.count)
    if description is None:
        return None
    if given.class_balanced is not None:
        return sample_sets.class_balanced(description.shape, given.class_balanced)
    if given.data is not None:
        source = data_at(given.data, description.resolution)
        return sample_sets.captions_of(source, description.shape, given.samples)
    return None


def _sampling(description: BundleDescription | None, given: _Given) -> SamplingConfig | None:
    if description is None:
        return None
    options = {"steps": given.steps, "guidance": given.guidance}
    chosen = {name: value for name, value in options.items() if value is not None}
    return description.sampling.model_copy(update=chosen)


def _show(report: Report, console: Console) -> None:
    """The numbers as a table, and below it the metrics without one, by what they lack."""
    from rich.table import Table
    from rich.text import Text

    from dsr_scale.evaluate.report import by_reason

    table = Table("metric", "value")
    for name, value in report.values.items():
        table.add_row(name, f"{value:.6g}")
    console.print(table)
    for title, reasons in (("not computed", report.not_computed), ("no number", report.failed)):
        for names, reason in by_reason(reasons).items():
            line = Text.assemble((f"{names} {title}: ", "yellow"), reason)
            console.print(line, soft_wrap=True)  # whole addresses, to be copied
    if unusable := report.settings.get("reference", {}).get("unusable"):
        console.print(Text.assemble(("reference: ", "yellow"), unusable), soft_wrap=True)


def _require_numbers(report: Report, path: Path) -> None:
    from dsr_scale.base.errors import InputError

    if report.failed:
        raise InputError(
            found=f"no number of {', '.join(report.failed)}, as said above",
            required="a number of every metric that is computed",
            remedy=f"correct what is named; the other metrics are in {path}",
        )
