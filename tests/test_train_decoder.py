"""Training of decoders: against a plain loop, across stops and ranks, and into pixels elsewhere."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_decoder_runs import RESOLUTION, load, run_decoder, write_weights
from tiny_runs import checkpoint_tensors
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.cli.main import app
from dsr_scale.config.decoder import DecoderRun, decoder_shape
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.data.loader import Batch, BatchStream, open_samples
from dsr_scale.decoders.augment import augmented
from dsr_scale.decoders.discriminator import open_discriminator
from dsr_scale.decoders.noise import noised
from dsr_scale.decoders.perceptual import open_lpips
from dsr_scale.encoders.contract import build_decoder, build_image_encoder
from dsr_scale.encoders.whitening import load_whitening
from dsr_scale.telemetry.metrics import read_metrics
from dsr_scale.train.decoder_build import new_network

pytestmark = pytest.mark.xdist_group("ranks")

FROM_THE_START = (
    "decoder.adversarial.discriminator_start_step=0",
    "decoder.adversarial.generator_start_step=0",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the frozen networks."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of six uninterrupted steps in one process."""
    folder = tmp_path_factory.mktemp("whole")
    return run_decoder(weights, folder, "evaluation.every_steps=6")


def batches_of(run: DecoderRun) -> list[Batch]:
    """The global batch of every step, decoded in this process."""
    size = run.training.global_batch_images
    stream = BatchStream(
        open_samples(run.data),
        run.data,
        seed=run.seed,
        global_batch_images=size,
        microbatch_images=size,
        rank=0,
        world_size=1,
        keep_images=True,
    )
    steps = stream.steps(0)
    return [next(steps)[0] for _ in range(run.training.steps)]


def adamw_groups(named: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and the class token do not."""
    matrices = [p for name, p in named.items() if p.dim() > 1 and not name.endswith("token")]
    others = [p for p in named.values() if all(p is not m for m in matrices)]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


class PlainLoop:
    """One process, whole batches, torch's AdamW: every formula spelled out."""

    def __init__(self, run: DecoderRun) -> None:
        config = run.decoder.adversarial
        assert config is not None
        self.run, self.config = run, config
        self.network = new_network(decoder_shape(run), run.seed)
        self.lpips = open_lpips("alex", run.decoder.losses.lpips.backbone)
        self.critic = open_discriminator(config.model, None, blocks=config.blocks, seed=run.seed)
        self.parameters = dict(self.network.named_parameters())
        self.heads = dict(self.critic.heads.named_parameters())
        both = (
            (self.parameters, run.training.optimizer),
            (self.heads, config.optimizer),
        )
        self.optimizers = [
            torch.optim.AdamW(
                adamw_groups(named, settings.weight_decay),
                lr=settings.learning_rate,
                betas=settings.betas,
                eps=settings.eps,
            )
            for named, settings in both
        ]
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.losses: list[float] = []
        self.encoder = build_image_encoder(run.encoders.image, resolution=RESOLUTION, device=CPU)
        self.whitening = load_whitening(
            run.encoders.image,  # type: ignore[arg-type]
            resolution=RESOLUTION,
            device=CPU,
        )

    def step(self, number: int, batch: Batch) -> None:
        """One optimizer step of both networks; `number` from 0."""
        assert batch.images is not None and self.whitening is not None
        ids = batch.sample_ids.tolist()
        latents = self.whitening.undo(self.encoder.encode(batch.images))
        identity = {"seed": self.run.seed, "epochs": batch.epochs.tolist(), "sample_ids": ids}
        made = self.network(noised(latents, tau=self.run.decoder.noise_tau, **identity))
        real = batch.images.float() / 255
        reconstruction = functional.l1_loss(made, real) + self.lpips.distance(made, real).mean()

        def logits(images: Tensor) -> Tensor:
            drawn = augmented(images, seed=self.run.seed, step=number, sample_ids=ids)
            return self.critic(drawn)

        adversarial = -logits(made).mean()
        last = self.network.last_layer
        pulls = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (reconstruction, adversarial)
        ]
        adaptive = pulls[0] / (pulls[1] + 1e-4)
        loss = reconstruction + self.config.weight * adaptive.detach() * adversarial
        hinge = functional.relu(1 - logits(real)) + functional.relu(1 + logits(made.detach()))
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        head_gradients = torch.autograd.grad(hinge.mean() / 2, list(self.heads.values()))
        for parameter, gradient in zip(self.heads.values(), head_gradients, strict=True):
            parameter.grad = gradient
        for named in (self.parameters, self.heads):
            nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.run.training.ema_decays[0], (1 + number) / (10 + number))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)
        self.losses.append(float(loss))


