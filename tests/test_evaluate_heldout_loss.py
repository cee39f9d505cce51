"""The held-out loss: a loop written out, whatever the batch, the rank and the weighting of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import picture, write_list
from tiny_bundles import PATCH, SIDE, write_tiny_bundle

from dsr_scale.base import random_keys
from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.encoders import PixelsImage
from dsr_scale.data.pack import pack
from dsr_scale.data.shares import Share
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.evaluate.heldout_loss import (
    HeldOutSet,
    HeldOutSums,
    add_losses,
    stratified_timesteps,
)
from dsr_scale.evaluate.metrics import merge
from dsr_scale.evaluate.sample_sets import share_of
from dsr_scale.export.pipeline import Pipeline, load

COUNT, BUCKETS, SEED = 9, 4, 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return load(bundle, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    pack(str(write_list(folder / "list", COUNT, height=SIDE, width=SIDE)), folder / "shards")
    return DataConfig(shards=str(folder / "shards"), resolution=SIDE)


def losses(
    pipeline: Pipeline, held_out: HeldOutSet, batch: int, indices: range | None = None
) -> HeldOutSums:
    """Sums over the samples in batches of that size."""
    encoder = build_image_encoder(PixelsImage(patch=PATCH), resolution=SIDE, device="cpu")
    sums = HeldOutSums(BUCKETS)
    for images, prompts, ids in held_out.batches(batch, indices):
        latents, condition = encoder.encode(images), pipeline.condition(prompts)
        add_losses(sums, pipeline.model, pipeline.diffusion, latents, condition, ids, seed=SEED)
    return sums


def by_hand(pipeline: Pipeline) -> list[float]:
    """One image and one timestep at a time; the network predicts data, the loss is on velocity."""
    totals = [0.0] * BUCKETS
    for number in range(COUNT):
        pixels = torch.from_numpy(picture(number, SIDE, SIDE).astype(np.float32)) / 127.5 - 1
        blocks = pixels.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, 3)
        x = blocks.permute(4, 1, 3, 0, 2).reshape(1, -1, SIDE // PATCH, SIDE // PATCH)
        noise = draw_noise(x.shape[1:], SEED, [0], [number], "cpu", purpose="held_out_noise")  # type: ignore[arg-type]
        condition = pipeline.condition([f"picture {number}"])
        for bucket in range(BUCKETS):
            draw = random_keys.generator(SEED, "held_out_timestep", number, bucket).random()
            t = np.float32((bucket + draw) / BUCKETS).item()
            x_t = (1 - t) * x + t * noise
            with torch.no_grad():
                data = pipeline.model(x_t, torch.tensor([t]), condition)
            velocity = (x_t - data) / max(t, 0.05)
            totals[bucket] += float(((velocity - (noise - x)) ** 2).mean())
    return [total / COUNT for total in totals]


def test_the_loss_is_that_of_a_loop_whatever_the_batch(
    pipeline: Pipeline, data: DataConfig
) -> None:
    expected = by_hand(pipeline)
    assert len(set(expected)) == BUCKETS
    for batch in (1, 4, COUNT):
        ours = losses(pipeline, HeldOutSet(data, pipeline.shape), batch)
        assert ours.sums[:, 0].tolist() == [COUNT] * BUCKETS
        assert ours.losses() == pytest.approx(expected, rel=1e-4)


def test_shares_of_ranks_join_to_the_whole(pipeline: Pipeline, data: DataConfig) -> None:
    held_out = HeldOutSet(data, pipeline.shape, 2)
    assert held_out.sample_ids == (0, 4)
    whole = losses(pipeline, held_out, 2)
    ranks = [losses(pipeline, held_out, 2, share_of(2, Share(index, 3))) for index in range(3)]
    assert [int(rank.sums[0, 0]) for rank in ranks] == [0, 1, 1]
    for rank in ranks[1:]:
        merge(ranks[0], rank)
    assert ranks[0].losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_weightings_of_training_do_not_count(
    pipeline: Pipeline, data: DataConfig, tmp_path: Path
) -> None:
    weighted = DiffusionConfig(weighting="min_snr", mask_token_norm=1.0)
    other = load(write_tiny_bundle(tmp_path, diffusion=weighted), device="cpu")
    held_out = HeldOutSet(data, pipeline.shape)
    assert losses(other, held_out, 3).losses() == losses(pipeline, held_out, 3).losses()


def test_every_bucket_has_its_timestep_and_every_sample_another_place() -> None:
    for bucket in range(5):
        t = stratified_timesteps(0, range(200), bucket, 5)
        assert bucket / 5 <= float(t.min()) and float(t.max()) <= (bucket + 1) / 5
        places = t * 5 - bucket
        assert abs(float(places.mean()) - 0.5) < 0.1 and len(t.unique()) > 190
        assert torch.equal(t[7:9], stratified_timesteps(0, [7, 8], bucket, 5))


def test_class_conditional_samples_need_a_class(data: DataConfig, tmp_path: Path) -> None:
    classes = load(write_tiny_bundle(tmp_path, classes=True), device="cpu")
    held_out = HeldOutSet(data, classes.shape)
    (batch,) = held_out.batches(COUNT)
    assert batch.prompts == tuple(str(number % 7) for number in range(COUNT))
    assert all(loss > 0 for loss in losses(classes, held_out, 4).losses())
    other = data.model_copy(update={"label_field": "kind"})
    with pytest.raises(InputError, match=r"sample 0 of [\s\S]*kind = None"):
        next(HeldOutSet(other, classes.shape).batches(1))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    sums = HeldOutSums(2)
    sums.add(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match=r"held-out losses 1\.5, nan"):
        sums.losses()
    sums.add(torch.tensor([0.7]), torch.tensor([float("inf")]))
    with pytest.raises(InputError, match=r"held-out losses 1\.5, inf"):
        sums.losses()


def test_more_samples_than_there_are(pipeline: Pipeline, data: DataConfig) -> None:
    with pytest.raises(InputError, match=r"found: 9 samples[\s\S]*required: 10 samples"):
        HeldOutSet(data, pipeline.shape, 10)
