"""Training timesteps and noise, and the shift that fits them to the latents' dimension.

A sample's noise and timestep depend on (seed, epoch, sample id) alone, never on its batch or rank.
Timesteps are drawn on the CPU and equal everywhere. Noise is drawn where it is used, because 2·10⁵
normals per image on the CPU would stall a GPU; it is equal on all devices of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsr_scale.base import random_keys
from dsr_scale.config.diffusion import TimestepsConfig


def shift_timesteps(t: Tensor, alpha: float) -> Tensor:
    """t ← αt/(1+(α−1)t): moves [0,1] towards noise for α > 1, ends fixed (RAE §2.2)."""
    return alpha * t / (1 + (alpha - 1) * t)


def timesteps_from_normal(normal: Tensor, config: TimestepsConfig, alpha: float) -> Tensor:
    """Standard normal draws → shifted timesteps, in float32.

    The logit-normal passes them through its sigmoid, the uniform through the normal's own
    distribution function, so one draw per sample serves both.
    """
    normal = normal.double()
    if config.distribution == "logit_normal":
        t = torch.sigmoid(config.mean + config.std * normal)
    else:
        t = torch.special.ndtr(normal)
    return shift_timesteps(t, alpha).float()


def draw_sample_timesteps(
    config: TimestepsConfig,
    alpha: float,
    seed: int,
    epochs: Sequence[int],
    sample_ids: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """One shifted timestep per sample [B] float32, a function of (seed, epoch, sample id)."""
    normal = [
        random_keys.generator(seed, "timestep", epoch, sample).standard_normal()
        for epoch, sample in zip(epochs, sample_ids, strict=True)
    ]
    draws = torch.tensor(normal, dtype=torch.float64)
    return timesteps_from_normal(draws, config, alpha).to(device)


def draw_noise(
    shape: tuple[int, int, int],
    seed: int,
    epochs: Sequence[int],
    sample_ids: Sequence[int],
    device: torch.device | str,
    *,
    purpose: str = "noise",
) -> Tensor:
    """Standard normal noise [B,C,H,W] float32 for `shape` (C,H,W), each sample from its own key.

    Sampling names another `purpose`, so that it never starts from noise seen in training.
    """
    noise = torch.empty(len(sample_ids), *shape, device=device)
    generator = torch.Generator(device)
    for row, epoch, sample in zip(noise, epochs, sample_ids, strict=True):
        generator.manual_seed(random_keys.key(seed, purpose, epoch, sample))
        row.normal_(generator=generator)
    return noise
