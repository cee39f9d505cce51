"""One GPU: images/s of SigLIP2 in bf16, eager and compiled, with and without test-time registers.

Random weights of the published geometries, with the published register neurons. The limit is what the
encoder's matrix products would take at the rate of a large product, measured in the same rounds; copies,
norms and the softmax are not in it. Images and latents stay on the GPU. Compiled is torch.compile
on the encoder's network; the product does not do that. Without a GPU this refuses, unless it is
tried out at a tiny size, where no number means anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoder_costs import image_flops
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.register_file import RegisterFile, save_register_file
from dsr_scale.encoders.vit import VitEncoder
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Sample,
    Samples,
    Settings,
    Variant,
    compare,
    interleave,
    timed,
)
from tools.bench.random_vits import Geometry, encoding_run, save_vit, vit_settings
from tools.bench.ranks import in_own_process

LIMIT_AIM, REGISTERS_AIM = Aim(low=0.6), Aim(high=1.03)
FLOPS, IMAGES = "flops_per_s", "images_per_s"


class Case(NamedTuple):
    """An encoder and how much of it a visit encodes."""

    vit: Geometry
    neurons: str
    """Register file, as `encoders.image.outliers.neurons`."""
    images: int
    """A multiple of every size of chunk."""
    chunks: tuple[int, ...] = (64, 256)
    product_side: int = 8192
    """Of the square matrices that the limit is measured with."""

    @property
    def label(self) -> str:
        """For people, and for a directory."""
        return self.vit.name.rpartition("/")[2]


CASES = (
    Case(
        Geometry("google/siglip2-base-patch16-256", 768, 12, 12, 3072, 16, 256),
        "package:siglip2_base_patch16_256",
        images=1024,
    ),
    Case(
        Geometry("google/siglip2-so400m-patch14-224", 1152, 27, 16, 4304, 14, 224),
        "package:siglip2_so400m_patch14_224",
        images=256,
    ),
)


def run(settings: Settings) -> Report:
    """Each encoder in a process of its own; the GPU is emptied in between."""
    if not settings.tiny and not torch.cuda.is_available():
        raise InputError(
            found="no CUDA device",
            required="one GPU with about 20 GiB free",
            remedy="run gpu_encoders where there is one; the other benchmarks need none",
        )
    samples: Samples = {}
    facts: dict[str, object] = {}
    comparisons: list[Comparison] = []
    for case in [_tiny_case(settings.scratch)] if settings.tiny else CASES:
        measured, found = in_own_process(measure, case, settings)
        samples |= measured
        facts |= found
        comparisons += _comparisons(case)
    return Report(compare(samples, comparisons), samples, facts)


def _tiny_case(scratch: Path) -> Case:
    vit = Geometry("tiny", 32, 2, 2, 64, 8, 32)
    path = scratch / "registers.json"
    save_register_file(path, RegisterFile(vit.name, None, vit.side, {0: (5, 40)}, "made up"))
    return Case(vit, str(path), images=4, chunks=(2, 4), product_side=64)


def _comparisons(case: Case) -> Iterator[Comparison]:
    limit = _limit(case)
    for chunk, compiled in product(case.chunks, (False, True)):
        names = [_name(case, chunk, compiled=compiled, registers=each) for each in (False, True)]
        for name in names:
            yield Comparison(f"{name}: of the limit", FLOPS, name, limit, _twins(limit), LIMIT_AIM)
        plain, treated = names
        pair = treated, plain, _twins(plain)
        yield Comparison(f"{treated}: over none", "wall_s", *pair, REGISTERS_AIM)
    for chunk, registers in product(case.chunks, (False, True)):
        names = [_name(case, chunk, compiled=each, registers=registers) for each in (False, True)]
        eager, compiled = names
        twins = _twins(_name(case, chunk, compiled=False, registers=False))
        yield Comparison(f"{compiled}: over eager", IMAGES, compiled, eager, twins)


def _twins(name: str) -> tuple[str, str]:
    return f"{name} again", name


def _limit(case: Case) -> str:
    """Name of the variant that measures what is possible."""
    return f"{case.label}: one large product"


def _name(case: Case, chunk: int, *, compiled: bool, registers: bool) -> str:
    """Of a variant, unique among all cases."""
    parts = [f"{case.label}, chunks of {chunk}", "compiled" if compiled else "eager"]
    return ", ".join([*parts, "registers"] if registers else parts)


def measure(case: Case, settings: Settings) -> tuple[Samples, dict[str, object]]:
    """Samples of one encoder, and its FLOPs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Otherwise code compiled for the network with registers is used for the one without.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if settings.tiny:
        # A compiler takes longer than all the rest of a dry run.
        torch.compiler.set_stance("force_eager")
    directory = settings.scratch / case.label
    save_vit(directory, case.vit, torch.bfloat16)
    side = case.vit.side
    run = encoding_run(settings.scratch, vit_settings(directory, case.vit), side)
    flops = image_flops(run).count
    assert flops
    images = torch.randint(0, 256, (case.images, 3, side, side), dtype=torch.uint8, device=device)
    multiply = _product(case.product_side, device)
    variants: dict[str, Variant] = dict.fromkeys(_twins(_limit(case)), multiply)
    facts: dict[str, object] = {f"{case.label}: GFLOP per image": f"{flops / 1e9:.3g}"}
    for chunk, compiled, registers in product(case.chunks, (False, True), (False, True)):
        encoder = _encoder(case, directory, chunk, registers=registers, device=device)
        name = _name(case, chunk, compiled=compiled, registers=registers)
        if compiled:
            eager = encoder.encode(images[:chunk])
            encoder.model.compile(dynamic=False)
            difference = (encoder.encode(images[:chunk]) - eager).norm() / eager.norm()
            facts[f"{name}: differs from eager by"] = f"{difference.item():.1e}"
        names = (name,) if registers else _twins(name)
        variants |= dict.fromkeys(names, partial(_visit, encoder, images, flops))
    samples = interleave(variants, settings.rounds, warmup=1 if settings.tiny else 3)
    for name, found in samples.items():
        if IMAGES in found[0]:
            rate = statistics.median(sample[IMAGES] for sample in found)
            facts[f"{name}: images/s"] = round(rate)
    return samples, facts


def _encoder(
    case: Case, directory: Path, chunk: int, *, registers: bool, device: torch.device
) -> VitEncoder:
    outliers: dict[str, Any] = {"kind": "none"}
    if registers:
        outliers = {"kind": "registers", "neurons": case.neurons}
    image = vit_settings(directory, case.vit, dtype="bf16", chunk_images=chunk, outliers=outliers)
    config = encoding_run(directory, image, case.vit.side).encoders.image
    encoder = build_image_encoder(config, resolution=case.vit.side, device=device)
    assert isinstance(encoder, VitEncoder)
    return encoder


def _visit(encoder: VitEncoder, images: torch.Tensor, flops: int) -> Sample:
    sample = _timed_on(images.device, lambda: encoder.encode(images))
    rate = len(images) / sample["wall_s"]
    return {**sample, IMAGES: rate, FLOPS: rate * flops}


def _product(side: int, device: torch.device, times: int = 10) -> Variant:
    """A product of bf16 matrices, several times."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    target = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right, out=target)

    def visit() -> Sample:
        sample = _timed_on(device, multiply)
        return {**sample, FLOPS: 2 * side**3 * times / sample["wall_s"]}

    return visit


def _timed_on(device: torch.device, action: Any) -> Sample:
    return timed(action, torch.cuda.synchronize if device.type == "cuda" else None)
