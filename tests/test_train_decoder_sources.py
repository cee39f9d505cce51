"""Decoders learn the same whatever encodes, and what cannot be trained is said before anything is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rank_processes import run_ranks
from serving_processes import serving
from tiny_decoder_runs import drive, load, run_decoder, write_config, write_weights
from tiny_runs import checkpoint_tensors

from dsr_scale.base.errors import InputError
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.encode_service.cache import open_cache
from dsr_scale.encode_service.fill import fill
from dsr_scale.encoders.contract import build_image_encoder, rounded
from dsr_scale.evaluate.inception import WEIGHTS_URL
from dsr_scale.telemetry.metrics import read_metrics
from dsr_scale.train.decoder_build import DecoderTraining
from dsr_scale.train.decoder_evaluation import find_inception

pytestmark = pytest.mark.xdist_group("ranks")

CPU = torch.device("cpu")
SHORT = (
    "decoder.adversarial=null",
    "decoder.losses.lpips.weight=0",
    "training.steps=3",
    "encoders.latent_dtype=bf16",
    "evaluation.every_steps=3",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the frozen networks."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


@pytest.fixture(scope="module")
def inline(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run that encodes for itself."""
    return run_decoder(weights, tmp_path_factory.mktemp("inline"), *SHORT)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = checkpoint_tensors(one, 3), checkpoint_tensors(other, 3)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    told = [
        [
            {k: v for k, v in r.items() if k in ("loss", "evaluation/psnr")}
            for r in read_metrics(run)
        ]
        for run in (one, other)
    ]
    assert told[0] == told[1] and "evaluation/psnr" in told[0][-1]


def test_cached_latents_train_bit_for_bit_as_inline_ones(
    inline: Path, weights: Path, tmp_path: Path
) -> None:
    encoders = {"latent_dtype": "bf16"}
    fill(load(weights, encoders=encoders), tmp_path / "cache", device=CPU, decode_threads=2)
    through = ("encoder.mode=cache", f"encoder.cache={tmp_path / 'cache'}")
    assert_same_run(inline, run_decoder(weights, tmp_path, *SHORT, *through))

    cached = load(
        weights, encoders=encoders, encoder={"mode": "cache", "cache": str(tmp_path / "cache")}
    )
    _, rows = open_cache(cached)
    stream = BatchStream(
        open_samples(cached.data),
        cached.data,
        seed=cached.seed,
        global_batch_images=8,
        microbatch_images=8,
        rank=0,
        world_size=1,
        encoder=rows,
        keep_images=True,
    )
    batch = next(stream.steps(0))[0]
    # Of the same view: some images of the batch are mirrored.
    assert batch.images is not None and batch.encoded is not None
    encoder = build_image_encoder(cached.encoders.image, resolution=32, device="cpu")
    assert torch.equal(
        rounded(encoder.encode(batch.images), cached.encoders), batch.encoded.latents
    )


@pytest.mark.extended
@pytest.mark.parametrize("send", ["files", "pixels"])
def test_served_latents_train_bit_for_bit_as_inline_ones(
    inline: Path, weights: Path, tmp_path: Path, send: str
) -> None:
    registry = tmp_path / "servers"
    config = write_config(weights, tmp_path / "served")
    with serving(config, registry, "encoders.latent_dtype=bf16"):
        through = (f"encoder.registry={registry}", "encoder.mode=service", f"encoder.send={send}")
        run = run_decoder(weights, tmp_path / "run_it", *SHORT, *through, "data.workers=1")
    assert_same_run(inline, run)


@pytest.mark.parametrize(
    ("override", "found", "remedy"),
    [
        ("parallel.tp=2", "parallel.tp = 2", "parallel out"),
        ("parallel.zero=3", "parallel.zero = 3", "1 or 2"),
        ("encoders.image={kind: pixels, patch: 8}", "kind = pixels", "vit"),
        ("data.resolution=30", "grid of 4×4", "multiple of 4"),
        ("decoder.losses.lpips.backbone=nowhere.pth", "at nowhere.pth", "alexnet-owt-7be5be79.pth"),
        ("decoder.adversarial.model=/nowhere", "decoder.adversarial", "decoder.adversarial=null"),
        ("decoder.adversarial.blocks=[0, 7]", "[0, 7]", "blocks"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    weights: Path, tmp_path: Path, override: str, found: str, remedy: str
) -> None:
    config = write_config(weights, tmp_path)
    problem = run_ranks(refused, 1, config, [override])[0]
    assert found in problem["found"], problem
    assert remedy in problem["required"] + problem["remedy"], problem
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_without_inception_the_log_says_what_to_fetch(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run = load(weights, evaluation={"images": 3000})
    ranks = SimpleNamespace(device=CPU, gather_on_host=lambda items: items)
    told: list[str] = []
    for images in (3000, 2048):
        training = cast("DecoderTraining", SimpleNamespace(run=run, ranks=ranks))
        assert find_inception(training, images, told.append) is None
    assert WEIGHTS_URL in told[0] and str(tmp_path) in told[0]
    assert "at least 2049" in told[1]


def refused(config: Path, overrides: list[str]) -> dict[str, Any]:
    """What the trainer says is wrong."""
    try:
        drive(config, overrides)
    except InputError as problem:
        return {"found": problem.found, "required": problem.required, "remedy": problem.remedy}
    raise AssertionError("it trained")
