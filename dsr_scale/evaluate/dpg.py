"""DPG-Bench: does an image show each of the many things that a long prompt says?

A prompt comes with questions that a VQA model answers, and a question may depend on others: whether the
dog is brown is not asked of an image without a dog. So a "yes" counts only where the questions it
depends on count, and an image scores the part of its questions that do. A prompt scores the mean of its
four images, the benchmark the mean of its prompts, times 100 (Hu et al. 2024).

The published scores come from mPLUG-large, which transformers does not have. With another model scores
compare with each other and not with those. The benchmark's script leaves out the first line of its
table; here it counts. Kinds of question are scored by the answers alone, as there, but over all images
and not the last of each prompt.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.benchmark_images import benchmark_images, images_per_prompt
from dsr_scale.evaluate.sample_sets import SampleSet
from dsr_scale.evaluate.visual_questions import VisualQuestions

TABLE_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
COMPARABILITY = (
    "comparable between models judged by this VQA model; published scores were judged by "
    "damo/mplug_visual-question-answering_coco_large_en"
)

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One thing that a prompt says."""

    text: str
    category: str
    """Broad and detailed, as in "attribute - color"."""
    parents: tuple[int, ...]
    """Ids of the questions it depends on."""


@dataclass(frozen=True)
class DpgPrompt:
    """A prompt with its questions by id, parents before children."""

    text: str
    questions: dict[int, Question] = field(default_factory=dict)


@dataclass(frozen=True)
class DpgBench:
    """The benchmark's table as it was read."""

    prompts: tuple[DpgPrompt, ...]
    source: str
    """For people: the file and its SHA-256."""

    def sample_set(self, images: int | None = None) -> SampleSet:
        """The prompts of a set of `images` (None: four per prompt). See `benchmark_images`."""
        return benchmark_images([prompt.text for prompt in self.prompts], images, self.source)


def open_dpg(file: Path) -> DpgBench:
    """Reads dpg_bench.csv; prompts keep its order.

    Raises InputError when it is missing, lacks a column, or has a malformed line.
    """
    try:
        content = file.read_bytes()
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unusable(file, f"cannot be read: {error}") from error
    if missing:
        raise _unusable(file, f"lacks the columns {', '.join(missing)}")
    prompts: dict[str, DpgPrompt] = {}
    try:
        for row in rows:
            prompt = prompts.setdefault(row["item_id"], DpgPrompt(row["text"]))
            parents = [int(number) for number in row["dependency"].split(",")]
            prompt.questions[int(row["proposition_id"])] = Question(
                row["question_natural_language"],
                row["tuple"].split("(")[0].strip(),
                tuple(number for number in parents if number != 0),
            )
    except (ValueError, AttributeError, csv.Error) as error:  # a short line has None for text
        raise _unusable(file, f"line {rows.line_num}: {error}") from error
    if not prompts:
        raise _unusable(file, "has no prompt")
    return DpgBench(tuple(prompts.values()), f"{file} ({hashlib.sha256(content).hexdigest()})")


def _unusable(file: Path, how: str) -> InputError:
    return InputError(
        found=f"{file} {how}",
        required=f"DPG-Bench's dpg_bench.csv, 1065 prompts, with {', '.join(COLUMNS)}",
        remedy=f"fetch {TABLE_URL} and name the file with --dpg",
    )


def counted(questions: Mapping[int, Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """By id, whether a "yes" counts: all that the question depends on must count too.

    A parent that is not among the questions cannot have been denied. `questions` has parents first.
    """
    counts: dict[int, bool] = {}
    for number, question in questions.items():
        before = (counts.get(parent, answers.get(parent, True)) for parent in question.parents)
        counts[number] = answers[number] and all(before)
    return counts


class DpgSums:
    """Over the images of each prompt, number and sum of scores, float64 [N,2]; over the questions of
    each category, number and "yes", float64 [C,2].
    """

    def __init__(
        self, benchmark: DpgBench, images: int, device: torch.device | str = "cpu"
    ) -> None:
        """`images` of all ranks together, a multiple of the prompts, those of a prompt neighbours.

        Raises InputError for another number.
        """
        self._prompts = benchmark.prompts
        self._per_prompt = images_per_prompt(len(self._prompts), images)
        self._categories = sorted(
            {q.category for prompt in benchmark.prompts for q in prompt.questions.values()}
        )
        self.scores = torch.zeros(len(self._prompts), 2, dtype=torch.float64, device=device)
        self.answers = torch.zeros(len(self._categories), 2, dtype=torch.float64, device=device)

    def add(self, judge: VisualQuestions, images: Tensor, first_index: int) -> None:
        """Counts in uint8 images [B,3,H,W], neighbours in the set from `first_index` on."""
        numbers = [(first_index + i) // self._per_prompt for i in range(len(images))]
        asked = [self._prompts[number].questions for number in numbers]
        texts = [[question.text for question in questions.values()] for questions in asked]
        said = judge.says_yes(images, texts)
        for number, questions, yes in zip(numbers, asked, said, strict=True):
            self._count(number, dict(zip(questions, yes, strict=True)))

    def _count(self, number: int, answers: Mapping[int, bool]) -> None:
        questions = self._prompts[number].questions
        score = sum(counted(questions, answers).values()) / len(questions)
        self.scores[number] += self.scores.new_tensor([1, score])
        for question, yes in answers.items():
            row = self._categories.index(questions[question].category)
            self.answers[row] += self.answers.new_tensor([1, yes])

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.scores, self.answers]

    def values(self) -> dict[str, float]:
        """`dpg`, and `dpg_CATEGORY` for broad and detailed ones, 0 to 100."""
        assert bool((self.scores[:, 0] == self._per_prompt).all())
        totals: dict[str, Tensor] = {}
        for category, row in zip(self._categories, self.answers.cpu(), strict=True):
            names = {_value_name(category.split("-")[0]), _value_name(category)}
            for name in names:
                totals[name] = totals.get(name, torch.zeros_like(row)) + row
        found = {"dpg": float(100 * self.scores[:, 1].mean() / self._per_prompt)}
        return found | {name: float(100 * yes / asked) for name, (asked, yes) in totals.items()}


def _value_name(category: str) -> str:
    return "dpg_" + "_".join(re.findall(r"\w+", category.lower()))
