"""GenEval: are the objects there that a prompt names, as many, in those colours, at those places?

A detector looks for COCO's classes, CLIP names the colours, and an image is right or wrong. The rules
are those of Ghosh et al. 2023: objects count above a score of 0.3, or 0.9 where they are to be counted,
since a second box on the same object would be a wrong number; objects that overlap all count; colour
and place are asked of the best-scored objects only; a prompt has four images; the score is the mean of
the kinds' means, so a kind with few prompts weighs as much as one with many.

The published scores come from mmdet's Mask2Former. With other weights, the same architecture trained
anew included, scores compare with each other and not with those.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.benchmark_images import benchmark_images, images_per_prompt
from dsr_scale.evaluate.detection import Box, DetectedObject, ObjectDetector
from dsr_scale.evaluate.object_colors import COLORS, ColorClassifier, object_crop
from dsr_scale.evaluate.sample_sets import SampleSet

METADATA_URL = (
    "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
)
COMPARABILITY = (
    "comparable between models judged by these detector and CLIP weights; published scores were "
    "judged by mmdet's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco and OpenAI's ViT-L/14"
)

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
"""Of one class in one image; the best-scored are kept."""
POSITION_MARGIN = 0.1
"""Part of the two objects' summed extent by which their centres must be apart to count as apart."""

POSITIONS = ("left of", "right of", "above", "below")

_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""A detector's name → GenEval's, where they differ; the first three are GenEval's own."""


@dataclass(frozen=True)
class Clause:
    """At least `count` objects of a class."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """Relation, and the number of the earlier clause whose objects it is to."""


@dataclass(frozen=True)
class GenEvalPrompt:
    """What one prompt asks of its images: all of `include`, none of `exclude`."""

    text: str
    tag: str
    """Kind of prompt; kinds are averaged apart."""
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


@dataclass(frozen=True)
class GenEval:
    """The benchmark's file as it was read."""

    prompts: tuple[GenEvalPrompt, ...]
    source: str
    """For people: the file and its SHA-256."""

    def sample_set(self, images: int | None = None) -> SampleSet:
        """The prompts of a set of `images` (None: four per prompt). See `benchmark_images`."""
        return benchmark_images([prompt.text for prompt in self.prompts], images, self.source)


def open_geneval(file: Path) -> GenEval:
    """Reads evaluation_metadata.jsonl. Raises InputError when it is missing or a line is malformed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(
            found=f"{file} cannot be read: {error}",
            required="GenEval's evaluation_metadata.jsonl, 553 prompts",
            remedy=f"fetch {METADATA_URL} and name the file with --geneval",
        ) from error
    prompts = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            prompts.append(_prompt(json.loads(line)))
        # Whatever a file of another kind can do to `_prompt`.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                found=f"{file} line {number}: {error!r}",
                required="a JSON object with prompt, tag and include, of known colours and positions",
                remedy=f"fetch {METADATA_URL} again",
            ) from error
    if not prompts:
        raise InputError(
            found=f"no prompt in {file}",
            required="one prompt per line",
            remedy=f"fetch {METADATA_URL} again",
        )
    return GenEval(tuple(prompts), f"{file} ({hashlib.sha256(content).hexdigest()})")


def _prompt(line: Any) -> GenEvalPrompt:
    include = tuple(_clause(clause) for clause in line["include"])
    for number, clause in enumerate(include):
        if clause.position is not None and not 0 <= clause.position[1] < number:
            raise ValueError(f"position to clause {clause.position[1]} in clause {number}")
    exclude = tuple(_clause(clause) for clause in line.get("exclude", ()))
    return GenEvalPrompt(str(line["prompt"]), str(line["tag"]), include, exclude)


def _clause(clause: Any) -> Clause:
    color, position = clause.get("color"), clause.get("position")
    if color is not None and color not in COLORS:
        raise ValueError(f"colour {color!r}")
    if position is not None:
        if position[0] not in POSITIONS:
            raise ValueError(f"position {position[0]!r}")
        position = (str(position[0]), int(position[1]))
    return Clause(str(clause["class"]), int(clause["count"]), color, position)


def class_name(label: str) -> str:
    """GenEval's name of a class that a detector calls `label`."""
    return _NAMES.get(label, label)


