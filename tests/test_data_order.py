"""The order of samples: complete, the same for any split, and equal to a slow reference."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dsr_scale.base import random_keys
from dsr_scale.data.buckets import BatchPlan, nearest_bucket
from dsr_scale.data.order import SampleOrder

SHARDS = np.array([5, 0, 9, 4, 7, 1, 6])
N = int(SHARDS.sum())


def reference_epoch(epoch: int, seed: int, block_samples: int) -> list[int]:
    """The whole epoch at once, from the description in words."""
    first = {shard: int(SHARDS[:shard].sum()) for shard in range(len(SHARDS))}
    filled = [shard for shard in range(len(SHARDS)) if SHARDS[shard]]
    shuffled = random_keys.generator(seed, "shard_order", epoch).permutation(filled)
    blocks: list[list[int]] = [[]]
    for shard in shuffled:
        if len(blocks[-1]) >= block_samples:
            blocks.append([])
        blocks[-1] += range(first[shard], first[shard] + int(SHARDS[shard]))
    order: list[int] = []
    for number, block in enumerate(blocks):
        generator = random_keys.generator(seed, "sample_order", epoch, number)
        order += generator.permutation(block).tolist()
    return order


@pytest.mark.parametrize("block_samples", [1, 8, 10, 1000])
def test_equals_the_reference_at_every_position(block_samples: int) -> None:
    order = SampleOrder(SHARDS, seed=3, block_samples=block_samples)
    expected = [sample for epoch in range(3) for sample in reference_epoch(epoch, 3, block_samples)]
    epochs, ids = order.take(0, 3 * N)
    assert ids.tolist() == expected
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(N)]
    fresh = SampleOrder(SHARDS, seed=3, block_samples=block_samples)
    for first in (3 * N - 1, 0, N - 2, 17, N + 5):  # out of order, across epoch ends
        count = min(5, 3 * N - first)
        assert fresh.take(first, count)[1].tolist() == expected[first : first + count]


def test_every_epoch_visits_every_sample_once_and_differs() -> None:
    order = SampleOrder(SHARDS, seed=0, block_samples=8)
    epochs = [order.take(epoch * N, N)[1] for epoch in range(4)]
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(N))
    assert len({tuple(ids.tolist()) for ids in epochs}) == 4
    other = SampleOrder(SHARDS, seed=1, block_samples=8)
    assert other.take(0, N)[1].tolist() != epochs[0].tolist()


def test_blocks_keep_the_open_shards_few() -> None:
    shards = np.full(50, 20)
    order = SampleOrder(shards, seed=0, block_samples=100)
    _, ids = order.take(0, 1000)
    for start in range(0, 1000, 100):
        assert len(set((ids[start : start + 100] // 20).tolist())) == 5


def test_a_billion_samples_need_only_their_block() -> None:
    order = SampleOrder(np.full(100_000, 10_000), seed=0, block_samples=262_144)
    epochs, ids = order.take(10**9 - 3, 6)
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(ids.tolist())) == 6 and ids.min() >= 0 and ids.max() < 10**9


BUCKETS = ((16, 16), (12, 20), (20, 12), (8, 32))


def plan(samples: int, images: int, seed: int = 0) -> BatchPlan:
    generator = np.random.default_rng(7)
    sizes = generator.integers(8, 40, (samples, 2))
    order = SampleOrder(
        np.array([samples // 2, samples - samples // 2]), seed=seed, block_samples=9
    )
    return BatchPlan(order, images, resolution=16, buckets=BUCKETS, sizes=sizes)


def test_buckets_lose_and_repeat_nothing_across_epochs() -> None:
    images = 6
    planned = plan(50, images)
    steps = planned.super_block_batches * 3
    positions = steps * images
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        batch = planned.batch(step)
        assert len(batch.sample_ids) == images
        seen.update(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True))
    epochs, ids = planned.order.take(0, positions)
    assert seen == Counter(zip(epochs.tolist(), ids.tolist(), strict=True))


def test_batches_have_one_bucket_and_the_mixed_ones_are_few() -> None:
    images = 6
    planned = plan(5000, images)
    assert planned.sizes is not None
    for block in range(4):
        mixed = 0
        for step in range(planned.super_block_batches):
            batch = planned.batch(block * planned.super_block_batches + step)
            ratios = np.log(
                planned.sizes[batch.sample_ids][:, 1] / planned.sizes[batch.sample_ids][:, 0]
            )
            # The slow way: compare every ratio with every bucket in plain Python.
            nearest = [
                min(BUCKETS, key=lambda b, ratio=ratio: abs(ratio - np.log(b[1] / b[0])))
                for ratio in ratios
            ]
            mixed += set(nearest) != {batch.target}
        assert mixed <= len(BUCKETS) - 1


def test_bucketed_batches_do_not_depend_on_what_was_asked_before() -> None:
    planned, again = plan(50, 6), plan(50, 6)
    steps = planned.super_block_batches + 5
    forward = [planned.batch(step) for step in range(steps)]
    for step in reversed(range(steps)):
        batch = again.batch(step)
        assert batch.target == forward[step].target
        np.testing.assert_array_equal(batch.sample_ids, forward[step].sample_ids)
    assert any(
        plan(50, 6, seed=1).batch(step).sample_ids.tolist() != forward[step].sample_ids.tolist()
        for step in range(3)
    )


def test_nearest_bucket_is_symmetric_in_the_logarithm() -> None:
    buckets = ((10, 10), (10, 40))
    ratios = np.log([1.99, 2.01, 0.1, 100.0])
    assert nearest_bucket(ratios, buckets).tolist() == [0, 1, 0, 1]
