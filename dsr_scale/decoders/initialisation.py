"""Initial values of the decoder and of the discriminator's heads, keyed by (seed, parameter name).

The rule is that of masked autoencoders, whose decoder this is: Xavier-uniform matrices (a
convolution is the matrix of its output channels), zero biases, norm weights of one. A value depends
on nothing but the seed, its name and its shape, so ranks and layouts agree without a broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsr_scale.base.random_keys import key

TOKEN_STD = 0.02


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fills every parameter of `module` with its initial value."""
    for name, parameter in module.named_parameters():
        parameter.copy_(_drawn(name, parameter.shape, key(seed, f"init/{name}")))


def _drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A float32 value on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    if name.endswith("token"):
        return torch.randn(shape, generator=generator) * TOKEN_STD
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
