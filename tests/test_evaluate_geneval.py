"""GenEval: its rules worked out by hand, its networks against direct calls of transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import (
    LABELS,
    save_tiny_color_clip,
    save_tiny_mask2former,
    save_tiny_yolos,
)
from tiny_judges import save_tiny_clip
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate import detection
from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.detection import Box, DetectedObject, ObjectDetector
from dsr_scale.evaluate.geneval import (
    GenEval,
    GenEvalJudge,
    GenEvalSums,
    counted,
    is_correct,
    open_geneval,
    positions,
)
from dsr_scale.evaluate.metrics import merge
from dsr_scale.evaluate.object_colors import COLORS, ColorClassifier, object_crop

CPU = torch.device("cpu")
BOX = Box(0, 0, 10, 10)

LINES = (
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "couch", "count": 1}],
        "prompt": "a dog and a couch",
    },
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "two dogs",
    },
    {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a red dog",
    },
    {
        "tag": "position",
        "include": [
            {"class": "couch", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a dog left of a couch",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "dog", "count": 1, "color": "blue"},
            {"class": "couch", "count": 1, "color": "pink"},
        ],
        "prompt": "a blue dog and a pink couch",
    },
)


@pytest.fixture
def benchmark(tmp_path: Path) -> GenEval:
    return open_geneval(_write(tmp_path / "metadata.jsonl", LINES))


def _write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _seen(label: str, score: float = 0.95, box: Box = BOX) -> DetectedObject:
    return DetectedObject(label, score, box)


def _pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    blocks = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    rows = torch.arange(height) * 8 // height
    return blocks[:, :, rows][:, :, :, torch.arange(width) * 8 // width]


def test_positions_are_of_centres_less_a_tenth_of_the_extents() -> None:
    b = Box(100, 100, 200, 200)  # centre 150, 150; extent 100
    # Offset (−100, 0); margin 0.1 · (100 + 100) = 20; excess 80 of a length of 100.
    assert positions(Box(0, 100, 100, 200), b) == {"left of"}
    assert positions(Box(200, 100, 300, 200), b) == {"right of"}
    assert positions(Box(100, 0, 200, 100), b) == {"above"}
    assert positions(Box(100, 200, 200, 300), b) == {"below"}
    # Offset (−19, 0): within the margin of 20. Offset (−41, 0): 21/41 > 1/2. (−39, 0): 19/39 < 1/2.
    assert positions(Box(81, 100, 181, 200), b) == set()
    assert positions(Box(59, 100, 159, 200), b) == {"left of"}
    assert positions(Box(61, 100, 161, 200), b) == set()
    # Offset (100, −100): each excess 80 of 141.4, which is 0.57.
    assert positions(Box(200, 0, 300, 100), b) == {"right of", "above"}
    # Offset (100, 60), length 116.6: 80/116.6 = 0.69, but 40/116.6 = 0.34.
    assert positions(Box(200, 160, 300, 260), b) == {"right of"}
    # The extent is each axis's own: 20 wide and 100 high; offset (0, 50), margins 12 and 20; 30/50.
    assert positions(Box(140, 150, 160, 250), b) == {"below"}


def test_what_counts_depends_on_score_kind_and_rank() -> None:
    objects = [_seen("sofa", 0.31), _seen("dog", 0.3), _seen("dog", 0.89), _seen("dog", 0.91)]
    found = counted(objects, "colors")
    assert [one.score for one in found["dog"]] == [0.91, 0.89]  # 0.3 is not above 0.3
    assert [one.label for one in found["couch"]] == ["sofa"]
    assert {name: len(of) for name, of in counted(objects, "counting").items()} == {"dog": 1}
    many = [_seen("dog", 0.5 + 0.01 * rank) for rank in range(20)]
    assert [one.score for one in counted(many, "colors")["dog"]] == pytest.approx(
        [0.69 - 0.01 * rank for rank in range(16)]
    )
    # As published, a second object on the same place is another object.
    assert len(counted([_seen("dog"), _seen("dog")], "counting")["dog"]) == 2


def test_every_kind_of_prompt(benchmark: GenEval) -> None:
    single, two, counting, colors, position, attribution = benchmark.prompts
    dog, couch = _seen("dog"), _seen("couch", box=Box(90, 0, 99, 10))

    def correct(prompt: Any, dogs: int, couches: int, named: dict[int, list[str]]) -> bool:
        return is_correct(prompt, {"dog": [dog] * dogs, "couch": [couch] * couches}, named)

    assert correct(single, 1, 0, {}) and correct(single, 3, 1, {})
    assert not correct(single, 0, 1, {})
    assert correct(two, 1, 1, {}) and not correct(two, 2, 0, {}) and not correct(two, 0, 1, {})
    assert [correct(counting, dogs, 0, {}) for dogs in range(5)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert correct(colors, 1, 0, {0: ["red"]}) and not correct(colors, 1, 0, {0: ["pink"]})
    assert not correct(colors, 0, 1, {})
    assert correct(position, 1, 1, {})
    assert not correct(position, 1, 0, {}) and not correct(position, 0, 1, {})
    swapped = {"dog": [_seen("dog", box=couch.box)], "couch": [_seen("couch")]}
    assert not is_correct(position, swapped, {})
    # Only the best of each class is asked: a second dog, on the right, changes nothing.
    beside = {"dog": [dog, _seen("dog", 0.5, Box(200, 0, 210, 10))], "couch": [couch]}
    assert is_correct(position, beside, {})
    assert correct(attribution, 1, 1, {0: ["blue"], 1: ["pink"]})
    assert not correct(attribution, 1, 1, {0: ["pink"], 1: ["blue"]})


def test_files_that_are_not_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(InputError) as missing:
        open_geneval(tmp_path / "evaluation_metadata.jsonl")
    assert "raw.githubusercontent.com/djghosh13/geneval" in missing.value.remedy
    assert "--geneval" in missing.value.remedy
    include = LINES[4]["include"]
    for wrong in (
        {"prompt": "a dog"},
        ["a dog"],
        {**LINES[0], "include": [{"class": "dog", "count": 1, "color": "grey"}]},
        {**LINES[0], "include": [{"class": "dog", "count": 1, "position": ["near", 0]}]},
        {**LINES[4], "include": list(include)[::-1]},  # a position to a clause that comes later
    ):
        with pytest.raises(InputError, match="line 2"):
            open_geneval(_write(tmp_path / "wrong.jsonl", [LINES[0], wrong]))
    with pytest.raises(InputError, match="no prompt"):
        open_geneval(_write(tmp_path / "empty.jsonl", []))


class _Detector:
    """Finds in an image what the value of its first pixel stands for."""

    labels = frozenset({"dog", "sofa"})

    def __init__(self, scenes: Sequence[list[DetectedObject]]) -> None:
        self.scenes = scenes

    def __call__(self, images: Tensor, threshold: float) -> list[list[DetectedObject]]:
        assert threshold == 0.3
        return [self.scenes[int(image[0, 0, 0])] for image in images]


class _Colors:
    """Names the colour that the value of a crop's first pixel stands for; notes the classes."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        self.asked += names
        values = [cast("tuple[int, ...]", crop.getpixel((0, 0)))[1] for crop in crops]
        return [COLORS[value] for value in values]


