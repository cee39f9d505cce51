"""The model under DeepSpeed ZeRO-1, 2 or 3: gradients, clipping, AdamW, averages, skipped steps.

Micro-batches go through the engine's own forward and backward, or through a pipeline schedule on the
bare module; both end in `step`, which is the accumulation boundary. State is seen from outside as
pieces by global name (`fragments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsr_scale.base.boxes import Piece
from dsr_scale.config.training import ema_name
from dsr_scale.parallel import ema, fragments
from dsr_scale.parallel.assemble import LocalModel, Network
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.guard import GuardedAdamW, StepGuard
from dsr_scale.parallel.pipeline import MicroBatch, Pipeline, Probes

MOMENTS = ("exp_avg", "exp_avg_sq")

Section = Callable[[str], AbstractContextManager[object]]
"""Opens a named stretch of a step, to be timed."""


class ZeroEngine(Generic[Network]):
    """One replica's part in training. All ranks call every method together."""

    def __init__(
        self,
        engine: Any,
        optimizer: GuardedAdamW,
        local: LocalModel[Network],
        pipeline: Pipeline | None,
        guard: StepGuard,
        *,
        ema_decays: Sequence[float],
        ranks: Ranks,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._local = local
        self._pipeline = pipeline
        self._ema_decays = tuple(ema_decays)
        self._ranks = ranks
        self._parameters = dict(local.network.named_parameters())
        self._buffers = fragments.persistent_buffers(local.network)
        self._shared = sorted(local.on_every_stage)
        self._places = _places_in_bf16_groups(engine.optimizer, self._parameters)
        self.guard = guard

    @property
    def network(self) -> Network:
        """This rank's part of the network, in the training precision."""
        return self._local.network

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every fp32 tensor that a parameter owns during training."""
        averages = (ema_name(decay) for decay in self._ema_decays)
        return (fragments.WEIGHTS, *MOMENTS, *averages)

    @property
    def main_average(self) -> str:
        """The kind that sampling uses."""
        return ema_name(self._ema_decays[0])

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        section: Section = nullcontext,
        probes: Probes | None = None,
    ) -> Tensor:
        """Gradients of a step; its mean loss over all replicas, on the device, on every rank.

        Opens the sections `encode`, which is asking for a micro-batch, `forward` and `backward`, or
        `forward_backward` where a schedule mixes them. `probes` look at the blocks of this rank.
        """
        if self._pipeline is not None:
            # Stages ask for a micro-batch several times, and not in order.
            with section("encode"):
                encoded = list(micro_batches)
            with section("forward_backward"):
                loss = self._pipeline.run(encoded, probes)
                self._sum_over_stages()
        else:
            loss = torch.zeros((), device=self._ranks.device)
            for index in range(len(micro_batches)):
                with section("encode"):
                    micro_batch = micro_batches[index]
                with section("forward"):
                    share = self._loss(micro_batch, probes) / len(micro_batches)
                with section("backward"):
                    self.backward(share)
                loss = loss + share.detach()
        if self._ranks.world_size > 1:
            # Tensor ranks know the same loss, pipeline ranks but the last know none.
            dist.all_reduce(loss)
        return loss / (self._ranks.data.size * self._ranks.tensor.size)

    def _loss(self, micro_batch: MicroBatch, probes: Probes | None) -> Tensor:
        latents, timesteps = micro_batch.inputs()
        probe = None if probes is None else probes(timesteps)
        output = self.forward(latents, timesteps, micro_batch.condition, probe=probe)
        return micro_batch.loss(output)

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """The network's output, for whoever makes the loss of a micro-batch elsewhere."""
        return self._engine(*inputs, **settings)

    def backward(self, share: Tensor) -> None:
        """Adds the gradients of a micro-batch's share of the mean loss to those of the step."""
        self._engine.backward(share, scale_wrt_gas=False)

    def step(self, loss: Tensor, *, step: int, learning_rate: float) -> Tensor:
        """Clips, updates weights and averages; `step` counts from 0.

        Returns loss, gradient norm over the whole model before clipping, and 1 if nothing was
        changed: float64 [3] on the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.expect(lambda: self.guard.judge(loss, self._gradient_norm(loss)))
        self._engine.step()
        skipped = self._optimizer.found_inf
        if not self._engine.was_step_applied() or skipped is None:
            skipped = torch.ones((), device=loss.device)
            self._forget_gradients()
        else:
            ema.update(
                fragments.master_partitions(self._engine.optimizer),
                self._optimizer.state,
                self._ema_decays,
                step,
                1 - skipped,
            )
        return torch.stack(
            [loss.double(), self._gradient_norm(loss).double(), skipped.to(loss.device).double()]
        )

    def _forget_gradients(self) -> None:
        """Drops the sums of a refused step, which DeepSpeed keeps, and adds to, with offload."""
        sums = getattr(self._engine.optimizer, "averaged_gradients", {})
        for group in sums:
            sums[group] = None

    def _gradient_norm(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self._engine.optimizer._global_grad_norm, device=like.device)

    @torch.no_grad()
    def _sum_over_stages(self) -> None:
        """Adds up the gradients of parameters that every pipeline rank holds, in one message."""
        gradients = [self._gradient(name) for name in self._shared]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self._ranks.pipeline.group)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _gradient(self, name: str) -> Tensor:
        """The accumulated gradient of a parameter; of zeros where this stage did not use it."""
        if not self._places:
            parameter = self._parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            return parameter.grad
        # bf16: DeepSpeed accumulates in fp32 buffers of its own, and clips only those marked as used.
        group, place = self._places[name]
        zero = self._engine.optimizer
        zero.fp32_groups_has_gradients[group][place] = True
        return zero.fp32_groups_gradients[group][place]

    def pieces(self, *, owned: bool, kinds: Sequence[str] | None = None) -> Iterator[Piece]:
        """The state in this rank's partition by global name, then buffers.

        `owned`: of equal copies on several ranks only this rank's share, so that all ranks' pieces
        together are the whole state once; otherwise all that this rank needs.
        """
        chosen = {
            name: parameter
            for name, parameter in self._parameters.items()
            if not owned or name in self._local.owned
        }
        yield from fragments.parameter_pieces(
            self._engine.optimizer, chosen, self._local.splits, tuple(kinds or self.kinds)
        )
        if not owned or (self._ranks.data.rank == 0):
            names = [n for n in self._buffers if not owned or n in self._local.owned]
            yield from fragments.buffer_pieces(self.network, names)

    def refresh(self, *, applied_steps: int) -> None:
        """Call after the pieces' tensors were written: the network follows, AdamW counts from there."""
        for partition in fragments.master_partitions(self._engine.optimizer):
            self._optimizer.state[partition]["step"].fill_(float(applied_steps))
        fragments.refresh_weights(self._engine.optimizer)


def _places_in_bf16_groups(
    zero_optimizer: Any, parameters: Mapping[str, nn.Parameter]
) -> dict[str, tuple[int, int]]:
    """Where DeepSpeed's bf16 optimizer keeps each parameter's gradient; empty for its others."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(member)]: (group, place)
        for group, members in enumerate(getattr(zero_optimizer, "bf16_groups", []))
        for place, member in enumerate(members)
    }
