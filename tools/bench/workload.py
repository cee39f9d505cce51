"""What the benchmarks run: a network with made-up samples, under ZeRO or in a plain loop.

The plain loop is what a person would write for one process: forward, backward, clipping, fused AdamW,
one average of the weights. In bf16 it keeps fp32 master weights and accumulates gradients in fp32,
as the engine does, so that both do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsr_scale.base.random_keys import key
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.config.training import TrainingConfig
from dsr_scale.model.build import build_model, decay_groups
from dsr_scale.model.conditioning import Condition
from dsr_scale.parallel import ema, groups
from dsr_scale.parallel.assemble import assemble, make_pipeline
from dsr_scale.parallel.start import start_zero
from dsr_scale.parallel.zero import ZeroEngine
from dsr_scale.train.objective import Example, FlowMatching

LEARNING_RATE = 1e-4
CLASSES = 1000

Batch = tuple[Tensor, Condition, tuple[int, ...]]
"""Latents, condition and sample ids of a micro-batch."""


def class_shape(*, width: int, depth: int, heads: int, grid: int, registers: int) -> ModelShape:
    """A class-conditional DiT with registers from a third of its depth on."""
    return ModelShape.model_validate(
        {
            "width": width,
            "depth": depth,
            "heads": heads,
            "head": None,
            "patch": 1,
            "channels": 16,
            "grid": [grid, grid],
            "registers": registers,
            "register_start": -(-2 * depth // 7),
            "conditioning": {"kind": "class", "num_classes": CLASSES},
            "text_kind": "none",
            "text_channels": 0,
            "text_length": 0,
            "qk_norm": True,
            "attention": "sdpa",
        }
    )


def training_config(*, images: int, microbatch: int, device: str, **changes: Any) -> TrainingConfig:
    """Settings in which every part of a step is at work."""
    values = {
        "global_batch_images": images,
        "microbatch_images": microbatch,
        "device": device,
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "eps": 1e-6,
            "weight_decay": 0.1,
            "gradient_clip": 1.0,
        },
        **changes,
    }
    return TrainingConfig.model_validate(values)


def make_batches(shape: ModelShape, training: TrainingConfig, device: torch.device) -> list[Batch]:
    """A step's micro-batches, equal on every rank."""
    batches: list[Batch] = []
    for first in range(0, training.global_batch_images, training.microbatch_images):
        ids = tuple(range(first, first + training.microbatch_images))
        generator = torch.Generator().manual_seed(key(0, "latents", first))
        latents = torch.randn(len(ids), shape.channels, *shape.grid, generator=generator)
        condition = Condition(
            null=torch.tensor([i % 10 == 0 for i in ids]),
            labels=torch.tensor([7 * i % CLASSES for i in ids]),
        )
        batches.append((latents.to(device), condition.to(device), ids))
    return batches


def examples(batches: Sequence[Batch]) -> list[Example]:
    """The micro-batches under the objective; noise and timesteps are drawn again in every step."""
    objective = FlowMatching(DiffusionConfig(prediction="velocity"), 1.0, seed=0)
    return [
        Example(objective, latents, condition, tuple(0 for _ in ids), ids)
        for latents, condition, ids in batches
    ]


def start_engine(
    shape: ModelShape, training: TrainingConfig, parallel: ParallelConfig
) -> tuple[ZeroEngine, groups.Ranks]:
    """The engine of a layout without data parallelism, on the ranks that run this."""
    ranks = groups.start(training.device, tp=parallel.tp, pp=parallel.pp)
    local = assemble(shape, seed=1, ranks=ranks, parallel=parallel, training=training)
    engine = start_zero(
        local,
        make_pipeline(local, ranks, parallel),
        training,
        parallel,
        ranks=ranks,
        accumulation_steps=training.global_batch_images // training.microbatch_images,
    )
    return engine, ranks


class EngineSteps:
    """Steps of the engine as the training loop makes them."""

    def __init__(self, engine: ZeroEngine, batches: Sequence[Batch]) -> None:
        self.engine = engine
        self._batches = batches
        self._steps = 0

    def gradients(self) -> None:
        """Forward and backward of a step."""
        self._loss = self.engine.forward_backward(examples(self._batches))

    def update(self) -> None:
        """What follows: clipping, AdamW, averages."""
        self.engine.step(self._loss, step=self._steps, learning_rate=LEARNING_RATE)
        self._steps += 1


class PlainSteps:
    """The same steps written by hand for one process."""

    def __init__(
        self,
        shape: ModelShape,
        training: TrainingConfig,
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        self.network = build_model(shape, seed=1).to(device)
        self._settings = training.optimizer
        self._batches = batches
        self._steps = 0
        masters = dict(self.network.named_parameters())
        self._weights: list[Tensor] = []
        if training.precision == "bf16":
            masters = {n: nn.Parameter(p.detach().clone()) for n, p in masters.items()}
            self.network.bfloat16()
            self._weights = list(self.network.parameters())
        if training.compile:
            for block in self.network.blocks.values():
                block.compile(fullgraph=True)
        self.masters = masters
        self._flat: list[Tensor] = list(masters.values())
        self.averages = [p.detach().clone() for p in self._flat]
        self._decay = training.ema_decays[0]
        decay, spared = decay_groups(self.network)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [masters[n] for n, _ in decay]},
                {"params": [masters[n] for n, _ in spared], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=self._settings.betas,
            eps=self._settings.eps,
            weight_decay=self._settings.weight_decay,
            fused=True,
        )

    def gradients(self) -> None:
        """Forward and backward of a step."""
        batch = examples(self._batches)
        for example in batch:
            latents, timesteps = example.inputs()
            output = self.network(latents, timesteps, example.condition)
            (example.loss(output) / len(batch)).backward()
            for weight, master in zip(self._weights, self._flat, strict=False):
                assert weight.grad is not None
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    master.grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def update(self) -> None:
        """What follows: clipping, AdamW, the average."""
        if self._settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._flat, self._settings.gradient_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        keep = ema.decay_at(self._steps, self._decay)
        torch._foreach_lerp_(self.averages, self._flat, 1 - keep)
        if self._weights:
            torch._foreach_copy_(self._weights, self._flat)
        self._steps += 1
