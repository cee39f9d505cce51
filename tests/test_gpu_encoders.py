"""What must hold of frozen encoders on a CUDA device: as on the CPU, batch by batch, compiled, served.

The encoder is the planted one, whose register neurons fire far above everything else: what the
registers take over does not hang on rounding. Each comparison takes the device as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_encoders import apart, assert_same, decoded, encode, running
from planted_vit import (
    DEPTH,
    FIRST,
    SECOND,
    SIDE,
    coloured_images,
    planted_config,
    save_planted_vit,
    write_run,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsr_scale.config.load import load_run
from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.credentials import open_channel
from dsr_scale.encode_service.local import build_local
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.outliers import RegisterTreatment, treated
from dsr_scale.encoders.register_file import RegisterFile, save_register_file
from dsr_scale.encoders.vit import VitEncoder

pytestmark = pytest.mark.gpu

REGISTERS = RegisterTreatment({**FIRST, **SECOND})
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest relative distance of latents that were computed in another way."""


@pytest.fixture(autouse=True)
def _whole_fp32() -> Iterator[None]:
    """TF32 would round what is compared with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def planted(folder: Path, device: str, dtype: str, **changes: Any) -> VitEncoder:
    """The planted network of `folder` with test-time registers."""
    config = planted_config(folder, dtype=dtype, **changes)
    encoder = build_image_encoder(config, resolution=SIDE, device=device)
    assert isinstance(encoder, VitEncoder)
    encoder.treat(REGISTERS)
    return encoder


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    return ((found.cpu() - expected.cpu()).norm() / expected.cpu().norm()).item()


def latents_are_those_of_the_cpu(folder: Path, device: str, dtype: str) -> None:
    save_planted_vit(folder)
    images, _, _ = coloured_images(6)
    here, there = (planted(folder, each, dtype) for each in ("cpu", device))
    expected, latents = here.encode(images), there.encode(images)
    assert latents.device.type == device and latents.dtype == torch.float32
    assert distance(latents, expected) < TOLERANCES[dtype]
    with treated(there, None):
        untreated = there.encode(images)
    assert distance(untreated, expected) > 3 * TOLERANCES[dtype], "the registers do something"


def bits_do_not_depend_on_the_batch(folder: Path, device: str, dtype: str) -> None:
    save_planted_vit(folder)
    encoder = planted(folder, device, dtype, chunk_images=8)
    images = coloured_images(21)[0]
    together = encoder.encode(images)
    for batch in (1, 3, 8, 13):
        parts = torch.cat([encoder.encode(part) for part in images.split(batch)])
        assert torch.equal(parts, together), f"batches of {batch}"
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder.encode(images[order]), together[order.to(device)])


def registers_leave_attention_fused(folder: Path, device: str, dtype: str) -> None:
    save_planted_vit(folder)
    encoder, images = planted(folder, device, dtype), coloured_images(4)[0]
    assert encoder.model.config._attn_implementation == "sdpa"
    # Without the plain kernel, attention that a fused one cannot take is an error.
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    attend = functional.scaled_dot_product_attention
    with (
        sdpa_kernel(fused),
        mock.patch.object(functional, "scaled_dot_product_attention", wraps=attend) as calls,
    ):
        latents = encoder.encode(images)
    assert calls.call_count == DEPTH
    assert distance(encoder.encode(images), latents) < TOLERANCES[dtype]


def compiled_is_eager(folder: Path, device: str, dtype: str) -> None:
    save_planted_vit(folder)
    encoder, images = planted(folder, device, dtype), coloured_images(4)[0]
    expected = encoder.encode(images)
    torch.compiler.reset()
    encoder.model.compile(fullgraph=True)
    assert distance(encoder.encode(images), expected) < TOLERANCES[dtype]


def served_is_inline(folder: Path, device: str, dtype: str) -> None:
    folder.mkdir()
    vit, neurons = folder / "vit", folder / "registers.json"
    file = RegisterFile(str(vit), None, SIDE, REGISTERS.neurons, "planted")
    save_register_file(neurons, file)
    outliers = {"kind": "registers", "neurons": str(neurons)}
    config, pictures = write_run(folder, dtype=dtype, outliers=outliers, chunk_images=4)
    run = load_run(config, ["encoder.server.batch_images=8"])
    files = [path.read_bytes() for path in sorted(pictures.iterdir())]
    rows = [Row(-1, file, CENTRE, f"caption {number}") for number, file in enumerate(files)]
    local = build_local(run, torch.device(device))
    with (
        running(run, device=device) as server,
        open_channel(server.ready.address, run) as channel,
    ):
        assert server.ready.fingerprint == local.contract.fingerprint
        for part in (rows, rows[3:8], rows[5:6]):
            request = wire.EncodeRequest(server.ready.fingerprint, (SIDE, SIDE), tuple(part))
            pixels = decoded(part, run, (SIDE, SIDE))
            inline = local.encode(pixels, [row.caption for row in part])
            assert_same(encode(channel, run, request), inline)
            assert inline.latents.abs().max() > 0


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_latents_are_those_of_the_cpu(tmp_path: Path, dtype: str) -> None:
    latents_are_those_of_the_cpu(tmp_path, "cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_bits_do_not_depend_on_the_batch(tmp_path: Path, dtype: str) -> None:
    bits_do_not_depend_on_the_batch(tmp_path, "cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_registers_leave_attention_fused(tmp_path: Path, dtype: str) -> None:
    registers_leave_attention_fused(tmp_path, "cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_compiled_is_eager(tmp_path: Path, dtype: str) -> None:
    compiled_is_eager(tmp_path, "cuda", dtype)


@apart
def test_served_is_inline(tmp_path: Path) -> None:
    for dtype in TOLERANCES:
        served_is_inline(tmp_path / dtype, "cuda", dtype)