def test_scores_are_means_over_kinds_whatever_the_shares(benchmark: GenEval) -> None:
    dog, sofa = _seen("dog", box=Box(0, 0, 1, 1)), _seen("sofa", box=Box(8, 0, 9, 1))
    detector: Any = _Detector([[dog, sofa], [dog, dog], [sofa], [dog, _seen("dog", 0.6), sofa]])
    colors: Any = _Colors()
    judge = GenEvalJudge(benchmark, detector, colors)
    # Two images per prompt. Scenes: 0 dog left of couch, 1 two sure dogs, 2 couch, 3 one sure dog.
    scenes = [0, 2, 0, 1, 1, 3, 0, 0, 0, 2, 0, 0]
    images = torch.zeros(12, 3, 1, 10, dtype=torch.uint8)
    images[:, 0] = torch.tensor(scenes)[:, None, None]
    # Green channel: the colour at the dog (column 0) and at the couch (column 8).
    images[7, 1] = COLORS.index("red") + 1
    images[10:, 1, :, :8], images[10:, 1, :, 8:] = COLORS.index("blue"), COLORS.index("pink")
    images[11, 1] = COLORS.index("blue")
    whole, parts = GenEvalSums(benchmark, 12), [GenEvalSums(benchmark, 12) for _ in range(3)]
    whole.add(judge, images, 0)
    # Red is the first colour, so image 6 is right and image 7 is not; of 10 and 11, 10 is.
    assert whole.sums[:, 1].tolist() == [1, 1, 1, 1, 1, 1]
    assert colors.asked == ["dog", "dog", "dog", "couch", "dog", "couch"]
    for part, (start, end) in zip(parts, [(0, 5), (5, 12), (12, 12)], strict=True):
        if start < end:
            part.add(judge, images[start:end], start)
        if part is not parts[0]:
            merge(parts[0], part)
    assert torch.equal(parts[0].sums, whole.sums)
    values = whole.values()
    assert values["geneval"] == 0.5 and values["geneval_any"] == 1
    assert [values[f"geneval_{line['tag']}"] for line in LINES] == [0.5] * 6
    whole.sums[0, 1] = 2
    assert whole.values()["geneval"] == pytest.approx(3.5 / 6)


