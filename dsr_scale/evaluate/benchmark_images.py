"""Which image is of which prompt in a benchmark whose prompts have several images each.

The images of a prompt are neighbours, those of the first prompt first. Images are known by their place
and not by their prompt's text, since two prompts of a benchmark may read alike and ask different things.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.sample_sets import SampleSet

IMAGES_PER_PROMPT = 4
"""Of both GenEval and DPG-Bench."""


def images_per_prompt(prompts: int, images: int) -> int:
    """How many of `images` each of `prompts` has. Raises InputError unless all have as many."""
    if images == 0 or images % prompts:
        raise InputError(
            found=f"{images} images for {prompts} prompts of a benchmark",
            required=f"as many for every prompt, by custom {IMAGES_PER_PROMPT}",
            remedy="give all images of the first prompt, then all of the second, and so on",
        )
    return images // prompts


def benchmark_images(prompts: Sequence[str], images: int | None, source: str) -> SampleSet:
    """The prompt of each of `images` (None: four per prompt).

    Raises InputError for a number that is not a multiple of the prompts.
    """
    each = IMAGES_PER_PROMPT if images is None else images_per_prompt(len(prompts), images)
    return SampleSet(tuple(text for text in prompts for _ in range(each)), source)
