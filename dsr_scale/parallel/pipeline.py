"""Micro-batches through pipeline stages: 1F1B, or interleaved 1F1B with several stages per rank.

A stage is the same network with blocks missing. Between stages travel the tokens (and inside a DDT
head what modulates it), nothing else: every rank of a replica holds the batch, so each stage embeds
timestep and condition for itself, and the last one knows target and noise. What a stage is handed by
the schedule beside tokens is therefore the number of the micro-batch.

Schedules are torch.distributed.pipelining's. They fix tensor shapes at their first run, so there is
one schedule per image size and caption length. `scale_grads` stays off: DeepSpeed has taken the
gradients before the schedule would scale them, so the loss is divided instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import Carried, DiT, Probe
from dsr_scale.model.layout import TokenLayout
from dsr_scale.parallel.groups import Axis

Probes = Callable[[Tensor], Probe]
"""The probe for a forward of images at timesteps [B]."""


class MicroBatch(Protocol):
    """What a stage needs of a micro-batch, on every rank of the replica alike."""

    @property
    def condition(self) -> Condition:
        """Of the batch."""
        ...

    @property
    def latent_shape(self) -> torch.Size:
        """[B,C,H,W]."""
        ...

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noised latents [B,C,H,W] and timesteps [B]."""
        ...

    def loss(self, output: Tensor) -> Tensor:
        """Mean loss of the network's output [B,C,H,W]."""
        ...


