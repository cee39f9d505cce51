"""Slurm's short form of many node names, written out; `scontrol` is not at hand inside a container."""

from __future__ import annotations

import re

_PART = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
"""A name or a bracketed family of names, up to the next comma outside brackets."""
_BRACKETS = re.compile(r"([^\[]*)\[([^\]]*)\](.*)")


def expand_nodes(short: str) -> tuple[str, ...]:
    """`a[1-3,07],b` → a1, a2, a3, a07, b, in that order; numbers keep their zeros in front."""
    return tuple(name for part in _PART.findall(short) for name in _family(part))


def _family(part: str) -> list[str]:
    match = _BRACKETS.fullmatch(part)
    if match is None:
        return [part]
    before, numbers, after = match.groups()
    return [
        before + number + rest
        for span in numbers.split(",")
        for number in _numbers(span)
        for rest in _family(after)
    ]


def _numbers(span: str) -> list[str]:
    first, dash, last = span.partition("-")
    if not dash:
        return [first]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
