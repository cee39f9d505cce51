"""Outlier statistics against loops over plain numbers."""

from __future__ import annotations

import itertools
import math

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
    lower_median,
    noise,
    ordinary_tokens,
)

from dsr_scale.evaluate.outlier_statistics import (
    HISTOGRAM_EDGES,
    RidgeProbe,
    block_statistics,
    border_enrichment,
    norm_histogram,
    outlier_masks,
    position_consistency,
    principal_components,
)


def expected_ratios(norms: np.ndarray, registers: np.ndarray) -> dict[str, float]:
    median = lower_median(norms)
    spread = lower_median(np.abs(norms - median))
    robust = (norms > median + 6 * 1.4826 * spread) & (norms > 2 * median)
    return {
        "outlier_ratio": float(robust.mean()),
        "max_over_median": norms.max() / median,
        "top_over_median": norms.max() / median,  # 0.2 % of 24 tokens is one
        "register_over_median": registers.max() / median,
    }


def test_norm_statistics_are_those_of_loops() -> None:
    tokens = ordinary_tokens()
    tokens[0, REGISTERS + 5] *= 9
    tokens[1, REGISTERS + 7] *= 2.2
    tokens[2, :, 4] += 60
    found = block_statistics(tokens, ROWS, GRID, threshold=20)
    for image, of_image in enumerate(tokens):
        norms, registers = expected_norms(of_image)
        for name, value in expected_ratios(norms, registers).items():
            assert found.values[name][image] == pytest.approx(value, rel=1e-4), name
        rest = expected_norms(of_image, without=3)
        for name, value in expected_ratios(*rest).items():
            measured = found.values[f"{name}_without_channels"][image]
            assert measured == pytest.approx(value, rel=1e-4), name
        np.testing.assert_allclose(found.norms_without_channels[image], rest[0], rtol=1e-5)
        share = 1 - (rest[0] ** 2).sum() / (norms**2).sum()
        assert found.values["channel_energy_share"][image] == pytest.approx(share, rel=1e-4)
        assert found.values["outlier_ratio_absolute"][image] == pytest.approx((norms > 20).mean())
        assert found.values["outlier_ratio_median"][image] == pytest.approx(
            (norms > 3 * lower_median(norms)).mean()
        )
        sigma = norms > norms.mean() + 3 * norms.std()
        assert found.values["outlier_ratio_sigma"][image] == pytest.approx(sigma.mean())
    assert found.outlying.nonzero().tolist() == [[0, 5]]
    assert found.values["register_over_median"][0] > 5


def test_one_large_channel_hides_tokens_that_stand_out_without_it() -> None:
    tokens = ordinary_tokens()
    tokens[:, REGISTERS + 2] *= 6
    tokens[:, :, 3] = 1e4
    values = block_statistics(tokens, ROWS, GRID, threshold=100).values
    assert values["outlier_ratio"].tolist() == [0] * 3
    assert values["outlier_ratio_absolute"].tolist() == [1] * 3
    assert values["outlier_ratio_without_channels"].tolist() == pytest.approx([1 / TOKENS] * 3)
    assert values["channel_energy_share"].min() > 0.999
    # In float32, 1e8 less the large square would have left nothing of norms about 4.
    norms, _ = expected_norms(tokens[0], without=3)
    expected = norms.max() / lower_median(norms)
    assert values["max_over_median_without_channels"][0] == pytest.approx(expected, rel=1e-5)


def test_a_massive_activation_of_one_token_is_gone_without_its_channels() -> None:
    tokens = ordinary_tokens()
    tokens[:, REGISTERS + 2, :2] = torch.tensor([500.0, -700.0])
    found = block_statistics(tokens, ROWS, GRID, threshold=100)
    assert found.outlying.nonzero().tolist() == [[image, 2] for image in range(3)]
    assert found.values["outlier_ratio_without_channels"].tolist() == [0] * 3
    assert all({0, 1} <= set(channels.tolist()) for channels in found.channels)


def test_the_robust_rule_needs_twice_the_median_and_the_rule_by_deviation_does_not() -> None:
    norms = torch.linspace(9.9, 10.1, 25)[None].clone()
    norms[0, 3] = 12
    found = {name: int(mask.sum()) for name, mask in outlier_masks(norms, 100).items()}
    assert found == {
        "outlier_ratio": 0,
        "outlier_ratio_mad": 1,
        "outlier_ratio_sigma": 1,
        "outlier_ratio_median": 0,
        "outlier_ratio_absolute": 0,
    }


