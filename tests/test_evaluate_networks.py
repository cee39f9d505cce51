"""Inception and CLIP as they judge images: against the libraries themselves, and without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import save_random_inception, save_tiny_clip
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.clip_score import ClipScorer, ClipSums
from dsr_scale.evaluate.inception import (
    SPATIAL_CHANNELS,
    WEIGHTS_NAME,
    Inception,
    find_weights,
)
from dsr_scale.evaluate.metrics import ImageSums, Metric, Scorers, merge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights as the library saves them."""
    pytest.importorskip("torch_fidelity")
    return save_random_inception(tmp_path_factory.mktemp("inception") / WEIGHTS_NAME)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP as save_pretrained writes it."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def _pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_inception_is_the_library_and_spatial_features_are_those_of_adm(
    inception_file: Path,
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = _pictures(2, 40, 40)
    ours = Inception(inception_file, CPU)(images)
    network: Any = FeatureExtractorInceptionV3(
        "library", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    pool, logits = network(images)
    torch.testing.assert_close(ours.pool, pool)
    torch.testing.assert_close(ours.logits, logits)
    assert pool.std() > 1e-3

    # Written out: what enters TensorFlow's mixed_6, and its 1×1 convolution, in ADM's order.
    block = network.Mixed_6d
    entered: list[Tensor] = []
    block.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    network(images)
    (x,) = entered
    convolution, norm = block.branch1x1.conv, block.branch1x1.bn
    y = torch.einsum("oi,bihw->bhwo", convolution.weight[:7, :, 0, 0], x)
    scale = norm.weight[:7] / (norm.running_var[:7] + 0.001).sqrt()
    y = ((y - norm.running_mean[:7]) * scale + norm.bias[:7]).clamp(min=0)
    assert y.shape == (2, 17, 17, 7)
    torch.testing.assert_close(ours.spatial, y.reshape(2, SPATIAL_CHANNELS), rtol=1e-4, atol=1e-5)
    assert y.std() > 1e-3


def test_inception_weights_that_are_missing_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as missing:
        find_weights(None)
    cached = tmp_path / "checkpoints" / WEIGHTS_NAME
    for part in ("https://github.com/toshas/torch-fidelity/releases", str(cached)):
        assert part in missing.value.remedy
    cached.parent.mkdir()
    torch.save({"fc.weight": torch.zeros(3)}, cached)
    assert find_weights(None) == cached
    pytest.importorskip("torch_fidelity")
    with pytest.raises(InputError, match="does not fit Inception"):
        Inception(cached, CPU)
    cached.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="does not fit Inception"):
        Inception(cached, CPU)


def test_a_weights_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    told = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (eval, (f"open({str(told)!r}, 'w')",))

    torch.save({"fc.weight": Code()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="does not fit Inception"):
        Inception(tmp_path / "weights.pth", CPU)
    assert not told.exists()


def test_clip_score_is_that_of_transformers(clip_directory: Path) -> None:
    import transformers

    prompts = ["a red cat", "two dog on the bus in the blue photo", "bus"]
    images = _pictures(3, 20, 24)
    model = transformers.CLIPModel.from_pretrained(clip_directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_directory)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_directory)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):  # one by one: no padding
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        tokens = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            read = model.text_projection(model.text_model(tokens["input_ids"]).pooler_output)[0]
        cosine = float(seen @ read / (seen.norm() * read.norm()))
        expected.append(100 * max(cosine, 0.0))
    scorer = ClipScorer(str(clip_directory), CPU)
    scores = scorer.scores(images, prompts)
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert any(scores > 0.1)
    whole, first, second = ClipSums(), ClipSums(), ClipSums()
    whole.add(scores)
    first.add(scores[:1])
    second.add(scores[1:])
    merge(first, second)
    assert first.mean() == pytest.approx(whole.mean()) == pytest.approx(np.mean(expected), abs=1e-3)
    long = scorer.scores(images[:1], ["the cat " * 50])
    assert long.isfinite().all()


def test_clip_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without config\.json"):
        ClipScorer(str(tmp_path), CPU)


def test_images_are_judged_by_their_own_networks(
    inception_file: Path, clip_directory: Path
) -> None:
    """`add` gives each metric the features it is defined by, and CLIP the prompts of those images."""
    images = _pictures(4, 12, 12)
    prompts = ["a cat", "a dog", "a bus", "red"]
    scorers = Scorers(Inception(inception_file, CPU), ClipScorer(str(clip_directory), CPU))
    assert scorers.inception is not None and scorers.clip is not None
    sums = ImageSums({Metric.fid, Metric.precision_recall, Metric.clip_score}, 4)
    sums.add(scorers, images[:3], 0, prompts[:3])
    sums.add(scorers, images[3:], 3, prompts[3:])
    pool = scorers.inception(images).pool
    assert sums.pool is not None and sums.rows is not None and sums.clip is not None
    torch.testing.assert_close(sums.pool.total, pool.double().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.rows.features(), pool, rtol=1e-4, atol=1e-4)
    expected = scorers.clip.scores(images, prompts).mean()
    assert sums.clip.mean() == pytest.approx(float(expected), rel=1e-4)
