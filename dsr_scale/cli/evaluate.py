"""`dsr-scale evaluate`: a bundle, or images that exist, → metrics as a table and a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from dsr_scale.config.diffusion import SamplingConfig
    from dsr_scale.evaluate.heldout_loss import HeldOutSet
    from dsr_scale.evaluate.metrics import Benchmarks, Metric
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
    from dsr_scale.evaluate.offline import Settings, Subject
    from dsr_scale.evaluate.offline import evaluate as compute
    from dsr_scale.evaluate.reference_set import image_side, open_existing, open_reference
    from dsr_scale.export.bundle import read_description
    from dsr_scale.telemetry.progress import work_bar

    chosen = None if metrics is None else _metrics(metrics)
    _require_one_source(
        bundle, prompts_file, geneval, dpg, class_balanced, data, samples, images, held_out
    )
    description = None if bundle is None else read_description(bundle)
    if description is not None:
        resolution = description.resolution
    else:
        assert images is not None
        resolution = image_side(images)
    existing = None if images is None else open_existing(images, resolution)
    benchmarks = _benchmarks(geneval, dpg)
    subject = Subject(
        bundle=bundle,
        description=description,
        samples=_sample_set(
            description,
            prompts_file,
            benchmarks,
            class_balanced,
            data,
            samples,
            existing,
        ),
        images=existing,
        reference=None if reference is None else open_reference(reference, resolution),
        benchmarks=benchmarks,
        held_out=_held_out(held_out, description, held_out_samples),
    )
    settings = Settings(
        sampling=_sampling(description, steps, guidance),
        seed=seed,
        batch=batch,
        device=usable_device(device),
        inception_weights=inception_weights,
        clip_model=clip,
        detector=detector,
        vqa_model=vqa,
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


def _require_one_source(
    bundle: Path | None,
    prompts_file: Path | None,
    geneval: Path | None,
    dpg: Path | None,
    class_balanced: int | None,
    data: str | None,
    samples: int | None,
    images: str | None,
    held_out: str | None,
) -> None:
    """Raises InputError for options that contradict each other, or that lack the bundle they need."""
    from dsr_scale.base.errors import InputError

    prompts = {"--prompts-file": prompts_file, "--geneval": geneval, "--dpg": dpg}
    drawn = {"--class-balanced": class_balanced, "--data": data, "--images": images}
    of_prompts = [option for option, value in prompts.items() if value is not None]
    others = [option for option, value in drawn.items() if value is not None]
    sources = len(of_prompts) + len(others) - (images is not None and len(of_prompts) > 0)
    counted = images or class_balanced or geneval or dpg
    if sources > 1 or (samples is not None and counted):
        found = of_prompts + others + (["--samples"] if samples is not None else [])
        raise InputError(
            found=" and ".join(found),
            required="one set of images: --prompts-file, --geneval, --dpg, --class-balanced N, --data "
            "or --images; --samples with --prompts-file or --data only",
            remedy="leave one of them out",
        )
    if bundle is None and (images is None or held_out is not None):
        raise InputError(
            found="no bundle",
            required="a directory written by dsr-scale export, unless --images are evaluated",
            remedy="name the bundle first: dsr-scale evaluate BUNDLE …",
        )


def _benchmarks(geneval: Path | None, dpg: Path | None) -> Benchmarks:
    from dsr_scale.evaluate.dpg import open_dpg
    from dsr_scale.evaluate.geneval import open_geneval
    from dsr_scale.evaluate.metrics import Benchmarks

    return Benchmarks(
        None if geneval is None else open_geneval(geneval), None if dpg is None else open_dpg(dpg)
    )


def _sample_set(
    description: BundleDescription | None,
    prompts_file: Path | None,
    benchmarks: Benchmarks,
    class_balanced: int | None,
    data: str | None,
    count: int | None,
    existing: ReferenceImages | None,
) -> SampleSet | None:
    from dsr_scale.evaluate import sample_sets
    from dsr_scale.evaluate.reference_set import data_at

    if prompts_file is not None and existing is not None:
        return sample_sets.prompts_of_images(prompts_file, existing.count)
    if prompts_file is not None:
        return sample_sets.prompts_in_turn(prompts_file, count)
    for benchmark in benchmarks:
        if benchmark is not None:
            return benchmark.sample_set(None if existing is None else existing.count)
    if description is None:
        return None
    if class_balanced is not None:
        return sample_sets.class_balanced(description.shape, class_balanced)
    if data is not None:
        source = data_at(data, description.resolution)
        return sample_sets.captions_of(source, description.shape, count)
    return None


def _held_out(
    place: str | None, description: BundleDescription | None, count: int | None
) -> HeldOutSet | None:
    from dsr_scale.evaluate.heldout_loss import HeldOutSet
    from dsr_scale.evaluate.reference_set import data_at

    if place is None or description is None:
        return None
    source = data_at(place, description.resolution)
    return HeldOutSet(source, description.shape, count)


def _sampling(
    description: BundleDescription | None, steps: int | None, guidance: float | None
) -> SamplingConfig | None:
    if description is None:
        return None
    given = {"steps": steps, "guidance": guidance}
    chosen = {name: value for name, value in given.items() if value is not None}
    return description.sampling.model_copy(update=chosen)


def _show(report: Report, console: Console) -> None:
    """The numbers as a table, and below it the metrics without one, by what they lack."""
    from rich.table import Table
    from rich.text import Text

    table = Table("metric", "value")
    for name, value in report.values.items():
        table.add_row(name, f"{value:.6g}")
    console.print(table)
    lacking: dict[str, list[str]] = {}
    for name, reason in sorted(report.not_computed.items()):
        lacking.setdefault(reason, []).append(name)
    for reason, names in lacking.items():
        line = Text.assemble((f"{', '.join(names)} not computed: ", "yellow"), reason)
        console.print(line, soft_wrap=True)  # whole addresses, to be copied
