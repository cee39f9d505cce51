"""The demonstration's parts: who is held out, the toy encoder's arithmetic, stages, and its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision_transformers import random_images
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.config.derive import VitGeometry
from dsr_scale.config.encoders import VitImage
from dsr_scale.config.load import load_run
from dsr_scale.data.loader import open_samples
from dsr_scale.encoders.vit import VitEncoder
from tools import emoji_split
from tools.comparison.table import Comparison
from tools.demo import results
from tools.demo.reconstruction import psnr_db
from tools.demo.stages import Stages
from tools.demonstration import CONFIGS
from tools.emoji_split import family, is_held_out, split
from tools.train_toy_encoder import Settings, normalised, retrieval, save, towers_of, train

GEOMETRY = VitGeometry(channels=16, patch=5, input_size=20)
SMALL = Settings(depth=2, heads=2, steps=40, batch_images=6, learning_rate=5e-3)


def caption_vectors(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return functional.normalize(torch.randn(count, 12, generator=generator), dim=-1)


def test_skin_tones_and_genders_are_one_family_and_other_emoji_are_not() -> None:
    # Woman cook with medium-light skin, man cook, cook.
    cooks = {"1F469-1F3FC-200D-1F373", "1F468-200D-1F373", "1F9D1-200D-1F373"}
    assert len({family(code) for code in cooks}) == 1
    # Woman detective with and without skin tone, detective.
    detectives = {"1F575-1F3FC-200D-2640-FE0F", "1F575-FE0F-200D-2640-FE0F", "1F575-FE0F"}
    assert {family(code) for code in detectives} == {"1F575"}
    assert len({family(code) for code in ("1F468", "1F469", "1F9D1", "1F373", "1F1F1-1F1FE")}) == 5


def test_packs_divide_the_emoji_by_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_samples(DataConfig(shards="package:emoji", resolution=64))
    codes = [str(whole.read(number).metadata["hexcode"]) for number in range(len(whole))]
    unseen = {family(code) for code in codes if is_held_out(code)}
    assert unseen and not unseen & {family(code) for code in codes if not is_held_out(code)}
    assert 0.05 < sum(map(is_held_out, codes)) / len(codes) < 0.15

    class First(list[Any]):
        """The first emoji: packing all takes seconds."""

        def read(self, number: int) -> Any:
            return self[number]

    first = First(whole.read(number) for number in range(60))
    monkeypatch.setattr(emoji_split, "open_samples", lambda _data: first)
    counts = split(tmp_path)
    expected = {
        "train": [one for one in first if not is_held_out(one.metadata["hexcode"])],
        "held_out": [one for one in first if is_held_out(one.metadata["hexcode"])],
    }
    for part, samples in expected.items():
        packed = open_samples(DataConfig(shards=str(tmp_path / part), resolution=64))
        assert len(packed) == counts[part] == len(samples) > 0
        for number, sample in enumerate(samples):
            found = packed.read(number)
            assert found.image == sample.image
            assert [c.text for c in found.captions] == [c.text for c in sample.captions]
    before = (tmp_path / "train" / "manifest.json").stat().st_mtime_ns
    assert split(tmp_path) == counts
    assert (tmp_path / "train" / "manifest.json").stat().st_mtime_ns == before


def test_the_encoder_s_loss_and_retrieval_are_those_of_loops_over_pairs() -> None:
    images, vectors = random_images(6), caption_vectors(6)
    towers, losses = train(images, vectors, GEOMETRY, SMALL)
    assert len(losses) == SMALL.steps
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    with torch.no_grad():
        pooled = towers.image(pixel_values=normalised(images)).pooler_output
        texts = towers.text(vectors)
        total, right = 0.0, 0
        for i, image in enumerate(pooled):
            cosines = [float(torch.cosine_similarity(image, text, dim=0)) for text in texts]
            right += cosines.index(max(cosines)) == i
            for j, cosine in enumerate(cosines):
                logit = cosine * math.exp(float(towers.log_scale)) + float(towers.bias)
                total += math.log1p(math.exp(-logit if i == j else logit))
        assert float(towers.loss(normalised(images), vectors)) == pytest.approx(total / 6, rel=1e-4)
    assert retrieval(towers, images, vectors)["top_1"] == pytest.approx(right / 6)


def test_training_images_are_moved_over_white() -> None:
    images = random_images(2)
    down, left = 3, -2
    moved = normalised(images, torch.tensor([[0, 0], [down, left]]))
    plain = images.float() / 127.5 - 1
    torch.testing.assert_close(moved[0], plain[0])
    # Looking 3 pixels further down and 2 further left.
    torch.testing.assert_close(moved[1, :, :-down, -left:], plain[1, :, down:, :left])
    assert (moved[1, :, -down:] == 1).all() and (moved[1, :, :, :-left] == 1).all()


def test_a_run_reads_the_encoder_that_was_trained(tmp_path: Path) -> None:
    images = random_images(6)
    towers, _ = train(images, caption_vectors(6), GEOMETRY, Settings(depth=2, heads=2, steps=3))
    save(towers, tmp_path / "vit", {"note": "made by a test"})
    config = VitImage(model=str(tmp_path / "vit"), channels=16, patch=5, input_size=20)
    encoder = VitEncoder(config, resolution=20, device=torch.device("cpu"))
    latents = encoder.encode(images)
    with torch.no_grad():
        tokens = towers.image(pixel_values=normalised(images), output_hidden_states=True)
        last = functional.layer_norm(tokens.hidden_states[-1], (16,), eps=1e-6)
    torch.testing.assert_close(latents.flatten(2).mT, last, atol=1e-4, rtol=1e-4)


def test_only_a_transformer_of_the_image_s_size_is_trained() -> None:
    run = load_run(CONFIGS / "baseline.yaml")
    image, text = towers_of(run)
    assert (image.channels, text.channels) == (96, 384)
    with pytest.raises(InputError, match="input_size"):
        towers_of(load_run(CONFIGS / "baseline.yaml", ["data.resolution=128"]))
    with pytest.raises(InputError, match="pixels"):
        towers_of(load_run(CONFIGS / "baseline.yaml", ["encoders.image={kind: pixels, patch: 8}"]))


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    image = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    other = image.clone()
    other[0] += 5
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 * 48)]
    assert psnr_db(image, other).tolist() == pytest.approx(expected)


def test_stages_are_done_once_and_under_one_setting(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        stages = Stages(tmp_path, {"steps": (1, 2)})
        assert stages.run("first", lambda: calls.append(1) or {"a": (1,)}) == {"a": [1]}

    def broken() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        stages.run("second", broken)
    assert calls == [1] and list(Stages(tmp_path, {"steps": [1, 2]}).minutes) == ["first"]
    with pytest.raises(InputError, match="other settings"):
        Stages(tmp_path, {"steps": [1, 3]})


def made_results(differences: tuple[float, float]) -> dict[str, Any]:
    """Of a run that never was: two seeds, the second arm's loss off by these."""
    records = []
    for seed, difference in enumerate(differences):
        for arm, more in (("baseline", 0.0), ("dsr", difference)):
            metrics = {"held_out_loss": 3.25 + seed + more, "parameters": 1234567.0}
            records.append({"variant": arm, "seed": seed, "metrics": metrics})
    sides = [
        {
            "treatment": treatment,
            "summary": {"outlier_ratio_largest": ratio},
            "outlier_ratio_by_block": [0.0, ratio, 0.0],
            "max_over_median_by_block": [1.5, 8.25, 1.0],
        }
        for treatment, ratio in (("none", 0.0123), ("registers", 0.0045))
    ]
    retrieved = {"images": 348, "top_1": 0.125, "top_5": 0.375, "chance_top_1": 1 / 348}
    return {
        "arms": ["baseline", "dsr"],
        "sizes": {
            "seeds": 2,
            "steps": 900,
            "images": 256,
            "decoder_steps": 600,
            "outlier_images": 64,
            "prompts": 8,
        },
        "emoji": {"train": 3026, "held_out": 348},
        "encoder": {"parameters": 765432, "minutes": 4.56, "retrieval_held_out": retrieved},
        "register_search": {"forced_on": None, "file": {"neurons": {"3": [1, 2], "4": [7]}}},
        "latents": {
            "deviation_plain": 0.91,
            "deviation_treated": 0.92,
            "mean_moved_in_deviations": 0.04,
        },
        "encoder_outliers": sides,
        "decoders": {
            f"{arm}-{seed}": {"psnr_db": 20.5 + seed, "psnr_db_of_mean_image": 11.75}
            for arm in ("baseline", "dsr")
            for seed in (0, 1)
        },
        "failures": {},
        "comparison": {
            "variants": ["baseline", "dsr"],
            "metrics": Comparison.of(records, ["baseline", "dsr"]).to_json(),
        },
        "minutes": {"emoji": 0.25, "encoder": 4.75},
        "environment": {
            "cpu": "a CPU",
            "cores": 2,
            "python": "3.11",
            "versions": {"torch": "2.13"},
        },
    }


