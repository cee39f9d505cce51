"""The loss on images that were not trained on, by timestep: does a model get better, and where?

Every sample is asked at one timestep of every bucket, with noise that is a function of (seed, sample)
and a place inside the bucket that is one of (seed, sample, bucket). So two checkpoints or two models
differ by what they learned, not by luck, and each bucket has as many values as there are samples: a
random timestep per sample would need tens of times as many for the same error. Buckets are equal parts
of model time, after the shift; their mean is the loss at uniform timesteps, not at those of training.

The loss is the plain squared error of the velocity, whatever weighting a run trains with, so that runs
with different ones compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsr_scale.base import random_keys
from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb
from dsr_scale.diffusion.loss import velocity_loss
from dsr_scale.diffusion.path import add_noise, to_velocity
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.evaluate.sample_sets import prompt_of, spread, unusable_sample
from dsr_scale.model.conditioning import Condition
from dsr_scale.telemetry.measures import bucket_sums

MOST_SAMPLES = 1000
"""Of a held-out set, unless more are asked for."""

ConditionalNetwork = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [B,C,H,W], t [B], condition of B) → the network's output [B,C,H,W]."""


class HeldOutBatch(NamedTuple):
    """Samples of a held-out set."""

    images: Tensor
    """uint8 [B,3,H,W], centre-cropped, not mirrored."""
    prompts: tuple[str, ...]
    sample_ids: tuple[int, ...]


class HeldOutSums:
    """Number and sum of losses by timestep bucket [K,2], float64."""

    def __init__(self, buckets: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(buckets, 2, dtype=torch.float64, device=device)

    @property
    def buckets(self) -> int:
        """K, equal parts of [0,1]."""
        return len(self.sums)

    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Counts losses [B] at model times [B] in."""
        values = torch.stack([torch.ones_like(losses), losses], dim=1)
        self.sums += bucket_sums(timesteps, values, self.buckets).to(self.sums)

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.sums]

    def losses(self) -> list[float]:
        """Mean loss of each bucket. Raises InputError for one that is empty or not finite."""
        means = (self.sums[:, 1] / self.sums[:, 0]).tolist()
        if not bool(torch.tensor(means).isfinite().all()):
            raise InputError(
                found="held-out losses " + ", ".join(f"{mean:.4g}" for mean in means),
                required="a finite loss in every timestep bucket",
                remedy="check that the weights are finite and that the held-out set is not empty",
            )
        return means


def stratified_timesteps(seed: int, sample_ids: Sequence[int], bucket: int, buckets: int) -> Tensor:
    """One model time per sample [B] float32 inside a bucket: a function of seed, sample and bucket."""
    places = [
        random_keys.generator(seed, "held_out_timestep", sample, bucket).random()
        for sample in sample_ids
    ]
    return ((bucket + torch.tensor(places, dtype=torch.float64)) / buckets).float()


@torch.inference_mode()
def add_losses(
    sums: HeldOutSums,
    network: ConditionalNetwork,
    diffusion: DiffusionConfig,
    latents: Tensor,
    condition: Condition,
    sample_ids: Sequence[int],
    *,
    seed: int,
) -> None:
    """Counts in the losses of clean latents [B,C,H,W] at one timestep of every bucket."""
    plain = diffusion.model_copy(update={"weighting": "none", "mask_token_norm": None})
    latents = latents.float()
    channels, height, width = latents.shape[1:]
    noise = draw_noise(
        (channels, height, width),
        seed,
        [0] * len(sample_ids),
        sample_ids,
        latents.device,
        purpose="held_out_noise",
    )
    for bucket in range(sums.buckets):
        timesteps = stratified_timesteps(seed, sample_ids, bucket, sums.buckets).to(latents.device)
        noised = add_noise(latents, noise, timesteps)
        output = network(noised, timesteps, condition).float()
        velocity = to_velocity(output, noised, timesteps, plain.prediction, plain.denominator_clamp)
        loss = velocity_loss(velocity, latents, noise, timesteps, plain)
        sums.add(timesteps, loss.per_sample)


class HeldOutSet:
    """Samples spread evenly over a data set, without random choices."""

    def __init__(self, data: DataConfig, shape: ModelShape, count: int | None = None) -> None:
        """`count` samples; None is all, at most `MOST_SAMPLES`.

        Raises InputError when the data cannot be opened or has fewer.
        """
        self._data = data
        self._shape = shape
        self._samples = open_samples(data)
        chosen = count or min(len(self._samples), MOST_SAMPLES)
        self.sample_ids = tuple(spread(len(self._samples), chosen, data.shards))
        self.where = data.shards
        self.fingerprint = self._samples.fingerprint

    def __len__(self) -> int:
        return len(self.sample_ids)

    def batches(self, images: int, indices: range | None = None) -> Iterator[HeldOutBatch]:
        """Up to `images` samples at a time, of all or of the `indices` of one process.

        Raises InputError for a sample that cannot be used.
        """
        ids = self.sample_ids if indices is None else self.sample_ids[indices.start : indices.stop]
        for start in range(0, len(ids), images):
            chunk = ids[start : start + images]
            pixels, prompts = zip(*(self._read(sample_id) for sample_id in chunk), strict=True)
            yield HeldOutBatch(torch.stack(pixels), prompts, chunk)

    def _read(self, sample_id: int) -> tuple[Tensor, str]:
        target = (self._data.resolution, self._data.resolution)
        try:
            sample = self._samples.read(sample_id)
            prompt = prompt_of(sample, self._shape, self._data.label_field)
            image = decode_rgb(sample.image, self._data.background, target)
        except (UnusableRecord, UnreadableImage) as error:
            raise unusable_sample(self._data, sample_id, error) from error
        return torch.from_numpy(cover_and_crop(image, target)), prompt
