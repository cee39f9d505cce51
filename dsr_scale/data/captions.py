"""Which caption a sample trains on in an epoch, and whether its condition is dropped.

Both draws are functions of (seed, epoch, sample id) alone (`base.random_keys`).
"""

from __future__ import annotations

from typing import Literal

from dsr_scale.base import random_keys
from dsr_scale.data.samples import Caption


def choose_caption(
    captions: tuple[Caption, ...],
    choice: Literal["weighted", "first"],
    *,
    seed: int,
    epoch: int,
    sample_id: int,
) -> str:
    """The caption's text: the first, or one drawn with probability proportional to its weight."""
    assert captions
    if choice == "first" or len(captions) == 1:
        return captions[0].text
    total = sum(caption.weight for caption in captions)
    draw = total * float(random_keys.generator(seed, "caption", epoch, sample_id).random())
    for caption in captions:
        draw -= caption.weight
        if draw < 0:
            return caption.text
    return captions[-1].text


def drop_condition(probability: float, *, seed: int, epoch: int, sample_id: int) -> bool:
    """Whether this sample trains the unconditional branch in this epoch."""
    draw = random_keys.generator(seed, "condition_dropout", epoch, sample_id).random()
    return bool(draw < probability)