def test_three_steps_with_both_networks_equal_a_plain_loop(weights: Path, tmp_path: Path) -> None:
    run_directory = run_decoder(weights, tmp_path, *FROM_THE_START, "training.steps=3")
    start = {"discriminator_start_step": 0, "generator_start_step": 0}
    run = load(weights, decoder={"adversarial": start}, training={"steps": 3})
    plain = PlainLoop(run)
    for number, batch in enumerate(batches_of(run)):
        plain.step(number, batch)
    assert [r["loss"] for r in read_metrics(run_directory)] == pytest.approx(plain.losses, rel=2e-5)
    held = checkpoint_tensors(run_directory, 3)
    expected = {f"weights.{name}": p for name, p in plain.parameters.items()}
    expected |= {f"ema_9.{name}": p for name, p in plain.average.items()}
    expected |= {f"discriminator.{name}": p for name, p in plain.heads.items()}
    start_values = dict(new_network(decoder_shape(run), run.seed).named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(held[name], value.detach(), atol=2e-5, rtol=1e-3, msg=name)
    moved = held["weights.decoder.decoder_pred.weight"]
    assert (moved - start_values["decoder.decoder_pred.weight"]).abs().max() > 1e-3


def assert_same(one: Path, other: Path, step: int, tolerance: float = 0.0) -> None:
    a, b = checkpoint_tensors(one, step), checkpoint_tensors(other, step)
    assert a.keys() == b.keys()
    assert {name.partition(".")[0] for name in a} == {
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "ema_9",
        "discriminator",
        "discriminator_exp_avg",
        "discriminator_exp_avg_sq",
        "discriminator_steps",
    }
    for name, value in a.items():
        if tolerance:
            torch.testing.assert_close(b[name], value, atol=tolerance, rtol=1e-3, msg=name)
        else:
            assert torch.equal(b[name], value), name


def test_a_stopped_run_goes_on_bit_for_bit(whole: Path, weights: Path, tmp_path: Path) -> None:
    run_decoder(weights, tmp_path, "training.steps=3")
    resumed = run_decoder(weights, tmp_path)
    assert_same(whole, resumed, 6)
    before, after = checkpoint_tensors(whole, 3), checkpoint_tensors(whole, 6)
    assert not torch.equal(
        before["discriminator.0.around.weight"], after["discriminator.0.around.weight"]
    )
    # Steps 1 to 5, counted from 0, train the critic.
    assert float(after["discriminator_steps.heads"]) == 5
    terms = ("loss", "l1", "lpips", "adversarial", "adaptive_weight", "discriminator_loss")
    told = [
        [{term: record.get(term) for term in terms} for record in read_metrics(run)]
        for run in (whole, resumed)
    ]
    assert told[0] == told[1]
    assert "discriminator_loss" not in read_metrics(whole)[0]
    assert "adaptive_weight" not in read_metrics(whole)[1]


def test_two_ranks_equal_one(whole: Path, weights: Path, tmp_path: Path) -> None:
    two = run_decoder(weights, tmp_path, "parallel.zero=2", ranks=2)
    assert_same(whole, two, 6, tolerance=2e-5)
    assert [r["loss"] for r in read_metrics(two)] == pytest.approx(
        [r["loss"] for r in read_metrics(whole)], rel=1e-5
    )
    state = directory.read_run_state(directory.step_directory(two, 6))
    assert state["layout"] == {"tp": 1, "pp": 1, "dp": 2, "zero": 2}


def test_the_exported_average_decodes_what_the_trainer_measured(
    whole: Path, weights: Path, tmp_path: Path
) -> None:
    """PSNR, L1 and picture of the last evaluation follow from the folder and the run file alone."""
    refused = CliRunner().invoke(app, ["export", str(whole), str(tmp_path), "--dtype", "bf16"])
    assert isinstance(refused.exception, InputError)
    done = CliRunner().invoke(app, ["export", str(whole), str(tmp_path / "rae")])
    assert done.exit_code == 0, done.output
    run = load(weights)
    image = run.encoders.image.model_dump()
    encoders = EncodersConfig.model_validate(
        {"image": image, "decoder": {"kind": "rae", "model": str(tmp_path / "rae")}}
    )
    decoder = build_decoder(encoders, resolution=RESOLUTION, device=CPU)
    encoder = build_image_encoder(encoders.image, resolution=RESOLUTION, device=CPU)
    assert decoder is not None
    batch = shown_images(run, 12)
    made = decoder.decode(encoder.encode(batch))
    squares = ((made.double() - batch.double()) ** 2).flatten(1).mean(1)
    psnr = float((10 * torch.log10(255**2 / squares)).mean())
    (record,) = [r for r in read_metrics(whole) if "evaluation/psnr" in r]
    assert record["evaluation/psnr"] == pytest.approx(psnr, rel=1e-9)
    assert record["evaluation/images"] == 12
    l1 = float((made.double() - batch.double()).abs().mean() / 255)
    assert record["evaluation/l1"] == pytest.approx(l1, rel=1e-9)

    ema = checkpoint_tensors(whole, 6)
    network = new_network(decoder_shape(run), seed=99)
    for name, parameter in network.named_parameters():
        parameter.data.copy_(ema[f"ema_9.{name}"])
    whitening = load_whitening(encoders.image, resolution=RESOLUTION, device=CPU)  # type: ignore[arg-type]
    assert whitening is not None
    with torch.no_grad():
        direct = network(whitening.undo(encoder.encode(batch)))
    assert torch.equal((direct * 255).round().clamp(0, 255).to(torch.uint8), made)
    assert (whole / "grids" / "step_00000006.png").is_file()


def shown_images(run: DecoderRun, count: int) -> Tensor:
    """The first images, opened by PIL alone."""
    samples = open_samples(run.data)
    images = []
    for number in range(count):
        opened = Image.open(io.BytesIO(samples.read(number).image)).convert("RGBA")
        white = Image.new("RGBA", opened.size, "white")
        flat = Image.alpha_composite(white, opened).convert("RGB")
        assert flat.width == flat.height
        small = flat.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1))
    return torch.stack(images)


