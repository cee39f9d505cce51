"""Reference sets: folders, shards and ADM files give the same images; damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fixtures import write_list
from PIL import Image

from dsr_scale.base.errors import InputError
from dsr_scale.data.pack import pack
from dsr_scale.data.shares import Share
from dsr_scale.evaluate import metrics as evaluation
from dsr_scale.evaluate.inception import POOL_CHANNELS, SPATIAL_CHANNELS
from dsr_scale.evaluate.metrics import Metric
from dsr_scale.evaluate.reference_set import NpzImages, image_side, open_reference


def _write_npz(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


def test_reference_images_of_every_kind_are_the_same(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list", 9, height=16, width=16)
    pack(str(listed), tmp_path / "shards")
    expected = np.stack(
        [np.asarray(Image.open(path)) for path in sorted(listed.parent.glob("images/*.png"))]
    )
    npz = _write_npz(tmp_path / "batch.npz", arr_0=expected)
    for place in (str(listed.parent / "images"), str(tmp_path / "shards"), npz):
        reference = open_reference(place, 16)
        assert image_side(place) == 16
        assert reference.images is not None and reference.images.count == 9
        images = torch.cat(list(reference.images.batches(4)))
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
        shares = [open_reference(place, 16, Share(i, 4)).images for i in range(4)]
        parts = [torch.cat(list(part.batches(2))) for part in shares if part]
        assert torch.equal(torch.cat(parts), images)
        assert [len(part) for part in parts] == [2, 2, 2, 3]
        # More processes than images: some have none, and none is an error.
        many = [open_reference(place, 16, Share(i, 12)).images for i in range(12)]
        parts = [batch for part in many if part for batch in part.batches(2)]
        assert torch.equal(torch.cat(parts), images) and len(many[0] or ()) == 0


def _statistics(channels: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    factors = generator.normal(size=(channels, 3))
    return generator.normal(size=channels), factors @ factors.T + np.eye(channels)


def test_statistics_of_adm(tmp_path: Path) -> None:
    mu, sigma = _statistics(POOL_CHANNELS)
    mu_s, sigma_s = _statistics(SPATIAL_CHANNELS)
    np.savez(tmp_path / "all.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = open_reference(str(tmp_path / "all.npz"), 64)
    assert reference.images is None and reference.pool and reference.spatial
    assert np.array_equal(reference.pool.mean.numpy(), mu)
    np.testing.assert_allclose(reference.spatial.covariance.numpy(), sigma_s, rtol=1e-12)
    needed = evaluation.metrics_of_real_images(evaluation.OF_INCEPTION, reference)
    assert needed == {Metric.precision_recall}
    real = evaluation.real_images(reference, None)
    assert real.pool is reference.pool and real.features is None

    # Statistics of a large set and images of a small one, as ADM publishes for ImageNet.
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "both.npz", mu=mu, sigma=sigma, arr_0=images)
    both = open_reference(str(tmp_path / "both.npz"), 8)
    assert evaluation.metrics_of_real_images(evaluation.OF_INCEPTION, both) == {
        Metric.sfid,
        Metric.precision_recall,
    }


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "with arrays other"),
        ({"mu": np.zeros(POOL_CHANNELS)}, r"required: mu \[2048\] and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"mu \[3\], sigma \[3, 3\]"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"arr_0 float32 \[2, 8, 8, 3\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"required: uint8 \[N,8,8,3\]"),
        (
            {"mu": np.zeros(POOL_CHANNELS), "sigma": np.triu(np.ones((POOL_CHANNELS,) * 2))},
            "not symmetric",
        ),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "arr_0 object"),
    ],
)
def test_npz_files_of_another_kind(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_reference(_write_npz(tmp_path / "file.npz", **arrays), 8)


def test_npz_files_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        open_reference(str(tmp_path / "none.npz"), 8)
    path = tmp_path / "cut.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="is damaged: no archive"):
        open_reference(str(path), 8)
    with pytest.raises(InputError, match=r"^found: \S+ is no folder"):
        image_side(str(tmp_path / "nothing"))
    place = _write_npz(path, arr_0=np.zeros((90, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match="is damaged"):
        open_reference(place, 8)
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    place = _write_npz(path, arr_0=noise)
    content = bytearray(path.read_bytes())
    content[9000:9100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        list(NpzImages(path, 8).batches(16))
