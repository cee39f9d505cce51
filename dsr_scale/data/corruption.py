"""What happens to a sample that cannot be used: named, counted, and its slot refilled.

The slot takes another sample that is a pure function of (seed, epoch, id, attempt), so all ranks
and every re-run agree on it. The record travels with the batch; the trainer sums the counts over
ranks and stops the run when their share passes `data.max_corrupt_rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsr_scale.base import random_keys
from dsr_scale.base.errors import InputError

REPLACEMENT_ATTEMPTS = 16
"""With a tenth of the data unreadable, all of these fail once in 10¹⁶ slots."""

MINIMUM_SEEN = 1000
MINIMUM_CORRUPT = 16
"""The rate is judged after this many samples, or earlier once this many were corrupt."""

_NAMED_KEYS = 10


@dataclass(frozen=True)
class CorruptImage:
    """One unusable sample (image, captions or metadata) and the sample that took its slot."""

    key: str
    error: str
    sample_id: int
    replacement_id: int


def replacement_id(sample_id: int, attempt: int, *, samples: int, seed: int, epoch: int) -> int:
    """The id tried in attempt 0, 1, … in place of `sample_id`; uniform over all `samples`."""
    return random_keys.key(seed, "replacement", epoch, sample_id, attempt) % samples


def check_rate(
    corrupt_total: int, seen_total: int, max_rate: float, last_keys: Sequence[str]
) -> None:
    """Raises `InputError` naming the last keys when too large a share of images is corrupt.

    Silent until `MINIMUM_SEEN` samples were seen or `MINIMUM_CORRUPT` were corrupt, so that one
    bad image in the first batch does not stop a run.
    """
    if seen_total < MINIMUM_SEEN and corrupt_total < MINIMUM_CORRUPT:
        return
    if corrupt_total <= max_rate * seen_total:
        return
    raise InputError(
        found=f"{corrupt_total} of {seen_total} images were unusable "
        f"({corrupt_total / seen_total:.2%}); the last: {', '.join(last_keys[-_NAMED_KEYS:])}",
        required=f"at most {max_rate:.2%} (data.max_corrupt_rate)",
        remedy="repair or drop those images and pack the data again, or raise the limit",
    )
