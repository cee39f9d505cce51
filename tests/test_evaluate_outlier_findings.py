"""Findings of what was planted: times, maps, errors, and all of it on disk and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from outlier_tokens import (
    GRID,
    REGISTERS,
    ROWS,
    TOKENS,
    WIDTH,
    expected_norms,
    noise,
    ordinary_tokens,
)

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.attention_mass import AttentionReading
from dsr_scale.evaluate.outlier_collector import Collector
from dsr_scale.evaluate.outlier_findings import (
    ARRAYS_FILE,
    JSON_FILE,
    OUTPUT,
    Findings,
    Timestep,
    load_findings,
    save_findings,
)
from dsr_scale.evaluate.outlier_measurement import timesteps_on_axes
from dsr_scale.evaluate.outlier_statistics import (
    MEASURES,
    NO_ROWS,
    POOLED,
    TokenRows,
)


def test_times_are_labelled_on_both_axes() -> None:
    alpha, values = 6.928, (0.0, 0.1, 0.5, 0.9, 1.0)
    for time, value in zip(timesteps_on_axes(values, "preshift", alpha), values, strict=True):
        assert time.preshift == value
        assert time.model == pytest.approx(alpha * value / (1 + (alpha - 1) * value))
    for time, value in zip(timesteps_on_axes(values, "model", alpha), values, strict=True):
        assert time.model == value
        assert time.preshift == pytest.approx(value / (alpha - (alpha - 1) * value))
    # The published example: 0.1 before the shift is 0.435 after it.
    assert timesteps_on_axes([0.1], "preshift", alpha)[0].model == pytest.approx(0.435, abs=5e-4)


def collect(batch: int, images: int = 6) -> Findings:
    """Two blocks and an output of planted tokens: token 9 is an outlier of block 1 in every image."""
    collector = Collector(
        ["blocks.0", "blocks.1", OUTPUT], 2, GRID, images=images, registers=REGISTERS, threshold=100
    )
    tokens = ordinary_tokens(images)
    held = noise(images, TOKENS, 5, seed=8)
    tokens[:, ROWS.image, :5] += 3 * held
    planted = tokens.clone()
    planted[:, REGISTERS + 9] = 20 * noise(images, WIDTH, seed=9)
    q, k = (noise(images, 2, REGISTERS + TOKENS, 8, seed=seed) for seed in (5, 6))
    alone = TokenRows(NO_ROWS, slice(0, TOKENS), NO_ROWS, NO_ROWS)
    rows = {"blocks.0": alone, "blocks.1": ROWS, OUTPUT: alone}
    for step in range(2):
        for first in range(0, images, batch):
            part = slice(first, first + batch)
            collector.begin(step, first, rows, held[part])
            collector.tokens("blocks.0", tokens[part, ROWS.image])
            entering = planted[part].norm(dim=-1)
            collector.attention(AttentionReading("blocks.1", entering, q[part], k[part], None))
            collector.tokens("blocks.1", planted[part])
            collector.tokens(OUTPUT, tokens[part, ROWS.image])
        collector.end_timestep()
    pictures = torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    return collector.findings(
        "planted",
        "diffusion",
        [Timestep(0.5, 0.1), Timestep(0.9, 0.4)],
        pictures=pictures,
        captions=[f"caption {image}" for image in range(images)],
        settings={"seed": 3},
    )


def test_findings_tell_what_was_planted() -> None:
    found = collect(batch=6, images=24)
    measures = {name: grid[:, 0] for name, grid in found.measures.items()}
    assert measures.keys() == MEASURES.keys()
    np.testing.assert_allclose(measures["outlier_ratio"], [0, 1 / TOKENS, 0], atol=1e-7)
    assert measures["position_repeat"][1] == pytest.approx(1)
    assert measures["position_chance"][1] == pytest.approx(1 / TOKENS)
    assert np.isnan(measures["position_repeat"][0])
    np.testing.assert_array_equal(found.position_shares[1, 0].ravel().nonzero()[0], [9])
    # The probe reads the patch off ordinary tokens, and nothing off what was put in their place.
    assert measures["patch_prediction_normal"][0] > 0.8
    assert measures["patch_prediction_outliers"][1] < 0.2 < measures["patch_prediction_normal"][1]
    assert np.isnan(measures["patch_prediction_outliers"][0])
    assert np.isnan(measures["register_over_median"][0])
    assert found.top_positions[1, 0].tolist() == [[1, 3]] * 4
    assert found.image_histograms.sum(axis=-1).tolist() == [[24 * TOKENS] * 2] * 3
    assert found.register_histograms.sum(axis=-1).tolist() == [
        [0] * 2,
        [24 * REGISTERS] * 2,
        [0] * 2,
    ]
    assert found.register_maps.shape == (3, 2, 4, REGISTERS, *GRID)
    assert np.isnan(found.register_maps[0]).all()
    assert found.captions == tuple(f"caption {image}" for image in range(4))
    assert found.errors.keys() == MEASURES.keys() - set(POOLED)


def test_findings_do_not_depend_on_the_batch() -> None:
    whole, parts = collect(batch=6), collect(batch=4)
    for name in MEASURES:
        np.testing.assert_allclose(
            parts.measures[name], whole.measures[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    for name in (
        "norm_maps",
        "norm_maps_without_channels",
        "received_maps",
        "register_maps",
        "top_maps",
        "component_maps",
    ):
        np.testing.assert_allclose(
            getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-3, err_msg=name
        )


def test_norm_maps_without_channels_leave_out_each_images_own_three() -> None:
    images, pictured = 6, 4
    tokens = ordinary_tokens(images)
    for image in range(images):
        tokens[image, :, image] += 300  # a massive activation in another channel of every image
        tokens[image, REGISTERS + image] *= 5
    collector = Collector([OUTPUT], 1, GRID, images=images, registers=REGISTERS, threshold=100)
    for first in (0, 3):
        part = slice(first, first + 3)
        collector.begin(0, first, {OUTPUT: ROWS}, noise(3, TOKENS, 5))
        collector.tokens(OUTPUT, tokens[part])
    collector.end_timestep()
    pictures = torch.zeros(images, 3, 8, 8, dtype=torch.uint8)
    found = collector.findings(
        "planted", "encoder", (), pictures=pictures, captions=(), settings={}
    )
    assert found.norm_maps_without_channels.shape == (1, 1, pictured, *GRID)
    for image in range(pictured):
        for maps, without in ((found.norm_maps, 0), (found.norm_maps_without_channels, 3)):
            norms = expected_norms(tokens[image], without)[0]
            np.testing.assert_allclose(maps[0, 0, image], norms.reshape(GRID), rtol=1e-5)
        kept = found.norm_maps_without_channels[0, 0, image]
        assert kept.max() < 25 < 290 < found.norm_maps[0, 0, image].min()


def test_standard_errors_are_those_of_the_images() -> None:
    found = collect(batch=2, images=4)  # as many as have maps
    medians = np.sort(found.norm_maps[0, 0].reshape(4, TOKENS), axis=1)[:, (TOKENS - 1) // 2]
    assert found.measures["median_norm"][0, 0] == pytest.approx(medians.mean(), rel=1e-6)
    error = medians.std(ddof=1) / math.sqrt(4)
    assert found.errors["median_norm"][0, 0] == pytest.approx(error, rel=1e-5)


def test_findings_survive_the_disk(tmp_path: Path) -> None:
    kept = [collect(batch=6), collect(batch=3, images=5)]
    save_findings(kept, tmp_path)
    for before, after in zip(kept, load_findings(tmp_path), strict=True):
        for name in Findings.__dataclass_fields__:
            expected, found = getattr(before, name), getattr(after, name)
            if name in ("measures", "errors"):
                assert found.keys() == expected.keys()
                for measure in expected:
                    np.testing.assert_array_equal(found[measure], expected[measure])
            elif isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(found, expected, err_msg=name)
                assert found.dtype == expected.dtype, name
            else:
                assert found == expected, name


def test_json_has_no_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    save_findings([collect(batch=6)], tmp_path)
    text = (tmp_path / JSON_FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("damage", ["no json", "no arrays", "cut", "format"])
def test_damaged_findings_are_refused(damage: str, tmp_path: Path) -> None:
    save_findings([collect(batch=6)], tmp_path)
    arrays, numbers = tmp_path / ARRAYS_FILE, tmp_path / JSON_FILE
    match damage:
        case "no json":
            numbers.unlink()
        case "no arrays":
            arrays.unlink()
        case "cut":
            arrays.write_bytes(arrays.read_bytes()[:-200])
        case _:
            numbers.write_text(numbers.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(InputError, match="dsr-scale outliers"):
        load_findings(tmp_path)
