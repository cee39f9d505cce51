"""FID, Inception Score, precision and recall: each against a second computation, and joined over ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate import metrics as evaluation
from dsr_scale.evaluate.frechet import FeatureMoments, Gaussian, frechet_distance
from dsr_scale.evaluate.inception import (
    CLASSES,
    POOL_CHANNELS,
    SPATIAL_CHANNELS,
    InceptionFeatures,
)
from dsr_scale.evaluate.inception_score import ScoreSums
from dsr_scale.evaluate.metrics import ImageSums, Metric, RealImages, merge, obstacle
from dsr_scale.evaluate.precision_recall import FeatureRows, precision_recall
from dsr_scale.evaluate.reference_set import Reference


def _features(count: int, channels: int, seed: int) -> Tensor:
    """Correlated features away from zero, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    return torch.randn(count, channels, generator=generator) @ mixing + 3 * mixing[0]


def _by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """The published formula with a general matrix square root, from the features."""
    linalg = pytest.importorskip("scipy.linalg")
    mean_1, mean_2 = first.mean(0), second.mean(0)
    covariance_1, covariance_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(covariance_1 @ covariance_2)
    traces = np.trace(covariance_1) + np.trace(covariance_2) - 2 * np.trace(root).real
    return float(((mean_1 - mean_2) ** 2).sum() + traces)


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    for batch in features.split(7):
        moments.add(batch)
    return moments