def test_kinds_weigh_the_same(tmp_path: Path) -> None:
    sums = GenEvalSums(open_geneval(_write(tmp_path / "m", [LINES[0], LINES[0], LINES[1]])), 12)
    sums.sums[:, 0] = 4
    sums.sums[:, 1] = torch.tensor([4, 2, 0])
    expected = {"geneval_single_object": 0.75, "geneval_two_object": 0, "geneval": 0.375}
    assert sums.values() == pytest.approx({**expected, "geneval_any": 2 / 3})


def test_images_and_detectors_that_do_not_fit(benchmark: GenEval) -> None:
    prompts = benchmark.sample_set().prompts
    assert len(prompts) == 24 and prompts[3:5] == ("a dog", "a dog and a couch")
    for images in (0, 7):
        with pytest.raises(InputError, match=f"{images} images for 6 prompts"):
            GenEvalSums(benchmark, images)
    detector: Any = _Detector([])
    detector.labels = frozenset({"dog", "N/A"})
    colors: Any = _Colors()
    with pytest.raises(InputError, match="a detector without couch"):
        GenEvalJudge(benchmark, detector, colors)


def test_instances_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(detection, "BATCH_IMAGES", 2)

    where = save_tiny_mask2former(tmp_path)
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(where).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    images = _pictures(3, 384, 384)  # the size that the library works masks out at; two batches
    found = ObjectDetector(str(where), CPU)(images, 0.05)
    total = 0
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        with torch.no_grad():
            output = model(**processor(picture, return_tensors="pt"))
        (library,) = processor.post_process_instance_segmentation(
            output, threshold=0.05, target_sizes=[(384, 384)], return_binary_maps=True
        )
        segments = library["segments_info"]
        order = sorted(range(len(segments)), key=lambda i: -segments[i]["score"])
        # The library keeps as many pairs as there are queries, here 6; ours has them among its own.
        assert len(ours) >= len(order)
        theirs = iter(ours)
        for index in order:
            one = next(
                one
                for one in theirs
                if one.score == pytest.approx(segments[index]["score"], abs=1e-4)
            )
            assert one.label == LABELS[segments[index]["label_id"]]
            assert one.mask is not None
            mask = library["segmentation"][index].bool()
            assert (one.mask != mask).float().mean() < 1e-3
            rows, columns = np.nonzero(one.mask.numpy())
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert one.box == edges
            total += 1
    assert total > 6


def test_boxes_are_those_of_transformers_within_the_image(tmp_path: Path) -> None:
    import transformers

    where = save_tiny_yolos(tmp_path)
    model = transformers.YolosForObjectDetection.from_pretrained(where).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    images = _pictures(9, 40, 48)
    found = ObjectDetector(str(where), CPU)(images, 0.3)
    assert all(found)
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        with torch.no_grad():
            output = model(**processor(picture, return_tensors="pt"))
        probability = output.logits[0].softmax(-1)[:, :-1]
        expected = []
        for query, (x, y, w, h) in zip(probability, output.pred_boxes[0].tolist(), strict=True):
            box = ((x - w / 2) * 48, (y - h / 2) * 40, (x + w / 2) * 48, (y + h / 2) * 40)
            inside = [min(max(e, 0), limit) for e, limit in zip(box, (48, 40, 48, 40), strict=True)]
            if query.max() > 0.3:
                expected.append((float(query.max()), LABELS[int(query.argmax())], inside))
        expected.sort(key=lambda one: -one[0])
        assert [one.label for one in ours] == [label for _, label, _ in expected]
        for one, (score, _, box) in zip(ours, expected, strict=True):
            assert one.mask is None
            assert one.score == pytest.approx(score, abs=1e-4)
            assert one.box == pytest.approx(box, abs=1e-2)


