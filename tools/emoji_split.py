"""Divides the emoji that ship with the package into a training pack and a held-out pack.

    python tools/emoji_split.py OUT                    # OUT/train and OUT/held_out

Emoji come in families: skin tones, and a person, a man and a woman in the same role. Versions of one
emoji are nearly one picture, so a family is held out whole or not at all; otherwise a held-out loss
would measure memory. Which families are held out is a function of their name alone, so that the
division stays the same when emoji are added.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from pathlib import Path

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions

SHARDS = "package:emoji"
HELD_OUT_SHARE = 0.1
TRAIN, HELD_OUT = "train", "held_out"
_SKIN_TONES = r"1F3F[B-F]"
_WITHOUT_MEANING = ("FE0F", "200D", "2640", "2642")
"""How to draw, a joint, and the signs for woman and man."""
_PEOPLE = ("1F468", "1F469", "1F9D1")
"""Man, woman and person, who begin the emoji of a role."""
_STORED_SIDE = 64


def family(hexcode: str) -> str:
    """The code points that an emoji shares with its other skin tones and genders."""
    parts = [
        part
        for part in hexcode.split("-")
        if not re.fullmatch(_SKIN_TONES, part) and part not in _WITHOUT_MEANING
    ]
    if len(parts) > 1:
        parts = [_PEOPLE[-1] if part in _PEOPLE else part for part in parts]
    return "-".join(parts)


def is_held_out(hexcode: str) -> bool:
    """Whether an emoji's family is held out."""
    digest = hashlib.blake2b(family(hexcode).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < HELD_OUT_SHARE


def split(out: Path) -> dict[str, int]:
    """Writes both packs below `out`, and leaves one that is there as it is; returns their sizes.

    Samples keep their order, which is shuffled in the shipped pack.
    """
    source = open_samples(DataConfig(shards=SHARDS, resolution=_STORED_SIDE))
    counts = {TRAIN: 0, HELD_OUT: 0}
    out.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there whole, so that what is there is finished.
    with tempfile.TemporaryDirectory(dir=out, prefix=".making_") as made:
        for number in range(len(source)):
            sample = source.read(number)
            part = HELD_OUT if is_held_out(str(sample.metadata["hexcode"])) else TRAIN
            counts[part] += 1
            place = Path(made, "images", part)
            place.mkdir(parents=True, exist_ok=True)
            # Packing sorts by name.
            key = place / f"{number:04}-{sample.key}"
            key.with_suffix(".webp").write_bytes(sample.image)
            captions = "\n".join(caption.text for caption in sample.captions)
            key.with_suffix(".txt").write_text(captions + "\n", encoding="utf-8")
        for part in counts:
            if not (out / part).exists():
                options = PackOptions(shard_mib=1.0, source_name=f"{SHARDS}, {part}")
                pack(str(Path(made, "images", part)), Path(made, part), options)
                Path(made, part).rename(out / part)
    return counts


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Training and held-out packs of the emoji.")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        for part, count in split(options.out).items():
            print(f"{count} emoji → {options.out / part}")
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