class _Stage(nn.Module):
    """One stretch of blocks as the schedule calls it: carried tensors in, carried tensors out.

    The network is shared by all stages of a rank and hidden from `parameters()`: gradients are
    DeepSpeed's business.
    """

    def __init__(
        self, network: DiT, blocks: range, micro_batches: Sequence[MicroBatch], *, last: bool
    ) -> None:
        super().__init__()
        self._network = [network]
        self._blocks = blocks
        self.micro_batches = micro_batches
        self.probes: Probes | None = None
        self._last = last

    def forward(self, *carried: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        network = self._network[0]
        micro_batch = self.micro_batches[int(index)]
        latents, timesteps = micro_batch.inputs()
        layout = network.layout(latents.shape[-2], latents.shape[-1], micro_batch.condition)
        if self._blocks.start < network.depth:
            signal = network.signal(timesteps, micro_batch.condition, layout)
        else:
            signal = network.head_signal(timesteps)
        before = None
        if carried:
            before = Carried(carried[0], carried[1] if len(carried) > 1 else None)
        probe = None if self.probes is None else self.probes(timesteps)
        after = network.span(self._blocks, before, latents, signal, layout, probe=probe)
        if self._last:
            return network.leave(after, signal, layout)
        # Messages are contiguous; tokens straight from the patch embedding are not.
        return tuple(tensor.contiguous() for tensor in after if tensor is not None)


class Pipeline:
    """This rank's stages of one replica. All ranks of the replica call it together."""

    def __init__(
        self,
        network: DiT,
        spans: Sequence[range],
        pipeline: Axis,
        *,
        rows_per_share: int,
        device: torch.device,
    ) -> None:
        """`spans` are the blocks of all stages of the replica, in order; rank r holds stages r,
        r + size, …. `rows_per_share`: tensor ranks that divide the tokens of a sequence."""
        self._network = network
        self._spans = spans
        self._pipeline = pipeline
        self._rows_per_share = rows_per_share
        self._device = device
        self._schedules: dict[tuple[object, ...], tuple[list[_Stage], _Schedule]] = {}

    @property
    def holds_last(self) -> bool:
        """Whether this rank computes the loss."""
        return (len(self._spans) - 1) % self._pipeline.size == self._pipeline.rank

    def run(self, micro_batches: Sequence[MicroBatch], probes: Probes | None = None) -> Tensor:
        """Forward and backward of a step; its mean loss where that is known, else zero."""
        stages, schedule = self._schedule(micro_batches)
        for stage in stages:
            stage.micro_batches = micro_batches
            stage.probes = probes
        index = torch.arange(len(micro_batches))
        losses: list[Tensor] = []
        self._current = micro_batches
        if self.holds_last:
            schedule.step(index=index, target=index, losses=losses, return_outputs=False)
        else:
            schedule.step(index=index, return_outputs=False)
        total = torch.zeros((), device=self._device)
        for loss in losses:
            total = total + loss.detach()
        return total

    def _loss(self, output: Tensor, index: Tensor) -> Tensor:
        return self._current[int(index)].loss(output) / len(self._current)

    def _schedule(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[_Stage], _Schedule]:
        first = micro_batches[0]
        shape, text_length = first.latent_shape, first.condition.text_length
        key = (len(micro_batches), shape, text_length)
        if key not in self._schedules:
            layout = self._network.layout(shape[-2], shape[-1], first.condition)
            mine = range(self._pipeline.rank, len(self._spans), self._pipeline.size)
            stages = [
                _Stage(
                    self._network,
                    self._spans[number],
                    micro_batches,
                    last=number == len(self._spans) - 1,
                )
                for number in mine
            ]
            wrapped = [
                self._pipeline_stage(stage, number, shape, layout)
                for stage, number in zip(stages, mine, strict=True)
            ]
            count = len(micro_batches)
            if len(wrapped) == 1:
                schedule: _Schedule = Schedule1F1B(
                    wrapped[0], count, loss_fn=self._loss, scale_grads=False
                )
            else:
                schedule = ScheduleInterleaved1F1B(
                    list(wrapped), count, loss_fn=self._loss, scale_grads=False
                )
            self._schedules[key] = stages, schedule
        return self._schedules[key]

    def _pipeline_stage(
        self, stage: _Stage, number: int, latent_shape: torch.Size, layout: TokenLayout
    ) -> PipelineStage:
        batch = latent_shape[0]
        last = number == len(self._spans) - 1
        return PipelineStage(
            stage,
            number,
            len(self._spans),
            self._device,
            input_args=self._border(self._spans[number].start, batch, layout) if number else (),
            output_args=torch.empty(latent_shape, device="meta", requires_grad=True)
            if last
            else self._border(self._spans[number].stop, batch, layout),
            group=self._pipeline.group,
        )

    def _border(self, block: int, batch: int, layout: TokenLayout) -> tuple[Tensor, ...]:
        """The tensors that travel to the stage that begins with `block`, without content."""
        network, head = self._network, self._network.shape.head
        rows = layout.head if block >= network.depth else layout.inside(block - 1)
        in_head = head is not None and block > network.depth
        width = head.width if head is not None and in_head else network.shape.width
        dtype = next(network.parameters()).dtype
        tensor = torch.empty(
            batch,
            rows.total // self._rows_per_share,
            width,
            dtype=dtype,
            device="meta",
            requires_grad=True,
        )
        return (tensor, torch.empty_like(tensor, requires_grad=True)) if in_head else (tensor,)


_Schedule = Schedule1F1B | ScheduleInterleaved1F1B


def keep_blocks(network: DiT, blocks: Sequence[int]) -> None:
    """Leaves in `network` what a pipeline rank with these blocks needs.

    Embedders of timestep and condition stay on every rank. Names stay what they were.
    """
    held, depth, head = set(blocks), network.depth, network.shape.head
    for key in list(network.blocks):
        if int(key) not in held:
            del network.blocks[key]
    needs = {
        "x_embedder": depth if head else 0,
        "s_embedder": 0,
        "s_projector": depth,
        "dec_register_tokens": depth,
        "register_tokens": network.shape.register_start,
        "enc_register_tokens": network.shape.register_start,
        "final_layer": network.total_blocks - 1,
    }
    for name, block in needs.items():
        if hasattr(network, name) and block not in held:
            delattr(network, name)


ON_EVERY_STAGE = ("t_embedder.", "y_embedder.")
"""Parameters that every pipeline rank holds, whose gradients are summed over the pipeline."""
