"""Statistics of latents: streamed and merged equal the whole, files know their encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.encoders.statistics import (
    LatentStatistics,
    StatisticsIdentity,
    StatisticsSource,
    load_shares,
    load_statistics,
    save_statistics,
)
from dsr_scale.encoders.whitening import EPSILON, Whitening

IDENTITY = StatisticsIdentity("owner/encoder", "a1b2c3", 256, "registers shared 0123")


def _latents(count: int = 103) -> torch.Tensor:
    """Far from zero, where a sum of squares in float32 would lose every digit of the variance."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 5, 3, 4, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.01, 3, 60).reshape(5, 3, 4) + 1e4


def _stream(batches: list[torch.Tensor]) -> LatentStatistics:
    total = LatentStatistics.of(batches[0])
    for batch in batches[1:]:
        total = total.merge(LatentStatistics.of(batch))
    return total


def _assert_equal(ours: LatentStatistics, latents: torch.Tensor) -> None:
    assert ours.count == len(latents)
    torch.testing.assert_close(ours.mean, latents.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        ours.variance, latents.var(dim=0, correction=0), rtol=1e-9, atol=1e-14
    )


def test_streamed_equals_whole() -> None:
    latents = _latents()
    for sizes in ([103], [1] * 103, [50, 1, 52], [7] * 14 + [5]):
        _assert_equal(_stream(list(latents.split(sizes))), latents)


def test_merged_equals_whole_in_any_order_and_through_files(tmp_path: Path) -> None:
    latents = _latents()
    shares = [_stream(list(share.split(9))) for share in latents.split([60, 13, 30])]
    _assert_equal(shares[2].merge(shares[0]).merge(shares[1]), latents)
    _assert_equal(shares[0].merge(shares[1].merge(shares[2])), latents)
    for number, share in enumerate(shares):
        save_statistics(tmp_path / f"{number}.safetensors", share, IDENTITY)
    loaded = [load_statistics(tmp_path / f"{number}.safetensors", IDENTITY) for number in range(3)]
    _assert_equal(loaded[0].merge(loaded[1]).merge(loaded[2]), latents)


def test_shapes_do_not_mix() -> None:
    with pytest.raises(InputError, match="latents of one shape"):
        LatentStatistics.of(torch.zeros(2, 3, 4, 4)).merge(
            LatentStatistics.of(torch.zeros(2, 3, 4, 5))
        )


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, encoder="owner/other"),
        replace(IDENTITY, revision=None),
        replace(IDENTITY, resolution=512),
        replace(IDENTITY, treatment="registers shared 4567"),
        replace(IDENTITY, treatment="none"),
    ],
)
def test_statistics_of_another_encoder_are_refused(
    tmp_path: Path, other: StatisticsIdentity
) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, LatentStatistics.of(_latents(4)), IDENTITY)
    load_statistics(path, IDENTITY)
    with pytest.raises(InputError, match="compute the statistics for this encoder"):
        load_statistics(path, other)


def test_a_refusal_names_both_treatments(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    untreated = replace(IDENTITY, treatment="none")
    save_statistics(path, LatentStatistics.of(_latents(4)), untreated)
    with pytest.raises(InputError) as refused:
        load_statistics(path, IDENTITY)
    assert "'treatment': 'none'" in refused.value.found
    assert "'treatment': 'registers shared 0123'" in refused.value.required


def test_files_that_name_no_treatment_are_of_the_untreated_encoder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "statistics.safetensors"
    metadata = {"encoder": "owner/encoder", "revision": "a1b2c3", "resolution": "256", "count": "2"}
    save_file({"mean": torch.zeros(1, 2, 2), "variance": torch.ones(1, 2, 2)}, path, metadata)
    assert load_statistics(path, replace(IDENTITY, treatment="none")).count == 2
    with pytest.raises(InputError, match="registers shared 0123"):
        load_statistics(path, IDENTITY)


def _save_shares(folder: Path, latents: torch.Tensor, shares: int = 3) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(shares)]
    for number, part in enumerate(latents.tensor_split(shares)):
        source = StatisticsSource("set", f"{number}", number, shares)
        save_statistics(paths[number], LatentStatistics.of(part), IDENTITY, source)
    return paths


