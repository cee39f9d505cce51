"""The adaptive weight against finite differences, and what it does to two losses' pulls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsr_scale.decoders.adaptive import weight_from_norms

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
JUDGE = torch.randn(4, generator=GENERATOR, dtype=torch.float64)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3, dtype=torch.float64)
        self.last = nn.Linear(3, 4, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=GENERATOR))

    def hidden(self) -> Tensor:
        return torch.tanh(self.first(LATENTS))


def _losses(decoder: _Decoder) -> tuple[Tensor, Tensor]:
    images = decoder.last(decoder.hidden())
    return (images - TARGETS).square().mean(), -(torch.tanh(images) @ JUDGE).mean()


def _numeric_norm(decoder: _Decoder, which: int) -> float:
    """‖∂L/∂W‖ by central differences, one weight at a time."""
    total, step = 0.0, 1e-6
    weight = decoder.last.weight.data
    for index in range(weight.numel()):
        values: list[float] = []
        for sign in (1, -1):
            weight.view(-1)[index] += sign * step
            values.append(float(_losses(decoder)[which].detach()))
            weight.view(-1)[index] -= sign * step
        total += ((values[0] - values[1]) / (2 * step)) ** 2
    return total**0.5


def _weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    squared = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].square().sum()
        for loss in (reconstruction, adversarial)
    ]
    return weight_from_norms(squared[0], squared[1], most=1e4)


def test_it_is_the_ratio_of_finite_difference_gradients() -> None:
    decoder = _Decoder()
    weight = _weight(*_losses(decoder), decoder.last.weight)
    expected = _numeric_norm(decoder, 0) / (_numeric_norm(decoder, 1) + 1e-4)
    assert float(weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
def test_the_weighted_adversarial_loss_pulls_as_hard_as_reconstruction(scale: float) -> None:
    decoder = _Decoder()
    reconstruction, adversarial = _losses(decoder)
    weight = _weight(reconstruction, scale * adversarial, decoder.last.weight)
    (pull,) = torch.autograd.grad(reconstruction, decoder.last.weight, retain_graph=True)
    (weight * scale * adversarial).backward()
    assert decoder.last.weight.grad is not None
    assert float(decoder.last.weight.grad.norm()) == pytest.approx(float(pull.norm()), rel=0.02)


def test_a_discriminator_without_gradient_does_not_send_it_to_infinity() -> None:
    nine, zero = torch.tensor(9.0, requires_grad=True), torch.tensor(0.0)
    assert float(weight_from_norms(nine, zero, most=1e9)) == pytest.approx(3 / 1e-4)
    bounded = weight_from_norms(nine, zero, most=1e4)
    assert float(bounded) == 1e4
    assert not bounded.requires_grad
    assert float(weight_from_norms(zero, zero, most=1e4)) == 0
