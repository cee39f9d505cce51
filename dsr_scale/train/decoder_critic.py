"""The discriminator in training: small heads, whole on every rank, under an AdamW of their own.

Heads have about a hundredth of the decoder's parameters, so ZeRO would divide nothing worth dividing:
gradients are averaged over the ranks in one message and every rank takes the same step. Weights and
moments go into the checkpoint from the first rank and are read by all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsr_scale.base.boxes import Box, Piece
from dsr_scale.config.decoder import AdversarialConfig
from dsr_scale.decoders.augment import augmented
from dsr_scale.decoders.discriminator import Discriminator, discriminator_loss, generator_loss
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.guard import GuardedAdamW

WEIGHTS = "discriminator"
MOMENTS = ("exp_avg", "exp_avg_sq")
APPLIED_STEPS = "discriminator_steps.heads"
"""What AdamW counts, in the checkpoint: a tensor of one number."""


class Criticism(NamedTuple):
    """What the critic says of a micro-batch; scalars and gradients are this micro-batch's shares."""

    loss: Tensor
    """The heads' own loss."""
    real_logit: Tensor
    fake_logit: Tensor
    """Means."""
    adversarial: Tensor | None
    """The decoder's term, before its weights; None while it does not listen."""
    pull: Tensor | None
    """The term's gradient at the images."""


class Critic:
    """Heads, their gradients and their optimizer. All ranks call every method together."""

    def __init__(
        self, discriminator: Discriminator, config: AdversarialConfig, *, seed: int, ranks: Ranks
    ) -> None:
        """`discriminator` on the device, its heads equal on all ranks."""
        self._discriminator = discriminator
        self._config = config
        self._seed = seed
        self._ranks = ranks
        self._heads = dict(discriminator.heads.named_parameters())
        settings = config.optimizer
        self._optimizer = GuardedAdamW(
            [
                {
                    "params": [p for p in self._heads.values() if (p.dim() > 1) == decays],
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
        )
        for parameter in self._heads.values():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS},
            }

    def trains(self, step: int) -> bool:
        """Whether the heads learn in step `step`, from 0."""
        return step >= self._config.discriminator_start_step

    def is_heard(self, step: int) -> bool:
        """Whether the decoder listens in step `step`."""
        return step >= self._config.generator_start_step

    def criticise(
        self,
        made: Tensor,
        real: Tensor,
        sample_ids: Sequence[int],
        *,
        step: int,
        share: float,
    ) -> Criticism:
        """Judges images [B,3,H,W] in [0, 1] and adds to the gradients of the heads.

        `made` is a leaf. Both are distorted alike; `share` is the micro-batch's part of the step.
        """
        heard = self.is_heard(step)
        augmentation = {"seed": self._seed, "step": step, "sample_ids": sample_ids}
        fake = self._discriminator(augmented(made if heard else made.detach(), **augmentation))
        actual = self._discriminator(augmented(real, **augmentation))
        loss = discriminator_loss(actual, fake) * share
        adversarial = pull = None
        if heard:
            adversarial = generator_loss(fake) * share
            (pull,) = torch.autograd.grad(adversarial, made, retain_graph=True)
            adversarial = adversarial.detach()
        gradients = torch.autograd.grad(loss, list(self._heads.values()))
        for parameter, gradient in zip(self._heads.values(), gradients, strict=True):
            # A convolution's may come channels-last; fused AdamW pairs numbers by place in memory.
            gradient = gradient.contiguous()
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return Criticism(
            loss.detach(),
            actual.detach().mean() * share,
            fake.detach().mean() * share,
            adversarial,
            pull,
        )

    @torch.no_grad()
    def average_gradients(self) -> Tensor:
        """Over all ranks; whether they are finite: a bool on the device, equal everywhere."""
        gradients = [p.grad for p in self._heads.values() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self._ranks.data.size > 1:
            dist.all_reduce(flat, group=self._ranks.data.group)
            flat /= self._ranks.data.size
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat.isfinite().all()

    def step(self, *, rate_share: float, skipped: Tensor) -> None:
        """Updates the heads, unless `skipped`, on the device, is 1; forgets the gradients.

        `rate_share` is the learning rate as a part of its peak.
        """
        settings = self._config.optimizer
        if settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._heads.values(), settings.gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_share
        self._optimizer.expect(lambda: skipped.float())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def pieces(self, *, owned: bool) -> Iterator[Piece]:
        """Weights, moments and the number of applied steps by name; `owned`: for the first rank only."""
        if owned and self._ranks.data.rank > 0:
            return
        for name, parameter in self._heads.items():
            state = self._optimizer.state[parameter]
            yield _whole(f"{WEIGHTS}.{name}", parameter.detach())
            for moment in MOMENTS:
                yield _whole(f"{WEIGHTS}_{moment}.{name}", state[moment])
        yield _whole(APPLIED_STEPS, self._applied_steps)

    @property
    def _applied_steps(self) -> Tensor:
        """Of one parameter, [1]; all have the same."""
        parameter = next(iter(self._heads.values()))
        return self._optimizer.state[parameter]["step"].view(1)

    def refresh(self) -> None:
        """Call after the pieces' tensors were written."""
        for parameter in self._heads.values():
            self._optimizer.state[parameter]["step"].copy_(self._applied_steps[0])

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """Name and shape of every piece."""
        shapes = {APPLIED_STEPS: torch.Size([1])}
        for name, parameter in self._heads.items():
            for kind in (WEIGHTS, *(f"{WEIGHTS}_{moment}" for moment in MOMENTS)):
                shapes[f"{kind}.{name}"] = parameter.shape
        return shapes


def _whole(name: str, tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(name, shape, Box((0,) * len(shape), shape), tensor.view(-1))