def test_the_page_has_the_run_s_numbers_and_says_only_what_they_bear() -> None:
    # Through a file, as the driver hands them over.
    found = json.loads(json.dumps(made_results((-0.5, -0.501))))
    page = results.page_text(found)
    assert not re.search(r"\$[a-z]", page)
    for number in (
        "3026",
        "12.5%",
        "1.23%",
        "8.25",
        "21.50",
        "11.75",
        "3.25",
        "1,234,567",
        "5.0 minutes",
    ):
        assert number in page, number
    assert "1.23% untreated and 0.45%" in page
    # A mean of −0.5005 with an error of 0.0005.
    assert "-0.5, -0.501 by seed; a 95 % interval excludes 0" in page
    assert "found 3 register neurons, in blocks 3, 4" in page

    unsure = results.page_text(made_results((-0.5, -0.1)))
    assert "-0.5, -0.1 by seed; this cannot be told from no difference" in unsure
    clean = made_results((0.0, 0.0))
    for side in clean["encoder_outliers"]:
        side["summary"]["outlier_ratio_largest"] = 0.0
    clean["register_search"]["forced_on"] = "all patches"
    clean["failures"] = {"dsr, seed 1": "out of memory"}
    text = results.page_text(clean)
    assert "no outlier tokens in any block" in text and "forced" in text
    assert "no difference at all" in text and "out of memory" in text


def test_large_pictures_are_scaled_until_they_are_small(tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (600, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    results._copy_picture(tmp_path / "noise.png", tmp_path / "images" / "noise.png")
    copied = tmp_path / "images" / "noise.png"
    assert copied.stat().st_size < 300_000 < (tmp_path / "noise.png").stat().st_size
    assert Image.open(copied).size == (200, 300)