def test_distance_of_known_gaussians() -> None:
    """With covariances of common axes the distance is Σ(√a − √b)² over the axes, plus the means'."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    a = torch.tensor([4.0, 9.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 16.0, 1.0, 0.0, 2.25], dtype=torch.float64)
    mean = torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    first = Gaussian(torch.zeros(5, dtype=torch.float64), axes @ a.diag() @ axes.T)
    second = Gaussian(mean, axes @ b.diag() @ axes.T)
    expected = 25 + (1 + 1 + 0 + 0.25 + 2.25)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-9)


def test_distance_of_samples_is_the_published_formula() -> None:
    first, second = _features(90, 12, 1), _features(70, 12, 2)
    ours = frechet_distance(_moments(first).gaussian("fid"), _moments(second).gaussian("fid"))
    expected = _by_scipy(first.double().numpy(), second.double().numpy())
    assert ours == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_an_error() -> None:
    features = _features(13, 12, 1)
    _moments(features).gaussian("fid")
    with pytest.raises(InputError, match=r"12 images for fid[\s\S]*at least 13"):
        _moments(features[:12]).gaussian("fid")


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.tensor([[1.0, 0.0], [0.0, math.nan]]), "not finite"),
        (
            torch.tensor([[1.0, 0.0], [0.0, -0.5]]),
            r"eigenvalues from -0.5 to 1|imaginary part of 0\.707 beside 1",
        ),
    ],
)
def test_matrices_without_a_real_root_are_an_error(covariance: Tensor, message: str) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    good = Gaussian(zero, torch.eye(2, dtype=torch.float64))
    bad = Gaussian(zero, covariance.double())
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=message):
            frechet_distance(*pair)


def test_an_imaginary_part_over_the_tolerance_is_an_error() -> None:
    """Eigenvalues small enough to be rounding, which weigh against a root that is as small."""
    zero = torch.zeros(2, dtype=torch.float64)
    first = Gaussian(zero, torch.tensor([[1e-9, 0.0], [0.0, 1.0]], dtype=torch.float64))
    second = Gaussian(zero, torch.tensor([[1.0, 0.0], [0.0, -5e-7]], dtype=torch.float64))
    with pytest.raises(InputError, match="imaginary part"):
        frechet_distance(first, second)


def test_statistics_of_other_features_are_an_error() -> None:
    with pytest.raises(InputError, match="of 3 and of 4 channels"):
        frechet_distance(
            _moments(_features(9, 3, 0)).gaussian("fid"),
            _moments(_features(9, 4, 0)).gaussian("fid"),
        )


def _score_by_definition(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    return float(np.exp(divergence.mean()))


def test_inception_score_is_its_definition_over_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(10_100, 6, generator=generator)
    sums = ScoreSums(len(logits), 6)
    for start in range(0, len(logits), 999):
        sums.add(logits[start : start + 999], start)
    halves = [_score_by_definition(part) for part in logits.double().numpy().reshape(2, 5050, 6)]
    score = sums.score()
    assert score.mean == pytest.approx(np.mean(halves), rel=1e-9)
    assert score.std == pytest.approx(np.std(halves), rel=1e-6)


def test_inception_score_of_fewer_images_than_classes_is_an_error() -> None:
    sums = ScoreSums(5, 6)
    sums.add(torch.zeros(5, 6), 0)
    with pytest.raises(InputError, match="5 images for inception_score"):
        sums.score()


def _brute_force(real: Tensor, generated: Tensor) -> tuple[float, float]:
    def distance(a: Tensor, b: Tensor) -> float:
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))

    def radii(rows: Tensor) -> list[float]:
        return [
            sorted(distance(a, b) for j, b in enumerate(rows) if j != i)[2]
            for i, a in enumerate(rows)
        ]

    def inside(points: Tensor, centres: Tensor) -> float:
        sizes = radii(centres)
        hits = [
            any(distance(p, c) <= r for c, r in zip(centres, sizes, strict=True)) for p in points
        ]
        return sum(hits) / len(hits)

    return inside(generated, real), inside(real, generated)


def test_precision_and_recall_are_those_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(4)
    real = torch.randn(40, 3, generator=generator)
    generated = 0.6 * torch.randn(30, 3, generator=generator) + 0.5
    generated[:5] += 6
    expected = _brute_force(real, generated)
    assert tuple(precision_recall(real, generated)) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected[1] < expected[0] < 1
    assert tuple(precision_recall(real, real)) == (1.0, 1.0)
    with pytest.raises(InputError, match=r"3 images for precision_recall \(generated\)"):
        precision_recall(real, generated[:3])


def _random_features(count: int, seed: int) -> InceptionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return InceptionFeatures(
        torch.rand(count, POOL_CHANNELS, generator=generator),
        torch.rand(count, SPATIAL_CHANNELS, generator=generator),
        torch.randn(count, CLASSES, generator=generator),
    )


def _add(sums: ImageSums, features: InceptionFeatures, rows: slice) -> None:
    sums.add_features(InceptionFeatures(*(tensor[rows] for tensor in features)), rows.start)


def test_uneven_shares_join_to_the_whole() -> None:
    """One rank has most images, one a few, one none; one addition of equal shapes joins them."""
    features = _random_features(60, 0)
    whole = ImageSums(evaluation.OF_INCEPTION, 60)
    _add(whole, features, slice(0, 60))
    ranks = [ImageSums(evaluation.OF_INCEPTION, 60) for _ in range(3)]
    _add(ranks[0], features, slice(0, 40))
    _add(ranks[0], features, slice(40, 57))
    _add(ranks[2], features, slice(57, 60))
    shapes = [[tensor.shape for tensor in rank.tensors()] for rank in ranks]
    assert shapes[0] == shapes[1] == shapes[2]
    for rank in ranks[1:]:
        merge(ranks[0], rank)
    for ours, expected in zip(ranks[0].tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-9)


def test_rows_that_no_rank_filled_do_not_count() -> None:
    rows = FeatureRows(6, 2)
    rows.add(torch.ones(2, 2), 1)
    rows.add(torch.zeros(1, 2), 4)
    assert rows.features().tolist() == [[1, 1], [1, 1], [0, 0]]


def test_all_metrics_of_one_pass() -> None:
    """The numbers under their names, against the same formulas on the raw features."""
    generated, real = _random_features(1100, 1), _random_features(60, 2)
    wanted = {Metric.inception_score, Metric.precision_recall}
    sums = ImageSums(wanted, 1100)
    _add(sums, generated, slice(0, 1100))
    found = evaluation.values(sums, RealImages(features=real.pool))
    expected = precision_recall(real.pool, generated.pool)
    score = _score_by_definition(generated.logits.double().numpy())
    assert found.keys() == {"inception_score", "inception_score_std", "precision", "recall"}
    assert found["inception_score"] == pytest.approx(score, rel=1e-9)
    assert (found["precision"], found["recall"]) == expected


def test_distances_are_of_their_own_features() -> None:
    """FID of the pooled features and sFID of the spatial ones, which here have few channels."""
    drawn = [_features(40, channels, seed) for seed, channels in enumerate((6, 5))]
    real = [_moments(_features(50, channels, 7)).gaussian("real") for channels in (6, 5)]
    sums = ImageSums({Metric.fid, Metric.sfid}, 40)
    sums.pool, sums.spatial = FeatureMoments(6), FeatureMoments(5)
    _add(sums, InceptionFeatures(drawn[0], drawn[1], torch.empty(40, 0)), slice(0, 40))
    expected = [
        frechet_distance(_moments(ours).gaussian(""), theirs)
        for ours, theirs in zip(drawn, real, strict=True)
    ]
    found = evaluation.values(sums, RealImages(real[0], real[1]))
    assert found == pytest.approx({"fid": expected[0], "sfid": expected[1]}, rel=1e-9)


@pytest.mark.parametrize("metric", [Metric.inception_score, Metric.precision_recall])
def test_features_that_are_not_finite_give_no_number(metric: Metric) -> None:
    features = _random_features(1100, 0)
    for tensor in features:
        tensor[7, 3] = math.nan
    sums = ImageSums({metric}, 1100)
    _add(sums, features, slice(0, 1100))
    with pytest.raises(InputError, match=r"= nan[\s\S]*finite features"):
        evaluation.values(sums, RealImages(features=torch.ones(10, POOL_CHANNELS)))


def test_obstacles_say_what_to_give() -> None:
    def problem(metric: Metric, **changes: Any) -> str:
        given: dict[str, Any] = {"images": 5000, "reference": None, "prompts": False}
        found = obstacle(metric, **{**given, "held_out": False, **changes})
        return "" if found is None else str(found)

    assert "--held-out SHARDS" in problem(Metric.held_out_loss)
    assert problem(Metric.held_out_loss, held_out=True, images=0) == ""
    assert "--images" in problem(Metric.inception_score, images=0)
    assert "captions of the images" in problem(Metric.clip_score)
    assert problem(Metric.clip_score, prompts=True, images=1) == ""
    assert "--reference FOLDER" in problem(Metric.fid)
    pool = Gaussian(torch.zeros(1), torch.zeros(1, 1))
    stored = Reference("s.npz", "", None, pool)
    assert problem(Metric.fid, reference=stored) == ""
    assert "at least 2049" in problem(Metric.fid, reference=stored, images=2048)
    assert "statistics of it in s.npz" in problem(Metric.sfid, reference=stored)
    assert "at least 1008" in problem(Metric.inception_score, images=1007)
