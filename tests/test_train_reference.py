"""The trainer equals a plain torch loop: AdamW, clipping, accumulation, schedule, EMA, one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import checkpoint_tensors, run_training, write_config

from dsr_scale.config.derive import model_shape, timestep_shift
from dsr_scale.config.load import load_run
from dsr_scale.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.encoders.contract import build_image_encoder, build_text_encoder
from dsr_scale.model.build import build_model, decay_groups
from dsr_scale.train.objective import Encoders, Example, FlowMatching
from dsr_scale.train.schedule import learning_rate

OVERRIDES = (
    "training.steps=4",
    "training.optimizer.gradient_clip=0.5",
    "training.schedule.warmup_steps=2",
    "training.schedule.decay=cosine",
    "checkpoint.every_steps=4",
)


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    run_directory = run_training(tmp_path, *OVERRIDES)
    trained = checkpoint_tensors(run_directory, 4)

    run = load_run(write_config(tmp_path), OVERRIDES)
    shape = model_shape(run)
    cpu = torch.device("cpu")
    objective = FlowMatching(run.diffusion, timestep_shift(run, shape), run.seed)
    encoders = Encoders(
        run.encoders,
        build_image_encoder(run.encoders.image, resolution=32, device=cpu),
        build_text_encoder(run.encoders.text, device=cpu),
        cpu,
    )
    model = build_model(shape, seed=run.seed)
    decay, spared = decay_groups(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in decay], "weight_decay": 0.1},
            {"params": [p for _, p in spared], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    # One micro-batch of the whole global batch: the trainer accumulates two of half its size.
    stream = BatchStream(
        open_samples(run.data),
        run.data,
        seed=run.seed,
        global_batch_images=8,
        microbatch_images=8,
        rank=0,
        world_size=1,
    )
    rates = [0.005, 0.01, 0.01 * (1 + math.cos(0.0)) / 2, 0.01 * (1 + math.cos(math.pi / 2)) / 2]
    for step, (batches, rate) in enumerate(zip(stream.steps(0), rates, strict=False)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        ids = batches[0].sample_ids.tolist()
        epochs = batches[0].epochs.tolist()
        example = Example(objective, *encoders.encode(batches[0]), tuple(epochs), tuple(ids))
        latents, timesteps = example.inputs()
        example.loss(model(latents, timesteps, example.condition)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5, "clipping is not exercised"
        optimizer.step()
        keep = min(run.training.ema_decays[0], (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * parameter.detach()
    stream.close()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            trained[f"weights.{name}"], parameter.detach(), atol=2e-5, rtol=1e-3, msg=name
        )
        torch.testing.assert_close(
            trained[f"ema_9.{name}"], average[name], atol=2e-5, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (10, 1.0), (15, 0.55), (20, 0.1), (99, 0.1)],
)
def test_linear_schedule(step: int, expected: float) -> None:
    config = TrainingConfig(
        steps=100,
        optimizer=OptimizerConfig(learning_rate=1.0),
        schedule=ScheduleConfig(
            warmup_steps=4,
            decay="linear",
            decay_start_step=10,
            decay_end_step=20,
            final_learning_rate=0.1,
        ),
    )
    assert learning_rate(config, step) == pytest.approx(expected)
