"""What is measured of a decoder in training: every term of its loss, and what the critic says.

Values of a step wait on the device and are read at a log line alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.pipeline import Probes

TERMS = (
    "l1",
    "lpips",
    "adversarial",
    "adaptive_weight",
    "discriminator_loss",
    "real_logit",
    "fake_logit",
)


class DecoderMeasures:
    """Sums of this rank since the last log line, of steps that counted."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._counted = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=ranks.device)
        self._step = torch.zeros_like(self._counted)

    @torch.no_grad()
    def add(self, term: str, share: Tensor, weight: float) -> None:
        """A term of the step under way; `share` is a value times `weight`, which sum to 1 in a step."""
        row = self._step[TERMS.index(term)]
        row[0] += weight
        row[1] += share.double()

    def watched(self, examples: Sequence[Any]) -> Sequence[Any]:
        """The examples: the engine itself tells the terms."""
        return examples

    def probes(self, step: int) -> Probes | None:
        """None: nothing looks at a decoder's tokens."""
        return None

    def end_step(self, skipped: Tensor) -> None:
        """Counts the step's terms, or forgets them where `skipped`, on the device, is not 0."""
        self._counted += torch.where(skipped > 0, 0.0, self._step)
        self._step.zero_()

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call of all ranks; only terms that were there."""
        sums = self._ranks.sum_on_host(self._counted.flatten().tolist())
        self._counted.zero_()
        pairs = zip(TERMS, sums[::2], sums[1::2], strict=True)
        return {term: total / count for term, count, total in pairs if count > 0}
