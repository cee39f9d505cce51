"""A step of a decoder: reconstruction, the critic, and the balance between them.

    images   = decoder(latents)
    pulls    = the losses' gradients at the images          LPIPS and the ViT are gone back through once
    λ        = ‖reconstruction at the last layer‖ / ‖adversarial there‖
    backward = images · (reconstruction pull + weight·λ·adversarial pull)

Both gradients at the last layer are summed over micro-batches and ranks before their norms are taken,
so λ is that of the global batch, whatever ranks and micro-batches share it out. It must be known
before anything goes back through the decoder: with gradient accumulation, images are therefore made
twice, the first time for λ alone, which adds a forward to the three that a step costs. The pulls are
kept in between, an image's size each.

The last layer is run once more by itself for these gradients: DeepSpeed takes any way back through
the output of its engine for the step's backward, and would reduce gradients that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.boxes import Piece
from dsr_scale.config.decoder import AdversarialConfig, LossesConfig
from dsr_scale.config.training import TrainingConfig
from dsr_scale.decoders.adaptive import weight_from_norms
from dsr_scale.decoders.network import RaeDecoderNetwork
from dsr_scale.decoders.perceptual import Perceptual
from dsr_scale.parallel import fragments
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.zero import Section, ZeroEngine
from dsr_scale.train.decoder_critic import Critic
from dsr_scale.train.decoder_measures import DecoderMeasures
from dsr_scale.train.decoder_objective import Reconstruction


class _Judged(NamedTuple):
    """Losses of a micro-batch and their gradients at its images, as shares of the step's."""

    example: Reconstruction
    loss: Tensor
    """Of reconstruction."""
    pull: Tensor
    """[B,3,H,W]"""
    adversarial: Tensor | None
    adversarial_pull: Tensor | None


