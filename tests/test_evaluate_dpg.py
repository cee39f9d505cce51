"""DPG-Bench: its rules worked out by hand, its answers against direct calls of transformers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_detectors import ANSWERS, save_tiny_blip, save_tiny_vilt, save_tiny_yolos
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.dpg import DpgBench, DpgSums, counted, open_dpg
from dsr_scale.evaluate.metrics import merge
from dsr_scale.evaluate.visual_questions import VisualQuestions

CPU = torch.device("cpu")
HEADER = [
    *("item_id", "text", "keywords", "proposition_id", "dependency"),
    *("category_broad", "category_detailed", "tuple", "question_natural_language"),
]
DOG = "A brown dog, on a bus"
ROWS = (
    ("7", DOG, "", "1", "0", "entity", "whole", "entity - whole (dog)", "a dog"),
    ("7", DOG, "", "2", "1", "attribute", "color", "attribute - color (dog, brown)", "brown"),
    ("7", DOG, "", "3", "0", "entity", "whole", "entity - whole (bus)", "a bus"),
    ("7", DOG, "", "4", "1,3", "relation", "spatial", "relation - spatial (dog, bus)", "on"),
    ("7", DOG, "", "5", "4, 2", "other", "", "other (dog)", "a brown dog on a bus"),
    ("8", "Red", "", "1", "0", "global", "", "global (red)", "red"),
    ("8", "Red", "", "2", "9", "attribute", "color", "attribute - color (red)", "all red"),
)
QUESTIONS = ("a red cat", "the bus in the photo", "two", "dog", "a blue bus sits on the red cat")


def _write(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def benchmark(tmp_path: Path) -> DpgBench:
    return open_dpg(_write(tmp_path / "dpg_bench.csv", ROWS))


def test_a_question_counts_only_with_what_it_depends_on(benchmark: DpgBench) -> None:
    questions = benchmark.prompts[0].questions

    def score(answers: str) -> str:
        given = {number: sign == "y" for number, sign in enumerate(answers, start=1)}
        return "".join("y" if yes else "n" for yes in counted(questions, given).values())

    assert score("yyyyy") == "yyyyy"
    assert score("nyyyy") == "nnynn"  # no dog: no colour, no place, and so nothing that needs those
    assert score("yynyy") == "yynnn"
    assert score("ynyyy") == "ynyyn"
    assert score("yyyyn") == "yyyyn"
    # A parent that is not asked about is no obstacle.
    assert counted(benchmark.prompts[1].questions, {1: False, 2: True}) == {1: False, 2: True}


def test_the_table_as_read(benchmark: DpgBench) -> None:
    dog, red = benchmark.prompts
    assert (dog.text, red.text) == (DOG, "Red")
    assert [question.text for question in dog.questions.values()] == [row[-1] for row in ROWS[:5]]
    assert dog.questions[5].parents == (4, 2) and dog.questions[1].parents == ()
    assert dog.questions[2].category == "attribute - color"
    assert benchmark.sample_set().prompts == (DOG,) * 4 + ("Red",) * 4


def test_files_that_are_not_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(InputError) as missing:
        open_dpg(tmp_path / "dpg_bench.csv")
    assert "TencentQQGYLab/ELLA" in missing.value.remedy and "--dpg" in missing.value.remedy
    with pytest.raises(InputError, match="lacks the columns item_id"):
        open_dpg(_write(tmp_path / "a.csv", ROWS, ["id", *HEADER[1:]]))
    wrong = (*ROWS[0][:4], "none", *ROWS[0][5:])
    with pytest.raises(InputError, match="line 3"):
        open_dpg(_write(tmp_path / "b.csv", [ROWS[0], wrong]))
    with pytest.raises(InputError, match="line 3"):
        open_dpg(_write(tmp_path / "c.csv", [ROWS[0], ROWS[1][:4]]))
    with pytest.raises(InputError, match="has no prompt"):
        open_dpg(_write(tmp_path / "d.csv", []))


class _Answers:
    """Answers the q-th question with bit q of the first pixel."""

    def says_yes(self, images: Tensor, questions: Sequence[Sequence[str]]) -> list[list[bool]]:
        values = [int(image[0, 0, 0]) for image in images]
        return [
            [bool(value >> q & 1) for q in range(len(of_image))]
            for value, of_image in zip(values, questions, strict=True)
        ]


def test_scores_by_prompt_and_category_whatever_the_shares(benchmark: DpgBench) -> None:
    judge: Any = _Answers()
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    # Answers of the two images of each prompt, first question rightmost.
    images[:, 0] = torch.tensor([0b11111, 0b11110, 0b11, 0b00])[:, None, None]
    whole, parts = DpgSums(benchmark, 4), [DpgSums(benchmark, 4) for _ in range(3)]
    whole.add(judge, images, 0)
    # Image 1 has no dog: of its four other "yes" only the bus counts, 1/5.
    assert whole.scores.tolist() == [[2, pytest.approx(1.2)], [2, 1.0]]
    values = whole.values()
    assert values.pop("dpg") == pytest.approx(100 * (0.6 + 0.5) / 2)
    # By answers alone: entities 1+1 of 2 and 0+1 of 2; colours 1+1 of the dog, 1+0 of "all red".
    assert values == pytest.approx(
        {
            "dpg_entity": 75,
            "dpg_entity_whole": 75,
            "dpg_attribute": 75,
            "dpg_attribute_color": 75,
            "dpg_relation": 100,
            "dpg_relation_spatial": 100,
            "dpg_other": 100,
            "dpg_global": 50,
        }
    )
    for part, (start, end) in zip(parts, [(0, 3), (3, 4), (4, 4)], strict=True):
        if start < end:
            part.add(judge, images[start:end], start)
        if part is not parts[0]:
            merge(parts[0], part)
    for ours, theirs in zip(parts[0].tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for count in (0, 3):
        with pytest.raises(InputError, match=f"{count} images for 2 prompts"):
            DpgSums(benchmark, count)


def _pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_written_answers_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question of one image at a time writes the same words as all at once."""
    import transformers

    where = save_tiny_blip(tmp_path)
    model = transformers.BlipForQuestionAnswering.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    images = _pictures(3)
    asked = [QUESTIONS, QUESTIONS[:2], QUESTIONS[::-1]]
    expected = []
    for image, questions in zip(images, asked, strict=True):
        pixels = processor(_picture(image), return_tensors="pt")["pixel_values"]
        for question in questions:
            ids = tokenizer([question], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                tokens = model.generate(ids, pixels, max_new_tokens=8, do_sample=False)
            expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    assert len(set(expected)) > 1
    judge = VisualQuestions(str(where), CPU)
    written: dict[tuple[Any, ...], str] = {}
    library = judge._written

    def noted(ids: Tensor, pixels: Tensor) -> list[str]:
        answers = library(ids, pixels)
        for row, shown, answer in zip(ids, pixels, answers, strict=True):
            written[tuple(row.tolist()), float(shown.sum())] = answer
        return [" Yes " if answer == expected[0] else answer for answer in answers]

    monkeypatch.setattr(judge, "_written", noted)
    said = judge.says_yes(images, asked)
    assert [yes for of_image in said for yes in of_image] == [a == expected[0] for a in expected]
    index = 0
    for image, questions in zip(images, asked, strict=True):
        pixels = processor(_picture(image), return_tensors="pt")["pixel_values"]
        for question in questions:
            key = tuple(tokenizer(question)["input_ids"]), float(pixels[0].sum())
            assert written[key] == expected[index]
            index += 1


def test_chosen_answers_are_those_of_transformers(tmp_path: Path) -> None:
    import transformers

    where = save_tiny_vilt(tmp_path)
    model = transformers.ViltForQuestionAnswering.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    images = _pictures(6)
    expected = []
    for image in images:
        inputs = processor(_picture(image), return_tensors="pt")
        for question in QUESTIONS:
            ids = tokenizer([question], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids, **inputs).logits
            expected.append(ANSWERS[int(logits.argmax())] == "yes")
    before = torch.get_rng_state()
    said = VisualQuestions(str(where), CPU).says_yes(images, [QUESTIONS] * 6)
    assert torch.equal(before, torch.get_rng_state())
    assert [yes for of_image in said for yes in of_image] == expected
    assert len(set(expected)) == 2


def test_models_that_cannot_answer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without config\.json"):
        VisualQuestions(str(tmp_path), CPU)
    where = save_tiny_yolos(tmp_path / "yolos")
    from tiny_language_models import save_word_tokenizer

    save_word_tokenizer(where, ends_with_eos=True)
    with pytest.raises(InputError, match="a model of type yolos"):
        VisualQuestions(str(where), CPU)
