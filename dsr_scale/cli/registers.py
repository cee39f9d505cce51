"""`dsr-scale registers`: finds an encoder's register neurons and writes what runs need of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dsr_scale.config.encoders import VitImage
    from dsr_scale.config.run import AnyRun
    from dsr_scale.data.plain_images import PlainImages
    from dsr_scale.encoders.patch_norms import LayerNorms
    from dsr_scale.encoders.register_search import SearchResult, SearchSettings
    from dsr_scale.encoders.vit import VitEncoder

PICTURED_IMAGES = 3
PICTURED_BLOCKS = 5


def registers(
    config: Annotated[Path, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. data.shards=DIR")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Register file to write (JSON).")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images instead of data.shards.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images, spread evenly over the set.")] = 500,
    top_k: Annotated[int, typer.Option(min=1, help="Neurons that a pass adds.")] = 50,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, help="Norm of an outlier; default: mean + 3 standard deviations."),
    ] = None,
    detect_layer: Annotated[
        int, typer.Option(help="Block whose output tells outliers; -1 is the last.")
    ] = -1,
    highest_layer: Annotated[
        int | None,
        typer.Option(help="Last block searched; default: where outliers appear, of every pass."),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="At most.")] = 3,
    max_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Outlier ratio that ends the search.")
    ] = 1e-3,
    sparse: Annotated[
        bool, typer.Option(help="Only neurons that are quiet on half of the patches.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto is cuda where there is one.")
    ] = "auto",
) -> None:
    """Find register neurons pass by pass, until the encoder's patches are clean.

    Beside FILE it writes norm maps (.png) and the attention bias (.attention_bias.safetensors).
    """
    from rich.console import Console

    from dsr_scale.base.atomic_files import require_writable_directory
    from dsr_scale.cli.placement import usable_device
    from dsr_scale.config.encoders import NoTreatment
    from dsr_scale.config.load import load_any_run
    from dsr_scale.data.plain_images import plain_images
    from dsr_scale.encoders.register_search import SearchSettings
    from dsr_scale.encoders.vit import VitEncoder

    run = load_any_run(config, overrides or [])
    image = _searchable_encoder(run)
    _require_file(out)
    require_writable_directory(out.parent)
    chosen = plain_images(run.data, folder=images, count=count)
    settings = SearchSettings(
        top_k=top_k,
        threshold=threshold,
        detect_layer=detect_layer,
        highest_layer=highest_layer,
        passes=passes,
        max_outlier_ratio=max_ratio,
        sparse=sparse,
        **_register_options(image),
    )
    console = Console(stderr=True, highlight=False)
    encoder = VitEncoder(
        image.model_copy(update={"outliers": NoTreatment(), "statistics": None}),
        resolution=run.data.resolution,
        device=usable_device(device),
    )
    result = _search(encoder, chosen, settings, console)
    console.print(_verdict(result), markup=False)
    if not result.neurons:
        return
    _write(out, image, encoder, chosen, result, console)
    typer.echo(_config_line(out, image))


def _searchable_encoder(run: AnyRun) -> VitImage:
    from dsr_scale.base.errors import InputError
    from dsr_scale.config.encoders import VitImage

    if not isinstance(run.encoders.image, VitImage):
        raise InputError(
            found=f"encoders.image.kind = {run.encoders.image.kind}",
            required="a vision transformer: kind vit",
            remedy="choose another encoder; this kind has no outlier tokens to treat",
        )
    return run.encoders.image


def _require_file(out: Path) -> None:
    from dsr_scale.base.errors import InputError

    if out.is_dir() or out.suffix in (".png", ".safetensors"):
        raise InputError(
            found=f"--out {out}",
            required="a JSON file to write",
            remedy="write for example registers.json",
        )


def _register_options(image: VitImage) -> dict[str, Any]:
    """How the run applies registers, if it does: the search then applies them the same way."""
    from dsr_scale.config.encoders import TestTimeRegisters

    if not isinstance(image.outliers, TestTimeRegisters):
        return {}
    return image.outliers.model_dump(include={"maximum", "keep_first_patch"})


def _search(
    encoder: VitEncoder, images: PlainImages, settings: SearchSettings, console: Console
) -> SearchResult:
    """The search with a bar for each reading of the images and a table of norms after it."""
    from dsr_scale.encoders.register_search import find_register_neurons
    from dsr_scale.telemetry.progress import work_bar

    trained = encoder.special_tokens - encoder.family.has_cls
    if trained:
        console.print(
            f"{encoder.config.known_as} has {trained} trained registers: expect few outliers",
            style="yellow",
        )
    with work_bar(console) as bar:
        tasks: dict[str, Any] = {}

        def on_images(stage: str, done: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=len(images))
            bar.advance(tasks[stage], done)

        def on_norms(stage: str, norms: tuple[LayerNorms, ...]) -> None:
            console.print(_norm_table(stage, norms, settings))

        result = find_register_neurons(
            encoder,
            lambda: images.batches(encoder.config.chunk_images),
            settings,
            on_images=on_images,
            on_norms=on_norms,
        )
    if images.unusable_report:
        console.print(images.unusable_report, style="yellow", markup=False)
    return result


def _norm_table(stage: str, norms: tuple[LayerNorms, ...], settings: SearchSettings) -> Any:
    """The blocks that matter: where outliers appear, where they are most, detection, the last."""
    from rich.table import Table

    from dsr_scale.encoders.register_search import first_outlier_layer

    bound = settings.max_outlier_ratio
    detect = settings.detect_layer % len(norms)
    worst = max(norms, key=lambda block: block.outlier_ratio)
    named: dict[int, list[str]] = {}
    if norms[detect].outlier_ratio >= bound:
        named.setdefault(first_outlier_layer(norms, detect, bound), []).append("outliers appear")
    if worst.outlier_ratio > 0:
        named.setdefault(worst.layer, []).append("most outliers")
    named.setdefault(detect, []).append("detection")
    named.setdefault(len(norms) - 1, []).append("last")
    table = Table("block", "", "outlier ratio", "max / median", "register / median", title=stage)
    for layer, names in sorted(named.items()):
        block = norms[layer]
        register = block.register_over_median
        table.add_row(
            str(layer),
            ", ".join(names),
            f"{block.outlier_ratio:.2e}",
            f"{block.max_over_median:.2f}",
            "–" if register is None else f"{register:.2f}",
        )
    return table


def _verdict(result: SearchResult) -> str:
    """How the search ended, and what to change if outliers are left."""
    from dsr_scale.base.errors import InputError

    settings = result.settings
    detection = result.after[settings.detect_layer]
    ratio = f"outlier ratio {detection.outlier_ratio:.2e} at block {detection.layer}"
    if result.stop == "nothing to rank" and not result.passes:
        raise InputError(
            found=f"{ratio}, but no patch and neuron to rank with the options given",
            required="patches over the threshold, and neurons that are active on them",
            remedy="lower --threshold, raise --highest-layer, or leave --sparse out",
        )
    if result.stop != "clean":
        return f"{ratio} is not under {settings.max_outlier_ratio:g} ({result.stop}): try more --passes or a larger --top-k"
    worst = max(result.after, key=lambda block: block.outlier_ratio)
    hint = ""
    if worst.outlier_ratio >= settings.max_outlier_ratio:
        hint = (
            f"; block {worst.layer} still has {worst.outlier_ratio:.2e}, which --detect-layer "
            f"{worst.layer} would search for"
        )
    if not result.passes:
        return f"{ratio}: this encoder needs no registers, nothing was written{hint}"
    neurons = sum(map(len, result.neurons.values()))
    return f"{ratio} after {len(result.passes)} passes, {neurons} neurons{hint}"


def _write(
    out: Path,
    image: VitImage,
    encoder: VitEncoder,
    images: PlainImages,
    result: SearchResult,
    console: Console,
) -> None:
    """Register file, attention bias and norm maps."""
    import dsr_scale
    from dsr_scale.encoders.attention_bias import save_attention_bias
    from dsr_scale.encoders.outliers import record_attention_bias
    from dsr_scale.encoders.register_file import RegisterFile, encoder_identity, save_register_file

    calibration = {
        "count": len(images) - len(images.unusable),
        "fingerprint": images.fingerprint,
        "resolution": encoder.resolution,
    }
    file = RegisterFile(
        *encoder_identity(image),
        neurons=result.neurons,
        source=f"dsr-scale registers {dsr_scale.__version__}",
        search={"images": calibration, **result.description()},
    )
    with console.status("attention bias and norm maps"):
        batches = images.batches(image.chunk_images)
        key, value = record_attention_bias(encoder, result.treatment, batches)
        bias = out.with_suffix(".attention_bias.safetensors")
        maps = out.with_suffix(".png")
        _draw(maps, encoder, images, result)
    save_attention_bias(bias, key, value, file)
    save_register_file(out, file)
    for path in (out, bias, maps):
        console.print(f"→ {path}", markup=False, soft_wrap=True)


def _draw(path: Path, encoder: VitEncoder, images: PlainImages, result: SearchResult) -> None:
    """Maps of the images with the largest outliers among the first ones."""
    import torch

    from dsr_scale.encoders.outliers import treated
    from dsr_scale.encoders.patch_norms import token_norms
    from dsr_scale.telemetry.norm_pictures import norm_map_picture

    batch = next(images.batches(encoder.config.chunk_images))
    side = encoder.geometry.input_size // encoder.geometry.patch
    maps = []
    for treatment in (None, result.treatment):
        with treated(encoder, treatment):
            patches = token_norms(encoder, batch)[..., encoder.patch_rows]
            maps.append(patches.unflatten(-1, (side, side)).cpu())
    before, after = maps
    detection = before[result.settings.detect_layer].flatten(1)
    extreme = detection.amax(dim=1) / detection.median(dim=1).values
    chosen = extreme.argsort(descending=True)[:PICTURED_IMAGES]
    spread = torch.linspace(0, len(before) - 1, PICTURED_BLOCKS).round().int().tolist()
    blocks = sorted({*spread, *(done.highest_layer for done in result.passes)})
    norm_map_picture(
        batch[chosen],
        before[blocks][:, chosen],
        after[blocks][:, chosen],
        [f"block {block}" for block in blocks],
        f"L2 norms of patches of {encoder.config.known_as} before and after test-time registers, "
        "one scale per block",
        path,
    )


def _config_line(out: Path, image: VitImage) -> str:
    options = "".join(f", {name}: {value}" for name, value in _register_options(image).items())
    return f"encoders.image.outliers={{kind: registers, neurons: {out}{options.lower()}}}"