class DecoderEngine:
    """Decoder under ZeRO and critic. All ranks call every method together."""

    def __init__(
        self,
        zero: ZeroEngine[RaeDecoderNetwork],
        perceptual: Perceptual | None,
        critic: Critic | None,
        *,
        losses: LossesConfig,
        adversarial: AdversarialConfig | None,
        training: TrainingConfig,
        measures: DecoderMeasures,
        ranks: Ranks,
    ) -> None:
        """`critic` is there if `adversarial` is, `perceptual` if LPIPS has a weight."""
        self._zero = zero
        self._perceptual = perceptual
        self._critic = critic
        self._losses = losses
        self._adversarial = adversarial
        self._peak_rate = training.optimizer.learning_rate
        self._measures = measures
        self._ranks = ranks
        self.guard = zero.guard
        self._last_input: Tensor | None = None
        zero.network.decoder.decoder_pred.register_forward_hook(self._keep_last_input)

    def _keep_last_input(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._last_input = inputs[0].detach()

    @property
    def main_average(self) -> str:
        """The kind of tensor that evaluation and export use."""
        return self._zero.main_average

    def forward_backward(
        self, examples: Sequence[Reconstruction], *, step: int, section: Section
    ) -> Tensor:
        """Gradients of step `step`, from 0, of decoder and critic.

        Returns the decoder's mean loss over all ranks, on the device; not a number where the
        critic's gradients are not finite, so that both networks skip the step.
        """
        critic = self._critic if self._critic and self._critic.trains(step) else None
        if critic is not None and critic.is_heard(step):
            loss = self._balanced(examples, critic, step, section)
        else:
            loss = torch.zeros((), device=self._ranks.device)
            for index in range(len(examples)):
                images, judged = self._forward(examples, index, critic, step, section)
                with section("backward"):
                    self._zero.backward((images * judged.pull).sum())
                loss = loss + judged.loss
        if self._ranks.data.size > 1:
            dist.all_reduce(loss, group=self._ranks.data.group)
            loss = loss / self._ranks.data.size
        if critic is not None:
            with section("backward"):
                loss = torch.where(critic.average_gradients(), loss, torch.nan)
        return loss

    def _balanced(
        self, examples: Sequence[Reconstruction], critic: Critic, step: int, section: Section
    ) -> Tensor:
        """Gradients with the adversarial term; this rank's loss."""
        assert self._adversarial is not None
        at_last_layer = [torch.zeros((), device=self._ranks.device)] * 2
        kept: list[tuple[Tensor | None, _Judged]] = []
        for index in range(len(examples)):
            images, judged = self._forward(examples, index, critic, step, section)
            with section("backward"):
                pulls = (judged.pull, judged.adversarial_pull)
                at_last_layer = [
                    total + self._at_last_layer(pull)
                    for total, pull in zip(at_last_layer, pulls, strict=True)
                ]
            kept.append((images if len(examples) == 1 else None, judged))
        adaptive = self._adaptive_weight(at_last_layer)
        self._measures.add("adaptive_weight", adaptive, 1.0)
        weight = self._adversarial.weight * adaptive
        loss = torch.zeros((), device=self._ranks.device)
        for images, judged in kept:
            with section("forward"):
                made = self._images(judged.example) if images is None else images
            with section("backward"):
                assert judged.adversarial is not None and judged.adversarial_pull is not None
                pull = judged.pull + weight * judged.adversarial_pull
                self._zero.backward((made * pull).sum())
            loss = loss + judged.loss + weight * judged.adversarial
        return loss

    def _forward(
        self,
        examples: Sequence[Reconstruction],
        index: int,
        critic: Critic | None,
        step: int,
        section: Section,
    ) -> tuple[Tensor, _Judged]:
        with section("encode"):
            example = examples[index]
        with section("forward"):
            images = self._images(example)
            return images, self._judge(example, images, critic, step, 1 / len(examples))

    def _images(self, example: Reconstruction) -> Tensor:
        return self._zero.forward(example.latents.to(self._zero.network.last_layer.dtype))

    def _judge(
        self,
        example: Reconstruction,
        images: Tensor,
        critic: Critic | None,
        step: int,
        share: float,
    ) -> _Judged:
        made = images.detach().requires_grad_()
        l1 = (made - example.images).abs().mean() * share
        self._measures.add("l1", l1.detach(), share)
        loss = self._losses.l1 * l1
        if self._perceptual is not None:
            lpips = self._perceptual.distance(made, example.images).mean() * share
            self._measures.add("lpips", lpips.detach(), share)
            loss = loss + self._losses.lpips.weight * lpips
        (pull,) = torch.autograd.grad(loss, made)
        if critic is None:
            return _Judged(example, loss.detach(), pull, None, None)
        said = critic.criticise(made, example.images, example.sample_ids, step=step, share=share)
        self._measures.add("discriminator_loss", said.loss, share)
        self._measures.add("real_logit", said.real_logit, share)
        self._measures.add("fake_logit", said.fake_logit, share)
        if said.adversarial is not None:
            self._measures.add("adversarial", said.adversarial, share)
        return _Judged(example, loss.detach(), pull, said.adversarial, said.pull)

    def _at_last_layer(self, pull: Tensor | None) -> Tensor:
        """The gradient of a loss at the last layer's weight, from that at the images just made."""
        network = self._zero.network
        assert self._last_input is not None
        weight = network.last_layer.detach().requires_grad_()
        patches = functional.linear(self._last_input, weight, network.decoder.decoder_pred.bias)
        # The first row is that of the class token.
        (gradient,) = torch.autograd.grad(network.images_of(patches[:, 1:]), weight, pull)
        return gradient.float()

    def _adaptive_weight(self, gradients: Sequence[Tensor]) -> Tensor:
        """λ of the global batch, from this rank's two gradients; equal on all ranks."""
        assert self._adversarial is not None
        both = torch.stack(list(gradients))
        if self._ranks.data.size > 1:
            dist.all_reduce(both, group=self._ranks.data.group)
            both /= self._ranks.data.size
        squared = both.square().flatten(1).sum(1)
        return weight_from_norms(
            squared[0], squared[1], most=self._adversarial.largest_adaptive_weight
        )

    def step(self, loss: Tensor, *, step: int, learning_rate: float) -> Tensor:
        """Updates both networks and the averages, or neither; `step` counts from 0.

        Returns loss, gradient norm before clipping, and 1 if nothing was changed: float64 [3].
        """
        values = self._zero.step(loss, step=step, learning_rate=learning_rate)
        if self._critic is not None and self._critic.trains(step):
            self._critic.step(rate_share=learning_rate / self._peak_rate, skipped=values[2])
        return values

    def pieces(self, *, owned: bool, kinds: Sequence[str] | None = None) -> Iterator[Piece]:
        """The state by global name; with `kinds`, of the decoder and these alone."""
        yield from self._zero.pieces(owned=owned, kinds=kinds)
        if self._critic is not None and kinds is None:
            yield from self._critic.pieces(owned=owned)

    def refresh(self, *, applied_steps: int) -> None:
        """Call after the pieces' tensors were written."""
        self._zero.refresh(applied_steps=applied_steps)
        if self._critic is not None:
            self._critic.refresh()

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """Name and global shape of every piece of all ranks."""
        network = self._zero.network
        shapes = {
            f"{kind}.{name}": parameter.shape
            for kind in self._zero.kinds
            for name, parameter in network.named_parameters()
        }
        for name in fragments.persistent_buffers(network):
            shapes[f"buffers.{name}"] = network.get_buffer(name).shape
        return shapes if self._critic is None else shapes | self._critic.checkpoint_shapes()
