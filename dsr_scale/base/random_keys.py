"""Randomness from identity: every draw is a function of (seed, purpose, identity), never of history.

A run that was resumed, re-split over other ranks or replayed therefore draws the same noise,
timestep, caption, crop and flip for the same sample. A key is a 63-bit integer that seeds a
generator of the caller's choice; the cost is one hash, about a microsecond.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str, *identity: int) -> int:
    """A 63-bit key, equal on every machine and Python version for equal arguments."""
    text = f"{seed}/{purpose}/" + "/".join(str(part) for part in identity)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *identity: int) -> np.random.Generator:
    """A numpy generator for the draw that (seed, purpose, identity) names."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *identity)))
