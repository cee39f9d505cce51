"""Statistics of latents: streamed and merged equal the whole, files know their encoder."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.load import load_run
from dsr_scale.data.loader import open_samples
from dsr_scale.data.transforms import cover_and_crop, decode_rgb
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.statistics import (
    LatentStatistics,
    StatisticsIdentity,
    load_statistics,
    save_statistics,
)
from dsr_scale.encoders.whitening import EPSILON, Whitening

IDENTITY = StatisticsIdentity("owner/encoder", "a1b2c3", 256)


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
        StatisticsIdentity("owner/other", "a1b2c3", 256),
        StatisticsIdentity("owner/encoder", None, 256),
        StatisticsIdentity("owner/encoder", "a1b2c3", 512),
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


def test_the_lines_in_the_documentation_compute_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/encoders.md, run on a small ViT and the shipped pack, whitens what training will see."""
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    start = page.index("    from pathlib import Path\n")
    end = page.index("\n## ", start)
    lines = textwrap.dedent(page[start:end])

    declare_torchvision_operators()
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32
    )
    vit = tmp_path / "vit"
    transformers.Dinov2Model(config).save_pretrained(vit)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (vit / "preprocessor_config.json").write_text(json.dumps(processor))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "name: t\ndirectory: d\n"
        "data: {shards: 'package:emoji', max_samples: 70, resolution: 32}\n"
        f"encoders: {{image: {{kind: vit, model: '{vit}', name: owner/vit, channels: 8, patch: 8,\n"
        "  input_size: 32, statistics: made/statistics.safetensors}}\n"
        "model: {width: 64, depth: 2, heads: 4}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "configs/published/dit_xl.yaml" in lines
    exec(compile(lines.replace("configs/published/dit_xl.yaml", str(run_file)), "docs", "exec"), {})

    run = load_run(run_file)
    encoder = build_image_encoder(run.encoders.image, resolution=32, device="cpu")
    samples = open_samples(run.data)
    pixels = [
        cover_and_crop(decode_rgb(samples.read(i).image, (255, 255, 255)), (32, 32))
        for i in range(70)
    ]
    latents = encoder.encode(torch.from_numpy(np.stack(pixels))).double()
    zeros = torch.zeros(8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(latents.mean(dim=0), zeros, rtol=0, atol=1e-3)
    variance = latents.var(dim=0, correction=0)
    torch.testing.assert_close(variance, zeros + 1, rtol=0, atol=5e-2)