def test_shares_are_loaded_by_number_and_merge_to_the_whole(tmp_path: Path) -> None:
    latents = _latents()
    paths = _save_shares(tmp_path, latents)
    shares = load_shares([paths[2], paths[0], paths[1]], IDENTITY)
    assert [source.fingerprint for _, source in shares] == ["0", "1", "2"]
    parts = [statistics for statistics, _ in shares]
    _assert_equal(parts[0].merge(parts[1]).merge(parts[2]), latents)


def test_one_share_is_refused_as_statistics_of_the_whole(tmp_path: Path) -> None:
    paths = _save_shares(tmp_path, _latents())
    with pytest.raises(InputError, match="share 1/3") as refused:
        load_statistics(paths[1], IDENTITY)
    assert "--merge" in refused.value.remedy


def test_shares_merge_only_complete_and_once(tmp_path: Path) -> None:
    paths = _save_shares(tmp_path, _latents())
    with pytest.raises(InputError, match="required: also 0/3, 2/3"):
        load_shares(paths[1:2], IDENTITY)
    with pytest.raises(InputError, match="found: share 1/3 in"):
        load_shares([*paths, paths[1]], IDENTITY)
    with pytest.raises(InputError, match="no files to merge"):
        load_shares([], IDENTITY)


def test_shares_of_another_set_or_encoder_do_not_merge(tmp_path: Path) -> None:
    paths = _save_shares(tmp_path, _latents())
    part = LatentStatistics.of(_latents(4))
    for source in (StatisticsSource("other", "2", 2, 3), StatisticsSource("set", "2", 2, 4)):
        save_statistics(paths[2], part, IDENTITY, source)
        with pytest.raises(InputError, match="shares of one data set, cut the same way"):
            load_shares(paths, IDENTITY)
    untreated = replace(IDENTITY, treatment="none")
    save_statistics(paths[2], part, untreated, StatisticsSource("set", "2", 2, 3))
    with pytest.raises(InputError, match="'treatment': 'none'"):
        load_shares(paths, IDENTITY)
    save_statistics(paths[2], part, IDENTITY)
    with pytest.raises(InputError, match="without data_set, fingerprint, share, shares"):
        load_shares(paths, IDENTITY)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "statistics.safetensors"
    with pytest.raises(InputError, match="could not be read"):
        load_statistics(path, IDENTITY)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="could not be read"):
        load_statistics(path, IDENTITY)
    save_file({"mean": torch.zeros(1, 2, 2)}, path)
    with pytest.raises(InputError, match="required: tensors mean and variance"):
        load_statistics(path, IDENTITY)


def test_whitened_latents_are_standard_and_come_back() -> None:
    latents = _latents().float()
    statistics = LatentStatistics.of(latents)
    whitening = Whitening(statistics.mean, statistics.variance, torch.device("cpu"))
    whitened = whitening.apply(latents)
    by_hand = (latents.double() - statistics.mean) / (statistics.variance + EPSILON).sqrt()
    # Latents near 1e4 with a deviation of 0.01: float32 leaves one digit after the point there.
    torch.testing.assert_close(whitened.double(), by_hand, rtol=0, atol=0.1)
    torch.testing.assert_close(whitened[:, 1:].double(), by_hand[:, 1:], rtol=0, atol=2e-3)
    torch.testing.assert_close(whitening.undo(whitened), latents, rtol=2e-7, atol=0)


def test_another_grid_is_whitened_and_comes_back() -> None:
    rows = torch.arange(4.0).reshape(1, 4, 1).expand(2, 4, 4)
    whitening = Whitening(rows, 1 + rows, torch.device("cpu"))
    latents = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    # Statistics that do not vary along the width stay what they are when it is stretched.
    expected = (latents - rows[:, :, :1]) / (1 + rows[:, :, :1] + EPSILON).sqrt()
    torch.testing.assert_close(whitening.apply(latents), expected)
    torch.testing.assert_close(whitening.undo(whitening.apply(latents)), latents)
