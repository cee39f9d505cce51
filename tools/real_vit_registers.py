"""Runs a pretrained vision transformer through register search, cleaning and norm maps.

    python tools/real_vit_registers.py CHECKPOINT --images FOLDER --out DIR

CHECKPOINT is a directory as `save_pretrained` writes it, of a family that `kind: vit` reads. Three
things are measured, on the images of FOLDER, scaled and cropped to `--size` pixels:

1. **as it is**: outliers by block, and what the search makes of them;
2. **asked for anyway**: the search is made to go on although it finds the encoder clean, which
   tells what test-time registers cost an encoder that does not need them;
3. **planted**: two MLP units, at a third and at two thirds of the depth, that fire on few patches
   are made to fire so strongly that these become outliers. Nothing else of the network is touched.
   Now it is known what the search has to find and what the patches were before.

Writes `figures.md` and `maps.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.base.token_outliers import outliers
from dsr_scale.config.data import DataConfig
from dsr_scale.config.encoders import VitImage
from dsr_scale.data.plain_images import PlainImages, plain_images
from dsr_scale.encoders.outliers import (
    RegisterTreatment,
    Treatment,
    ZeroingTreatment,
    treated,
)
from dsr_scale.encoders.patch_norms import LayerNorms, measure_norms, removed, token_norms
from dsr_scale.encoders.register_search import SearchResult, SearchSettings, find_register_neurons
from dsr_scale.encoders.vit import VitEncoder
from dsr_scale.telemetry.norm_pictures import norm_map_picture
from dsr_scale.telemetry.progress import work_bar

BATCH_IMAGES = 8
PROBE_BATCHES = 2
PLANTED_RATIO = 5e-3
"""Outlier ratio at the detection block that planting one unit aims at."""
FACTORS = tuple(2**power for power in range(4, 12))
"""Tried in this order."""
FORCED_NEURONS = 10
PICTURED_IMAGES = 3


class Planted(NamedTuple):
    """An MLP unit whose positive activations are scaled up, and whose negative ones are silenced."""

    layer: int
    unit: int
    factor: int


class Change(NamedTuple):
    """How far latents are from those of the untouched network: cosine by patch."""

    of_outliers: float
    """Mean over the patches that planting made outliers; nan if there are none."""
    of_others: float
    """Mean over all other patches."""
    smallest_of_others: float


class Study:
    """One encoder and one set of images."""

    def __init__(self, encoder: VitEncoder, images: PlainImages, detect_layer: int) -> None:
        self.encoder = encoder
        self.images = images
        self.detect_layer = detect_layer % len(encoder.structure.blocks)

    def batches(self) -> Iterator[Tensor]:
        """The images anew."""
        return self.images.batches(BATCH_IMAGES)

    def probes(self) -> Iterator[Tensor]:
        """The first of them, for choosing what to plant and to draw."""
        return itertools.islice(self.batches(), PROBE_BATCHES)

    def search(self, name: str, **settings: object) -> SearchResult:
        """A register search with these settings, detecting at this study's block."""
        chosen = SearchSettings(detect_layer=self.detect_layer, **settings)  # type: ignore[arg-type]
        with work_bar(Console(stderr=True)) as bar:
            task = bar.add_task(name, total=None)
            return find_register_neurons(
                self.encoder,
                self.batches,
                chosen,
                on_images=lambda _stage, images: bar.advance(task, images),
            )

    def latents(self, treatment: Treatment | None) -> Tensor:
        """[N,C,h,w] of all images."""
        with treated(self.encoder, treatment):
            return torch.cat([self.encoder.encode(batch) for batch in self.batches()])

    def outlier_patches(self) -> Tensor:
        """bool [N,h·w]: which patches are outliers at the detection block, without treatment."""
        found = []
        for batch in self.batches():
            norms = token_norms(self.encoder, batch)[self.detect_layer]
            found.append(outliers(norms[:, self.encoder.patch_rows]))
        return torch.cat(found)

    def plant(self, layer: int) -> Planted:
        """Which unit of this MLP to plant, and the factor that makes its patches outliers.

        The unit fires on few patches: its 99.5th percentile over its 90th is the highest of all.
        Raises InputError when even that one fires on too many patches to make outliers of them.
        """
        linear = self.encoder.structure.mlp_outputs[layer]
        rows = self.encoder.patch_rows
        seen: list[Tensor] = []
        hook = linear.register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0][:, rows].clamp(min=0).flatten(0, 1))
        )
        with removed([hook]):
            for batch in self.probes():
                self.encoder.tokens(batch)
        sizes = torch.cat(seen)
        strong, usual = (
            sizes.kthvalue(round(share * len(sizes)), dim=0).values for share in (0.995, 0.9)
        )
        # Between tiny activations ratios are large as well, and mean nothing.
        unit = int((strong / usual.clamp(min=0.02)).argmax())
        for factor in FACTORS:
            planted = Planted(layer, unit, factor)
            with self.with_planted([planted]):
                norms = measure_norms(self.encoder, self.probes())[self.detect_layer]
            if norms.outlier_ratio >= PLANTED_RATIO:
                return planted
        raise InputError(
            found=f"unit {unit} of block {layer}, which makes no outliers at block "
            f"{self.detect_layer} even {FACTORS[-1]} times as strong",
            required="a unit that fires on few patches",
            remedy="try an earlier --detect-layer, or other images",
        )

    @contextlib.contextmanager
    def with_planted(self, units: Sequence[Planted]) -> Iterator[None]:
        """Inside, these units fire `factor` times as strongly; treatments set inside act on that."""
        linears = self.encoder.structure.mlp_outputs

        def strengthen(unit: int, factor: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                inputs[0][..., unit].clamp_(min=0).mul_(factor)

            return hook

        hooks = [
            linears[layer].register_forward_pre_hook(strengthen(unit, factor))
            for layer, unit, factor in units
        ]
        with removed(hooks):
            yield

    def norm_maps(self, images: Tensor, treatment: Treatment | None) -> Tensor:
        """Patch norms [layers,N,h,w]."""
        side = self.encoder.geometry.input_size // self.encoder.geometry.patch
        with treated(self.encoder, treatment):
            norms = token_norms(self.encoder, images)[..., self.encoder.patch_rows]
        return norms.unflatten(-1, (side, side))


def change(latents: Tensor, reference: Tensor, extreme: Tensor | None = None) -> Change:
    """Compares latents [N,C,h,w] patch by patch; `extreme` bool [N,h·w] are reported apart."""
    cosine = functional.cosine_similarity(latents, reference, dim=1).flatten(1)
    if extreme is None:
        extreme = torch.zeros_like(cosine, dtype=torch.bool)
    others = cosine[~extreme]
    return Change(float(cosine[extreme].mean()), float(others.mean()), float(others.min()))


def natural_section(study: Study) -> list[str]:
    """The encoder as it is, and what the search says."""
    found = study.search("as it is")
    lines = [
        "## As it is",
        "",
        "| block | outlier ratio | largest / median norm |",
        "|---|---|---|",
    ]
    lines += [
        f"| {norms.layer}{' (detection)' if norms.layer == study.detect_layer else ''} "
        f"| {norms.outlier_ratio:.1e} | {norms.max_over_median:.2f} |"
        for norms in found.before
    ]
    return [*lines, "", f"Search: {found.stop}, {len(found.passes)} passes."]


def forced_section(study: Study, untouched: Tensor) -> list[str]:
    """Registers for an encoder that the search calls clean."""
    found = study.search("asked for anyway", top_k=FORCED_NEURONS, passes=1, max_outlier_ratio=0.0)
    if not found.passes:
        return ["## Asked for anyway", "", f"Search: {found.stop}."]
    difference = change(study.latents(found.treatment), untouched)
    before, after = (norms[study.detect_layer] for norms in (found.before, found.after))
    return [
        "## Asked for anyway",
        "",
        f"{FORCED_NEURONS} neurons: {_named(found)}. At block {study.detect_layer}: largest / median "
        f"norm {before.max_over_median:.2f} → {after.max_over_median:.2f}, register / median "
        f"{after.register_over_median:.2f}. Cosine of latents with the untreated ones: mean "
        f"{difference.of_others:.4f}, smallest {difference.smallest_of_others:.4f}.",
    ]


def planted_section(
    study: Study, planted: Sequence[Planted], untouched: Tensor
) -> tuple[list[str], SearchResult]:
    """The network with planted units: what the search finds, and what cleaning gives back."""
    found = study.search("planted", top_k=1, passes=len(planted) + 1)
    stages = [("planted", found.before)]
    stages += [(f"pass {number}", done.after) for number, done in enumerate(found.passes, 1)]
    lines = ["## Planted", ""]
    lines += [f"- unit {unit} of block {layer}, ×{factor}" for layer, unit, factor in planted]
    lines += ["", f"Search: {found.stop}; found {_named(found)}.", ""]
    lines += [
        "| | outlier ratio | largest / median norm | register / median |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {_cells(norms[study.detect_layer])} |" for name, norms in stages]
    extreme = study.outlier_patches()
    lines += [
        "",
        "Cosine of latents with those before planting:",
        "",
        "| treatment | outlier patches | other patches | smallest of those |",
        "|---|---|---|---|",
    ]
    for name, treatment in (
        ("none", None),
        ("registers", found.treatment),
        ("zeroing", ZeroingTreatment(found.neurons)),
    ):
        cosines = change(study.latents(treatment), untouched, extreme)
        lines.append(f"| {name} | " + " | ".join(f"{cosine:.4f}" for cosine in cosines) + " |")
    return lines, found


def draw(study: Study, treatment: RegisterTreatment, path: Path, title: str) -> None:
    """Maps of the images with the largest norms at the detection block, among the first batches."""
    batch = torch.cat(list(study.probes()))
    before, after = (study.norm_maps(batch, chosen) for chosen in (None, treatment))
    detection = before[study.detect_layer].flatten(1)
    extreme = detection.amax(dim=1) / detection.median(dim=1).values
    chosen = extreme.argsort(descending=True)[:PICTURED_IMAGES]
    blocks = torch.linspace(0, len(before) - 1, 5).round().int().tolist()
    blocks = sorted({*blocks, study.detect_layer})
    norm_map_picture(
        batch[chosen],
        before[blocks][:, chosen],
        after[blocks][:, chosen],
        [f"block {block}" for block in blocks],
        title,
        path,
    )


def _named(found: SearchResult) -> str:
    neurons = [neuron for done in found.passes for neuron in done.neurons]
    return ", ".join(f"block {layer} unit {unit}" for layer, unit, _ in neurons) or "none"


def _cells(norms: LayerNorms) -> str:
    register = norms.register_over_median
    last = "–" if register is None else f"{register:.2f}"
    return f"{norms.outlier_ratio:.1e} | {norms.max_over_median:.2f} | {last}"


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description="Register search on a pretrained ViT")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=None, help="images; default: all")
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of the patch")
    parser.add_argument("--detect-layer", type=int, default=-2)
    options = parser.parse_args()
    config = json.loads((options.checkpoint / "config.json").read_text())
    config = config.get("vision_config", config)
    image = VitImage(
        model=str(options.checkpoint),
        channels=config["hidden_size"],
        patch=config["patch_size"],
        input_size=options.size,
        chunk_images=BATCH_IMAGES,
    )
    encoder = VitEncoder(image, resolution=options.size, device=torch.device("cpu"))
    data = DataConfig(shards=str(options.images), resolution=options.size)
    images = plain_images(data, folder=options.images, count=options.count)
    study = Study(encoder, images, options.detect_layer)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = natural_section(study)
    untouched = study.latents(None)
    lines += ["", *forced_section(study, untouched), ""]
    depth = len(encoder.structure.blocks)
    planted = [study.plant(layer) for layer in (depth // 3, 2 * depth // 3)]
    with study.with_planted(planted):
        section, found = planted_section(study, planted, untouched)
        title = (
            "Patch norms with two planted register neurons, before and after test-time registers"
        )
        draw(study, found.treatment, options.out / "maps.png", title)
    report = "\n".join([*lines, *section]) + "\n"
    (options.out / "figures.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
