"""Small image-caption sources for the data tests, each pixel and caption known from its number."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [height, width, 3], different for every number."""
    generator = np.random.Generator(np.random.Philox(key=number))
    coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encoded(number: int, height: int = 24, width: int = 32, kind: str = "PNG") -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture(number, height, width)).save(buffer, kind)
    return buffer.getvalue()


def write_list(directory: Path, count: int, height: int = 24, width: int = 32) -> Path:
    """A JSONL list of `count` images with two captions and a label each; returns its path."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = f"images/{number:04d}.png"
        (directory / name).write_bytes(encoded(number, height, width))
        lines.append(json.dumps(row(number) | {"image": name}))
    path = directory / "list.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def row(number: int) -> dict[str, Any]:
    """Everything but the image."""
    return {
        "key": f"k{number:04d}",
        "captions": [
            {"text": f"picture {number}", "source": "short", "weight": 3.0},
            {"text": f"a long text about picture {number}", "source": "long", "weight": 1.0},
        ],
        "label": number % 7,
    }


def write_tar(path: Path, numbers: range) -> None:
    """A tar as img2dataset writes it: jpg, txt and json members."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            members = {
                "jpg": encoded(number, kind="JPEG"),
                "json": json.dumps({"caption": f"picture {number}", "label": number % 7}).encode(),
                "txt": f"picture {number}".encode(),
            }
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
