"""Global batches: slices of the sample order, and with aspect-ratio buckets, regrouped slices.

Without buckets, batch s is positions [s·G, (s+1)·G). With buckets, S consecutive batches form a
super-block: its S·G samples are grouped by the nearest aspect ratio, each bucket yields as many
whole batches as it fills, and what is left over is joined, in order of aspect ratio, into mixed
batches that are cropped to the bucket nearest to their median. Nothing is lost or repeated, the
samples of a super-block stay within it, and the order of its batches is shuffled. With B buckets
at most B - 1 of S batches are mixed; S = 8·B keeps that under an eighth (a sixteenth on average)
for the price of planning 8·B·G samples at once.

Everything is a pure function of (seed, step, sizes), so a run resumes from its step number alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from dsr_scale.base import random_keys
from dsr_scale.data.order import SampleOrder

SUPER_BLOCK_BATCHES_PER_BUCKET = 8
_CACHED_SUPER_BLOCKS = 2


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step, over all ranks, and the image size they train at."""

    epochs: np.ndarray
    """int64 [G]"""
    sample_ids: np.ndarray
    """int64 [G]"""
    target: tuple[int, int]
    """(height, width) in pixels."""


class BatchPlan:
    """Answers a step number with its global batch."""

    def __init__(
        self,
        order: SampleOrder,
        global_batch_images: int,
        *,
        resolution: int,
        buckets: tuple[tuple[int, int], ...] = (),
        sizes: np.ndarray | None = None,
    ) -> None:
        assert global_batch_images > 0
        assert not buckets or sizes is not None
        self.order = order
        self.images = global_batch_images
        self.square = (resolution, resolution)
        # Sorted by aspect ratio, so that left-over neighbours share a mixed batch.
        self.buckets = tuple(sorted(buckets, key=lambda bucket: (bucket[1] / bucket[0], bucket)))
        self.sizes = sizes
        self.super_block_batches = SUPER_BLOCK_BATCHES_PER_BUCKET * len(self.buckets)
        self._super_block = functools.lru_cache(_CACHED_SUPER_BLOCKS)(self._build_super_block)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of 0-based optimizer step `step`."""
        if not self.buckets:
            epochs, ids = self.order.take(step * self.images, self.images)
            return GlobalBatch(epochs, ids, self.square)
        block, within = divmod(step, self.super_block_batches)
        return self._super_block(block)[within]

    def _build_super_block(self, block: int) -> list[GlobalBatch]:
        count = self.super_block_batches * self.images
        epochs, ids = self.order.take(block * count, count)
        ratios = self._log_ratios(ids)
        nearest = nearest_bucket(ratios, self.buckets)
        batches: list[GlobalBatch] = []
        leftover: list[np.ndarray] = []
        for number, bucket in enumerate(self.buckets):
            members = np.flatnonzero(nearest == number)
            whole = len(members) // self.images * self.images
            for rows in members[:whole].reshape(-1, self.images):
                batches.append(GlobalBatch(epochs[rows], ids[rows], bucket))
            leftover.append(members[whole:])
        for rows in np.concatenate(leftover).reshape(-1, self.images):
            middle = nearest_bucket(np.median(ratios[rows], keepdims=True), self.buckets)
            batches.append(GlobalBatch(epochs[rows], ids[rows], self.buckets[int(middle[0])]))
        generator = random_keys.generator(self.order.seed, "batch_order", block)
        return [batches[position] for position in generator.permutation(len(batches))]

    def _log_ratios(self, ids: np.ndarray) -> np.ndarray:
        """log(width / height), float64 [len(ids)]."""
        assert self.sizes is not None
        sizes = np.asarray(self.sizes[ids], dtype=np.float64)
        return np.log(sizes[:, 1] / sizes[:, 0])


def nearest_bucket(log_ratios: np.ndarray, buckets: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The number of the bucket whose aspect ratio is nearest in logarithm; int64 like the input."""
    centres = np.log([width / height for height, width in buckets])
    return np.abs(log_ratios[:, None] - centres[None, :]).argmin(axis=1)
