"""Packed pairs of which some cannot be used, and runs over them, for the tests of the latent cache."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from data_fixtures import encoded, write_list

from dsr_scale.config.run import RunConfig
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.sources import SourceOptions
from dsr_scale.encode_service.fill import FillReport, fill

COUNT = 30
BROKEN = (4, 11)
"""Samples whose image is broken on the disk after packing."""
CPU = torch.device("cpu")


def write_pack(directory: Path, count: int = COUNT) -> Path:
    """`count` pairs in shards of at most 7, those of `BROKEN` without a readable image."""
    source = write_list(directory / "source", count)
    options = PackOptions(source=SourceOptions(unit_samples=7))
    out = directory / "packed"
    pack(str(source), out, options)
    for shard in sorted(out.rglob("*.mds")):
        content = shard.read_bytes()
        for number in BROKEN:
            image = encoded(number)
            content = content.replace(image, b"\0" * len(image))
        shard.write_bytes(content)
    return out


def write_odd_tar(path: Path, count: int = 12) -> None:
    """Samples of which some have no image, no caption, neither, or metadata that cannot be read."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            members = {
                "jpg": encoded(number, kind="JPEG"),
                "json": json.dumps({"label": number % 3, "from": "tar"}).encode(),
                "txt": f"one {number}\nanother {number}".encode(),
            }
            if number == 2:
                members["json"] = b"{broken"
            if number in (3, 5):
                members["jpg"] = b"broken"
            if number in (5, 6):
                del members["txt"]
            if number == 7:
                del members["jpg"]
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def make_run(shards: Path | str, **changes: Any) -> RunConfig:
    """A run on pixels and bytes; `changes` replace single settings: data={…}, encoders={…}, ….."""
    sections: dict[str, Any] = {
        "data": {"shards": str(shards), "resolution": 16, "workers": 0, "condition_dropout": 0.3},
        "encoders": {"image": {"kind": "pixels", "patch": 4}, "text": {"max_length": 20}},
        "model": {
            "width": 32,
            "depth": 4,
            "heads": 2,
            "conditioning": {"kind": "cross_attention"},
        },
        "training": {"steps": 1, "global_batch_images": 6, "microbatch_images": 3},
    }
    sections["data"]["shuffle_block_samples"] = 9
    sections["encoders"]["text"]["kind"] = "bytes"
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    content = {"name": "cached", "directory": "unused", "seed": 5, **sections}
    return RunConfig.model_validate_json(json.dumps(content, default=str), strict=True)


def fill_cache(run: RunConfig, out: Path, **options: Any) -> FillReport:
    """Fills on the CPU with two decoding threads."""
    return fill(run, out, device=CPU, decode_threads=2, **options)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
