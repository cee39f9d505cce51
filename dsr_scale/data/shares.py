"""Which part of a work that several processes divide among them."""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """Part `index` of `of` equal ones, 0 ≤ index < of."""

    index: int
    of: int


WHOLE = Share(0, 1)