def counted(objects: Sequence[DetectedObject], tag: str) -> dict[str, list[DetectedObject]]:
    """By GenEval's class name, best first, the objects that count for a prompt of kind `tag`."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    of_class: dict[str, list[DetectedObject]] = {}
    for found in sorted(objects, key=lambda one: -one.score):
        if found.score > threshold:
            of_class.setdefault(class_name(found.label), []).append(found)
    return {name: all_of[:MAX_OBJECTS] for name, all_of in of_class.items()}


def positions(a: Box, b: Box) -> set[str]:
    """Where `a` is relative to `b`: none, one or, at about 45°, two of POSITIONS.

    What the centres' offset exceeds the margin by, as a part of the offset's length, must be more
    than one half.
    """
    x = (a.left + a.right - b.left - b.right) / 2
    y = (a.top + a.bottom - b.top - b.bottom) / 2
    x_margin = POSITION_MARGIN * (a.right - a.left + b.right - b.left)
    y_margin = POSITION_MARGIN * (a.bottom - a.top + b.bottom - b.top)
    x_excess, y_excess = max(abs(x) - x_margin, 0), max(abs(y) - y_margin, 0)
    if max(x_excess, y_excess) < 1e-3:
        return set()
    half = math.hypot(x, y) / 2
    found = set()
    if x_excess > half:
        found.add("right of" if x > 0 else "left of")
    if y_excess > half:
        found.add("below" if y > 0 else "above")
    return found


def is_correct(
    prompt: GenEvalPrompt,
    found: Mapping[str, Sequence[DetectedObject]],
    colors: Mapping[int, Sequence[str]],
) -> bool:
    """Whether an image shows what its prompt asks for.

    `found`: `counted` objects by class. `colors`: by the number of an `include` clause that asks for
    one, the colours of the `count` best objects of its class, where there are as many.
    """
    best = [found.get(clause.name, ())[: clause.count] for clause in prompt.include]
    for number, clause in enumerate(prompt.include):
        if len(best[number]) < clause.count:
            return False
        if clause.color is not None and any(color != clause.color for color in colors[number]):
            return False
        if clause.position is not None:
            position, of = clause.position
            if any(position not in positions(a.box, b.box) for a in best[number] for b in best[of]):
                return False
    return all(len(found.get(clause.name, ())) < clause.count for clause in prompt.exclude)


class GenEvalJudge:
    """The networks and the rules."""

    def __init__(self, benchmark: GenEval, detector: ObjectDetector, colors: ColorClassifier):
        """Raises InputError when the detector does not know a class of the benchmark."""
        asked = {c.name for p in benchmark.prompts for c in (*p.include, *p.exclude)}
        if unknown := asked - {class_name(label) for label in detector.labels}:
            raise InputError(
                found=f"a detector without {', '.join(sorted(unknown)[:8])}"
                + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
                required="a detector of all of COCO's 80 classes",
                remedy="give one, for example facebook/mask2former-swin-small-coco-instance",
            )
        self._detect = detector
        self._color = colors

    def correct(self, images: Tensor, prompts: Sequence[GenEvalPrompt]) -> list[bool]:
        """Whether each of uint8 images [B,3,H,W] shows what its prompt asks for."""
        detected = self._detect(images, threshold=min(THRESHOLD, COUNTING_THRESHOLD))
        found = [counted(objects, p.tag) for objects, p in zip(detected, prompts, strict=True)]
        asked = [
            (image, number, clause.name, one)
            for image, prompt in enumerate(prompts)
            for number, clause in enumerate(prompt.include)
            if clause.color is not None
            for one in found[image].get(clause.name, ())[: clause.count]
        ]
        named = self._color(
            [object_crop(images[image], one) for image, _, _, one in asked],
            [name for _, _, name, _ in asked],
        )
        colors: list[dict[int, list[str]]] = [{} for _ in prompts]
        for (image, number, _, _), color in zip(asked, named, strict=True):
            colors[image].setdefault(number, []).append(color)
        return [is_correct(p, f, c) for p, f, c in zip(prompts, found, colors, strict=True)]


class GenEvalSums:
    """Images and correct images of each prompt, float64 [N,2]."""

    def __init__(self, benchmark: GenEval, images: int, device: torch.device | str = "cpu") -> None:
        """`images` of all ranks together, a multiple of the prompts, those of a prompt neighbours.

        Raises InputError for another number.
        """
        self._prompts = benchmark.prompts
        self._per_prompt = images_per_prompt(len(self._prompts), images)
        self.sums = torch.zeros(len(self._prompts), 2, dtype=torch.float64, device=device)

    def add(self, judge: GenEvalJudge, images: Tensor, first_index: int) -> None:
        """Counts in uint8 images [B,3,H,W], neighbours in the set from `first_index` on."""
        numbers = [(first_index + i) // self._per_prompt for i in range(len(images))]
        correct = judge.correct(images, [self._prompts[number] for number in numbers])
        for number, right in zip(numbers, correct, strict=True):
            self.sums[number] += self.sums.new_tensor([1, right])

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.sums]

    def values(self) -> dict[str, float]:
        """`geneval`, the mean over kinds of prompt; `geneval_KIND`, the part of correct images; and
        `geneval_any`, the part of prompts with a correct image among theirs.
        """
        assert bool((self.sums[:, 0] == self._per_prompt).all())
        tags = list(dict.fromkeys(prompt.tag for prompt in self._prompts))
        kind = torch.tensor([tags.index(prompt.tag) for prompt in self._prompts])
        right = self.sums[:, 1].cpu() / self._per_prompt
        means = {f"geneval_{tag}": float(right[kind == i].mean()) for i, tag in enumerate(tags)}
        any_right = float((right > 0).double().mean())
        return {"geneval": sum(means.values()) / len(tags), **means, "geneval_any": any_right}
