"""Which rows of the token sequence are what, at every block.

The order is always `[registers | text | image]`. Registers are absent before their start block,
text is present only when it is in context and leaves with the body, the head sees registers and
image. One frozen object answers every question about lengths and slices, so that position tables,
dropping, probes and pipeline boundaries cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Rows(NamedTuple):
    """How many rows of each sort a sequence has, in this order."""

    registers: int
    text: int
    image: int

    @property
    def total(self) -> int:
        """Length of the sequence."""
        return self.registers + self.text + self.image

    @property
    def register_slice(self) -> slice:
        """Where the registers are."""
        return slice(0, self.registers)

    @property
    def image_slice(self) -> slice:
        """Where the image tokens are."""
        return slice(self.registers + self.text, self.total)


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of one forward pass: K registers, L text rows in context, a grid of image tokens."""

    registers: int
    """K."""
    text: int
    """L, rows of text inside the sequence; 0 unless the text is in context."""
    grid: tuple[int, int]
    """Rows and columns of image tokens; T is their product."""
    start: int
    """The body block at whose entrance the registers are prepended."""
    depth: int
    """Body blocks."""

    @property
    def image(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1]

    def inside(self, block: int) -> Rows:
        """Rows that body block `block` works on and puts out."""
        return Rows(self.registers if block >= self.start else 0, self.text, self.image)

    def registers_enter(self, block: int) -> bool:
        """Whether registers are prepended at the entrance of body block `block`."""
        return self.registers > 0 and block == self.start

    @property
    def full(self) -> Rows:
        """Rows of the body once the registers are in."""
        return Rows(self.registers, self.text, self.image)

    @property
    def head(self) -> Rows:
        """Rows of every head block, and of the body's output after the text has left."""
        return Rows(self.registers, 0, self.image)

    def at(self, name: str) -> Rows:
        """Rows of the tokens that leave the block a probe calls `name` (`blocks.3`, `head.0`)."""
        part, index = name.split(".")
        return self.head if part == "head" else self.inside(int(index))
