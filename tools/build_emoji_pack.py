"""Builds the pack that ships as `package:emoji`: 3,374 emoji renders with captions, 64 pixels.

    python tools/build_emoji_pack.py [--packages DIR] [--out dsr_scale/data/emoji]

Images are the Fluent 3D emoji (MIT), captions the CLDR labels and tags from emojibase (MIT), both
from npm tarballs that are fetched with `npm pack` unless --packages names a directory that holds
them. The order is a seeded shuffle that begins with everything that is neither a flag nor a
variant in skin tone, so that `data.max_samples` takes distinct, recognisable things. Building
twice gives the same fingerprint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError
from dsr_scale.data.manifest import MANIFEST_NAME, parse_manifest
from dsr_scale.data.pack import PackReport, pack
from dsr_scale.data.pack_unit import PackOptions, Reencode
from dsr_scale.data.sources import SourceOptions

IMAGES = ("@lobehub/fluent-emoji-3d", "1.1.0")
LABELS = ("emojibase-data", "17.0.0")
SIDE_PIXELS = 64
SHUFFLE_SEED = 0
TAGS_WEIGHT = 0.25
VARIATION_SELECTOR = "fe0f"
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "dsr_scale" / "data" / "emoji"


def tarball_name(package: tuple[str, str]) -> str:
    """The file name that `npm pack` gives a package."""
    name, version = package
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch(directory: Path) -> None:
    """Fetches both tarballs from the npm registry into `directory`. Raises `InputError`."""
    for name, version in (IMAGES, LABELS):
        try:
            subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}"],
                cwd=directory,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise InputError(
                found="there is no npm here"
                if missing
                else f"npm could not fetch {name}@{version}",
                required=f"the npm packages {IMAGES[0]} and {LABELS[0]}",
                remedy="install Node.js with npm and check the network, or name a directory with "
                "both tarballs: --packages",
            ) from error


def unpack(packages: Path, package: tuple[str, str], into: Path) -> Path:
    """Unpacks a tarball and returns its root."""
    tarball = packages / tarball_name(package)
    if not tarball.is_file():
        raise InputError(
            found=f"{packages} lacks {tarball.name}",
            required="both npm tarballs",
            remedy=f"fetch it with `npm pack {package[0]}@{package[1]}`, or omit --packages",
        )
    root = into / tarball.stem
    with tarfile.open(tarball) as archive:
        archive.extractall(root, filter="data")
    return root / "package"


def plain(hexcode: str) -> str:
    """The code point sequence without variation selectors, which the two packages place unlike."""
    parts = hexcode.lower().split("-")
    return "-".join(part for part in parts if part != VARIATION_SELECTOR)


def read_labels(root: Path) -> dict[str, dict[str, Any]]:
    """Label, tags, group and subgroup by plain code point sequence, skin tones included."""
    entries = json.loads((root / "en" / "data.json").read_text())
    groups = json.loads((root / "meta" / "groups.json").read_text())
    found = {}
    for entry in entries:
        for emoji in (entry, *entry.get("skins", ())):
            found[plain(emoji["hexcode"])] = {
                "label": emoji["label"],
                "tags": entry.get("tags", []),
                "group": groups["groups"].get(str(entry.get("group"))),
                "subgroup": groups["subgroups"].get(str(entry.get("subgroup"))),
            }
    return found


def make_rows(images: Path, labels: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per image that has a label, in the order of the pack."""
    rows = []
    for path in sorted(images.glob("*.webp")):
        known = labels.get(plain(path.stem))
        if known is None:
            continue
        captions = [{"text": known["label"], "source": "label", "weight": 1.0}]
        if known["tags"]:
            tags = ", ".join(known["tags"])
            captions.append({"text": tags, "source": "tags", "weight": TAGS_WEIGHT})
        row = {
            "image": f"assets/{path.name}",
            "key": path.stem,
            "captions": captions,
            "hexcode": path.stem.upper(),
            "skin_tone": any(tone in path.stem for tone in SKIN_TONES),
        }
        row |= {name: known[name] for name in ("group", "subgroup") if known[name]}
        rows.append(row)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return sorted(rows, key=lambda row: row["skin_tone"] or row.get("group") == "flags")


def write_notice(out: Path, images: Path, labels: Path) -> None:
    """Names both packages and their licence: the one text that the tarballs carry, both holders."""
    licence = (labels / "LICENSE").read_text().strip()
    declared = json.loads((images / "package.json").read_text())["license"]
    assert declared == "MIT" and licence.startswith("MIT License")
    text = f"""The images and captions in this directory come from two npm packages.

Images: {IMAGES[0]} {IMAGES[1]}, scaled to {SIDE_PIXELS} pixels and stored again as WebP.
The package declares the MIT licence in package.json and README.md, and carries no licence file:
    Copyright (c) 2023 LobeHub
It contains the Fluent Emoji by Microsoft, published under the MIT licence:
    Copyright (c) Microsoft Corporation.

Captions, groups and subgroups: {LABELS[0]} {LABELS[1]}, whose LICENSE reads as follows. The same
permission notice covers the images, under the copyrights above.

{licence}
"""
    (out / "NOTICE").write_text(text)


def require_replaceable(out: Path) -> None:
    """Raises `InputError` unless `out` is absent, empty, or an earlier build of this pack."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = out / MANIFEST_NAME
    if manifest.is_file():
        with contextlib.suppress(InputError):
            name = parse_manifest(manifest.read_bytes(), str(manifest)).source.get("name", "")
            if IMAGES[0] in name and LABELS[0] in name:
                return
    raise InputError(
        found=f"{out} holds something else",
        required="a directory that is absent, empty, or an earlier build of this pack",
        remedy="choose another directory with --out, or empty this one",
    )


def build(packages: Path, out: Path) -> PackReport:
    """Packs into a temporary directory and replaces the pack in `out`, and nothing else."""
    require_replaceable(out)
    with tempfile.TemporaryDirectory() as temporary:
        images = unpack(packages, IMAGES, Path(temporary))
        labels = unpack(packages, LABELS, Path(temporary))
        rows = make_rows(images / "assets", read_labels(labels))
        listing = images / "emoji.jsonl"
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(listing, (0, 0))  # the manifest names the time of change: two builds are equal
        options = PackOptions(
            source=SourceOptions(unit_samples=len(rows)),
            reencode=Reencode("webp", quality=65, alpha_quality=50, max_side=SIDE_PIXELS),
            shard_mib=1.0,
            source_name=" + ".join("@".join(package) for package in (IMAGES, LABELS)),
        )
        packed = Path(temporary) / "packed"
        report = pack(str(listing), packed, options)
        write_notice(packed, images, labels)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(packed, out)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the pack that ships as package:emoji.")
    parser.add_argument("--packages", type=Path, help="directory that holds both npm tarballs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    try:
        require_replaceable(arguments.out)
        with tempfile.TemporaryDirectory() as temporary:
            if arguments.packages is None:
                fetch(Path(temporary))
            report = build(arguments.packages or Path(temporary), arguments.out)
    except InputError as error:
        sys.exit(f"{error}")
    print(report)


if __name__ == "__main__":
    main()
