"""The search on a network whose register neurons are known, because they were planted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_vit import FIRST, GRID, PATCH, SECOND, coloured_images, planted_encoder
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dsr_scale.base.errors import InputError
from dsr_scale.base.token_outliers import outliers
from dsr_scale.encoders.outliers import RegisterTreatment, Treatment, ZeroingTreatment, treated
from dsr_scale.encoders.patch_norms import measure_norms, token_norms
from dsr_scale.encoders.register_search import (
    SearchResult,
    SearchSettings,
    find_register_neurons,
    first_outlier_layer,
)
from dsr_scale.encoders.vit import VitEncoder

PLANTED = {**FIRST, **SECOND}
SETTINGS = SearchSettings(top_k=2)
IMAGES, RED, BLUE = coloured_images(24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> VitEncoder:
    return planted_encoder(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def unplanted(tmp_path_factory: pytest.TempPathFactory) -> VitEncoder:
    return planted_encoder(tmp_path_factory.mktemp("unplanted"), planted=False)


def _batches(size: int = 10) -> Iterator[Tensor]:
    return iter(IMAGES.split(size))


def _search(encoder: VitEncoder, settings: SearchSettings = SETTINGS) -> SearchResult:
    return find_register_neurons(encoder, _batches, settings)


def _latents(encoder: VitEncoder, treatment: Treatment | None = None) -> Tensor:
    """[N,T,C] of all images."""
    with treated(encoder, treatment):
        return encoder.encode(IMAGES).flatten(2).transpose(1, 2)


def _outliers(encoder: VitEncoder, treatment: Treatment | None) -> Tensor:
    """Which patches are outliers after the last block, bool [N,T]."""
    with treated(encoder, treatment):
        return outliers(token_norms(encoder, IMAGES)[-1][:, encoder.patch_rows])


def test_recursion_finds_exactly_the_planted_neurons(encoder: VitEncoder) -> None:
    result = _search(encoder)
    assert result.neurons == PLANTED
    assert result.stop == "clean"
    first, second = result.passes
    assert {n.layer for n in first.neurons} == set(FIRST) == {first.highest_layer}
    assert {n.layer for n in second.neurons} == set(SECOND) == {second.highest_layer}
    # Every image but the last has outliers, and that one must not count.
    assert first.images_with_outliers == second.images_with_outliers == len(IMAGES) - 1
    assert result.after[-1].outlier_ratio < SETTINGS.max_outlier_ratio <= 1e-3
    assert encoder.treatment is None


def test_one_pass_removes_the_first_population_and_not_the_second(encoder: VitEncoder) -> None:
    result = _search(encoder, replace(SETTINGS, passes=1))
    assert result.stop == "passes used up"
    assert result.neurons == FIRST
    before = _outliers(encoder, None)
    after = _outliers(encoder, result.treatment)
    assert before[RED].all()
    assert not after[RED].any()
    torch.testing.assert_close(after, before & BLUE)
    assert after.any()
    assert result.before[-1].outlier_ratio > result.after[-1].outlier_ratio > 1e-3


def test_the_register_takes_the_norms_over(encoder: VitEncoder) -> None:
    result = _search(encoder)
    before, after = result.before[-1], result.after[-1]
    assert before.register_over_median is None
    assert before.max_over_median > 7
    assert after.max_over_median < before.max_over_median / 5
    assert after.register_over_median is not None
    assert after.register_over_median > 7
    assert not _outliers(encoder, result.treatment).any()


def test_cleaned_tokens_are_those_of_the_network_without_register_neurons(
    encoder: VitEncoder, unplanted: VitEncoder
) -> None:
    clean = cosine_similarity(
        _latents(encoder, _search(encoder).treatment), _latents(unplanted), dim=-1
    )
    assert clean.min() > 0.99
    # The comparison can tell: without treatment the marked tokens are far away.
    dirty = cosine_similarity(_latents(encoder), _latents(unplanted), dim=-1)
    assert dirty[RED | BLUE].mean() < 0.6


def test_zeroing_removes_the_norms_and_nothing_takes_over(encoder: VitEncoder) -> None:
    with treated(encoder, ZeroingTreatment(PLANTED)):
        norms = measure_norms(encoder, _batches())
        longest = token_norms(encoder, IMAGES)[-1].max()
    assert norms[-1].outlier_ratio == 0
    assert norms[-1].register_over_median is None
    with treated(encoder, RegisterTreatment(PLANTED)):
        assert token_norms(encoder, IMAGES)[-1].max() > 4 * longest


def test_zeroing_loses_what_a_register_keeps_for_readers(tmp_path: Path) -> None:
    """With a head that reads outliers, as the paper finds in real encoders and as is planted here."""
    encoder = planted_encoder(tmp_path, reader=True)
    untreated = _latents(encoder)
    others = ~(RED | BLUE)

    def kept(treatment: Treatment) -> Tensor:
        return cosine_similarity(_latents(encoder, treatment), untreated, dim=-1)[others]

    moved, zeroed = kept(RegisterTreatment(PLANTED)), kept(ZeroingTreatment(PLANTED))
    assert moved.mean() > 0.98
    assert zeroed.mean() < 0.9


def test_the_register_is_no_outlier(encoder: VitEncoder) -> None:
    """In images without blue, the register alone is over the threshold in the second pass."""
    images = IMAGES.clone()
    for image, place in BLUE[:12].nonzero().tolist():
        y, x = PATCH * (place // GRID), PATCH * (place % GRID)
        images[image, :, y : y + PATCH, x : x + PATCH] = 128
    first, second = find_register_neurons(encoder, lambda: images.split(10), SETTINGS).passes
    assert first.images_with_outliers == len(IMAGES) - 1
    assert second.images_with_outliers == len(IMAGES) - 1 - 12
    register = first.after[-1].register_over_median
    assert register is not None
    assert register * first.after[-1].mean > second.threshold


def test_an_encoder_without_outliers_needs_no_registers(unplanted: VitEncoder) -> None:
    result = _search(unplanted)
    assert result.stop == "clean"
    assert result.neurons == {}
    assert result.after == result.before


def test_a_threshold_over_all_norms_ranks_nothing(encoder: VitEncoder) -> None:
    result = _search(encoder, replace(SETTINGS, threshold=1e6))
    assert result.stop == "nothing to rank"
    assert result.neurons == {}


def test_the_highest_layer_bounds_the_ranking(encoder: VitEncoder) -> None:
    whole = _search(encoder, replace(SETTINGS, highest_layer=-1))
    assert whole.neurons == PLANTED
    assert {done.highest_layer for done in whole.passes} == {5}
    early = _search(encoder, replace(SETTINGS, highest_layer=0, passes=1))
    assert set(early.neurons) == {0}


def test_sparse_leaves_out_neurons_that_are_active_everywhere(encoder: VitEncoder) -> None:
    """A unit that always fires beats the planted ones by score, and is no register neuron."""
    loud = encoder.model.vision_model.encoder.layers[1].mlp.fc1
    before = loud.bias[0].item()
    try:
        loud.bias[0] = 50
        settings = replace(SETTINGS, passes=1)
        assert 0 in _search(encoder, settings).neurons[1]
        assert _search(encoder, replace(settings, sparse=True)).neurons == FIRST
    finally:
        loud.bias[0] = before


def test_batches_do_not_matter(encoder: VitEncoder) -> None:
    whole = find_register_neurons(encoder, lambda: _batches(len(IMAGES)), SETTINGS)
    ones = find_register_neurons(encoder, lambda: _batches(1), SETTINGS)
    assert whole.neurons == ones.neurons == PLANTED
    for a, b in zip(whole.after, ones.after, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_norms_are_those_of_all_images_at_once(encoder: VitEncoder) -> None:
    norms = measure_norms(encoder, _batches())
    patches = token_norms(encoder, IMAGES)[:, :, encoder.patch_rows].double()
    for measured, of_layer in zip(norms, patches, strict=True):
        assert measured.mean == pytest.approx(float(of_layer.mean()))
        assert measured.deviation == pytest.approx(float(of_layer.std(correction=0)))
        assert measured.outlier_ratio == pytest.approx(float(outliers(of_layer).double().mean()))
        ratio = of_layer.amax(1) / of_layer.median(1).values
        assert measured.max_over_median == pytest.approx(float(ratio.mean()))


def test_outliers_appear_where_the_last_run_of_blocks_begins(encoder: VitEncoder) -> None:
    norms = measure_norms(encoder, _batches())
    assert first_outlier_layer(norms, 5, 1e-3) == 1
    # Noise of the first blocks, with a clean block after it, is not where they are born.
    noisy = (norms[0]._replace(outlier_ratio=0.1), norms[1]._replace(outlier_ratio=0), *norms[2:])
    assert first_outlier_layer(noisy, 5, 1e-3) == 2


def test_layers_that_do_not_exist_are_refused(encoder: VitEncoder) -> None:
    with pytest.raises(InputError, match="--detect-layer 6 with an encoder of 6 blocks"):
        _search(encoder, replace(SETTINGS, detect_layer=6))
    with pytest.raises(InputError, match="--highest-layer -7 with an encoder of 6 blocks"):
        _search(encoder, replace(SETTINGS, highest_layer=-7))


def test_progress_counts_every_image_of_every_reading(encoder: VitEncoder) -> None:
    seen: dict[str, int] = {}

    def on_images(stage: str, images: int) -> None:
        seen[stage] = seen.get(stage, 0) + images

    find_register_neurons(encoder, _batches, SETTINGS, on_images=on_images)
    stages = ["before: norms", "pass 1: neurons", "pass 1: norms"]
    assert list(seen) == [*stages, "pass 2: neurons", "pass 2: norms"]
    assert set(seen.values()) == {len(IMAGES)}