def test_detectors_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without config\.json"):
        ObjectDetector(str(tmp_path), CPU)
    with pytest.raises(InputError, match="a model of type clip"):
        ObjectDetector(str(save_tiny_clip(tmp_path / "clip")), CPU)


def test_crops_are_the_object_before_grey() -> None:
    image = _pictures(1, 12, 16)[0]
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[2:5, 3:6] = True
    mask[4, 5] = False
    crop = np.asarray(object_crop(image, DetectedObject("dog", 1, Box(3, 2, 6, 5), mask)))
    expected = image[:, 2:5, 3:6].permute(1, 2, 0).numpy().copy()
    expected[2, 2] = 0x99
    assert np.array_equal(crop, expected)
    plain = object_crop(image, _seen("dog", box=Box(2.6, 2.4, 6.4, 4.6)))
    assert np.array_equal(np.asarray(plain), image[:, 2:5, 3:6].permute(1, 2, 0).numpy())
    assert object_crop(image, _seen("dog", box=Box(16, 12, 16, 12))).size == (1, 1)


def test_colors_are_the_nearest_of_three_sentences(tmp_path: Path) -> None:
    import transformers

    hyphenated = [f"{color}-colored" for color in COLORS]
    words = ("a", "photo", "of", "object", "cat", "dog", *COLORS, *hyphenated)
    where = save_tiny_color_clip(tmp_path, words)
    model = transformers.CLIPModel.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    processor = transformers.CLIPImageProcessor.from_pretrained(where)
    images = _pictures(12, 20, 30)
    crops = [
        object_crop(image, _seen("cat", box=Box(i, 0, 20, 9 + i))) for i, image in enumerate(images)
    ]
    names = ["cat", "dog"] * 6

    def unit(vector: Tensor) -> Tensor:
        return vector / vector.norm()

    @functools.cache
    def text(sentence: str) -> Tensor:
        ids = tokenizer([sentence], return_tensors="pt")["input_ids"]  # alone: no padding
        return unit(model.text_projection(model.text_model(ids).pooler_output)[0])

    def row(color: str, name: str) -> Tensor:
        a, b = text(f"a photo of a {color} {name}"), text(f"a photo of a {color}-colored {name}")
        return unit(a + b + text(f"a photo of a {color} object"))

    classifier = ColorClassifier(ClipScorer(str(where), CPU))
    with torch.no_grad():
        for name in ("cat", "dog"):
            rows = torch.stack([row(color, name) for color in COLORS])
            torch.testing.assert_close(classifier._texts(name), rows, rtol=1e-4, atol=1e-5)
            assert torch.pdist(rows).min() > 1e-3
        for crop, name, color in zip(crops, names, classifier(crops, names), strict=True):
            pixels = processor(crop, return_tensors="pt")["pixel_values"]
            seen = unit(model.visual_projection(model.vision_model(pixels).pooler_output)[0])
            cosines = {word: float(row(word, name) @ seen) for word in COLORS}
            assert cosines[color] == pytest.approx(max(cosines.values()), abs=1e-5)
    assert len(set(classifier(crops, names))) > 1
    assert classifier([], []) == []


def test_a_small_crop_is_not_read_as_channels(tmp_path: Path) -> None:
    """Three rows, or one, of an object far away look to the library like three channels, or one."""
    clip = ClipScorer(str(save_tiny_clip(tmp_path)), CPU)
    expected = clip.embed_images([Image.new("RGB", (20, 20), "red")])
    for size in ((9, 3), (1, 1), (3, 1), (3, 3)):
        seen = clip.embed_images([Image.new("RGB", size, "red")])
        torch.testing.assert_close(seen, expected, msg=str(size))