def test_reconstructions_of_real_images_get_better(weights: Path, tmp_path: Path) -> None:
    run = run_decoder(
        weights,
        tmp_path,
        "decoder.adversarial=null",
        "decoder.losses.lpips.weight=0",
        "training.steps=40",
        "evaluation.every_steps=20",
        "checkpoint.every_steps=40",
        "training.microbatch_images=8",
    )
    records = read_metrics(run)
    psnr = [r["evaluation/psnr"] for r in records if "evaluation/psnr" in r]
    assert len(psnr) == 2 and psnr[1] > psnr[0] + 1
    assert records[-1]["l1"] < records[0]["l1"] / 2
    assert not any("lpips" in r or "adaptive_weight" in r for r in records)
    assert math.isfinite(psnr[1])


def test_a_skipped_step_changes_neither_network(weights: Path, tmp_path: Path) -> None:
    run = run_decoder(
        weights,
        tmp_path,
        *FROM_THE_START,
        "decoder.losses.lpips.weight=0",
        "training.skip={spike_deviations: 0.01, window_steps: 2}",
        "training.optimizer.learning_rate=0.1",
        "training.steps=5",
        "training.microbatch_images=8",
        "checkpoint.every_steps=1",
    )
    skipped = {record["step"] for record in read_metrics(run) if record.get("skipped")}
    assert skipped and max(skipped) <= 5 and len(skipped) < 5
    for step in range(2, 6):
        before, after = checkpoint_tensors(run, step - 1), checkpoint_tensors(run, step)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        if step in skipped:
            assert not changed
        else:
            assert {name.partition(".")[0] for name in changed} >= {
                "weights",
                "ema_9",
                "discriminator",
                "discriminator_steps",
            }
    assert float(checkpoint_tensors(run, 5)["discriminator_steps.heads"]) == 5 - len(skipped)


@pytest.mark.extended
def test_bf16_with_recomputation_resumes_bit_for_bit(weights: Path, tmp_path: Path) -> None:
    bf16 = ("training.precision=bf16", "training.recompute=full", "parallel.zero=2")
    whole = run_decoder(weights, tmp_path / "whole", *bf16)
    run_decoder(weights, tmp_path / "halves", *bf16, "training.steps=3")
    assert_same(whole, run_decoder(weights, tmp_path / "halves", *bf16), 6)
    plain = run_decoder(weights, tmp_path / "plain", "training.precision=bf16", "training.steps=3")
    assert_same(whole, plain, 3, tolerance=1e-2)