def test_cosines_with_neighbours_are_those_of_a_loop() -> None:
    tokens = ordinary_tokens(2)
    tokens[0, REGISTERS + 8] *= 9
    found = block_statistics(tokens, ROWS, GRID, threshold=100).values
    rows, columns = GRID
    for image in range(2):
        field = tokens[image, REGISTERS:].double().reshape(rows, columns, WIDTH)
        sums: dict[bool, list[float]] = {True: [], False: []}
        for y, x in itertools.product(range(rows), range(columns)):
            beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            cosines = [
                float(field[y, x] @ field[b, a] / field[y, x].norm() / field[b, a].norm())
                for b, a in beside
                if 0 <= b < rows and 0 <= a < columns
            ]
            sums[image == 0 and (y, x) == (1, 2)].append(sum(cosines) / len(cosines))
        normal = sum(sums[False]) / len(sums[False])
        assert found["neighbour_cosine_normal"][image] == pytest.approx(normal, abs=1e-6)
        if image == 0:
            assert found["neighbour_cosine_outliers"][0] == pytest.approx(sums[True][0], abs=1e-6)
        else:
            assert found["neighbour_cosine_outliers"][1].isnan()


def test_position_consistency_is_the_share_of_pairs_of_images() -> None:
    outlying = noise(7, TOKENS, seed=4) > 1
    outlying[:, 9] = True
    repeats, chances, pairs = 0, 0.0, 0
    for first, second in itertools.permutations(range(7), 2):
        for token in outlying[first].nonzero().flatten().tolist():
            repeats += int(outlying[second, token])
            chances += float(outlying[second].float().mean())
            pairs += 1
    repeat, chance = position_consistency(outlying.sum(0), outlying.sum(1))
    assert repeat == pytest.approx(repeats / pairs)
    assert chance == pytest.approx(chances / pairs)


def test_a_planted_position_repeats_always_and_no_outliers_have_no_place() -> None:
    fixed = torch.zeros(5, TOKENS, dtype=torch.bool)
    fixed[:, 9] = True
    assert position_consistency(fixed.sum(0), fixed.sum(1)) == pytest.approx((1, 1 / TOKENS))
    none = torch.zeros(5, TOKENS, dtype=torch.bool)
    assert all(map(math.isnan, position_consistency(none.sum(0), none.sum(1))))


def test_border_enrichment() -> None:
    counts = torch.zeros(GRID)
    counts[0, 3] = 3
    counts[2, 2] = 1
    assert border_enrichment(counts) == pytest.approx((3 / 4) / (16 / 24))
    assert border_enrichment(torch.ones(GRID)) == pytest.approx(1)


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    tokens = noise(2, TOKENS, WIDTH) * torch.linspace(1, 5, WIDTH)
    scores = principal_components(tokens)
    for image in range(2):
        plain = tokens[image].double().numpy()
        left, values, _ = np.linalg.svd(plain - plain.mean(axis=0), full_matrices=False)
        expected = left[:, :3] * values[:3]
        expected *= np.sign(np.take_along_axis(expected, np.abs(expected).argmax(0)[None], 0))
        np.testing.assert_allclose(scores[image].numpy(), expected, atol=1e-4)


def test_histograms_are_those_of_numpy_and_their_ends_are_open() -> None:
    norms = noise(2, 500).exp() * 3
    norms[0, :2] = torch.tensor([1e-6, 1e9])
    counts = norm_histogram(norms, torch.tensor([3.0, 4.0]))
    ratios = (norms / torch.tensor([[3.0], [4.0]])).numpy().ravel()
    edges = HISTOGRAM_EDGES.numpy().copy()
    edges[[0, -1]] = 0, np.inf
    np.testing.assert_array_equal(counts.numpy(), np.histogram(ratios, edges)[0])


def test_tokens_of_nothing_are_in_no_bin() -> None:
    """A network that was never trained puts out zeros: no median to compare with, and no outlier."""
    norms = torch.stack([torch.zeros(TOKENS), torch.ones(TOKENS)])
    counts = norm_histogram(norms, norms.median(1).values)
    assert counts.sum() == TOKENS and counts[-1] == 0


def test_the_ridge_probe_is_least_squares_with_a_penalty() -> None:
    tokens, targets = noise(90, WIDTH) * 7 + 2, noise(90, 5, seed=1)
    targets += tokens[:, :5]
    outlying = torch.arange(90) % 9 == 0
    probe = RidgeProbe(WIDTH, 5, torch.device("cpu"))
    probe.fit(tokens[:20], targets[:20])
    probe.fit(tokens[20:60], targets[20:60])
    for part in (slice(60, 70), slice(70, 90)):
        probe.test(tokens[part], targets[part], outlying[part])

    x = tokens.double().numpy()
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True))
    x = np.concatenate([x, np.ones((90, 1))], axis=1)
    y = targets.double().numpy()
    penalty = np.diag([math.sqrt(60 * 0.01)] * WIDTH + [0.0])
    augmented = np.concatenate([x[:60], penalty]), np.concatenate([y[:60], np.zeros((17, 5))])
    solved = np.linalg.lstsq(*augmented, rcond=None)[0]
    for found, group in zip(probe.r_squared(), (outlying, ~outlying), strict=True):
        chosen = group.numpy() & (np.arange(90) >= 60)
        error = ((y[chosen] - x[chosen] @ solved) ** 2).sum()
        around = ((y[chosen] - y[:60].mean(axis=0)) ** 2).sum()
        assert found == pytest.approx(1 - error / around, abs=1e-9)
