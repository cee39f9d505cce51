"""What `dsr-scale outliers` found of one target: every number of a report, on disk and back.

A target is measured on a grid of L blocks by S timesteps. Numbers are means over images with their
standard errors; maps are kept for the P images that a report shows, and those that cost a picture
each (principal components, attention) for Q of the blocks. JSON carries the numbers, an .npz beside
it the arrays, so that a later reader needs neither the network nor the images.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.outlier_statistics import MEASURES

JSON_FILE = "outliers.json"
ARRAYS_FILE = "outliers.npz"
FORMAT = 1
OUTPUT = "output"  # what leaves the network: the final layer's, or an encoder's latents


class Timestep(NamedTuple):
    """One time on both axes; 1 is pure noise on either."""

    model: float
    """As the network is told it, and as noise is mixed in."""
    preshift: float
    """Before the shift that fits timesteps to the latents' dimension."""


@dataclass(frozen=True)
class Findings:
    """One target's outliers. L blocks, S timesteps (1 for an encoder), Q pictured blocks, P images.

    NaN stands where a measure does not exist: registers before their start, attention of the output,
    the probe on outliers where there are none.
    """

    name: str
    """For headings."""
    kind: Literal["diffusion", "encoder"]
    blocks: tuple[str, ...]
    """L names: `blocks.3`, `head.0`; the last is `output`, what leaves the network."""
    timesteps: tuple[Timestep, ...]
    """S of them; none for an encoder, whose arrays have S = 1."""
    images: int
    """Over how many the measures are."""
    settings: Mapping[str, Any]
    """How it was measured: seed, data, weights, threshold. JSON values."""
    captions: tuple[str, ...]
    """P of them; empty for an encoder."""
    pictured_blocks: tuple[int, ...]
    """Q indices into `blocks`."""
    measures: Mapping[str, np.ndarray]
    """Each of `MEASURES`: float64 [L,S], mean over images."""
    errors: Mapping[str, np.ndarray]
    """Standard errors of those means [L,S]; only of measures that every image has one of."""
    top_channels: np.ndarray
    """int64 [L,S,3], the channels most often among an image's three of largest energy."""
    position_shares: np.ndarray
    """float32 [L,S,h,w], share of images that have an outlier at the position."""
    histogram_edges: np.ndarray
    """float64 [H+1], norms over the image's median; the outermost bins hold what is beyond."""
    image_histograms: np.ndarray
    """int64 [L,S,H], image tokens by norm."""
    register_histograms: np.ndarray
    """int64 [L,S,H], registers by norm; zeros without registers."""
    pictures: np.ndarray
    """uint8 [P,3,H,W], the images that the maps are of."""
    norm_maps: np.ndarray
    """float32 [L,S,P,h,w], L2 norms of image tokens."""
    norm_maps_without_channels: np.ndarray
    """float32 [L,S,P,h,w], the same norms without the image's three channels of largest energy."""
    component_maps: np.ndarray
    """float32 [Q,S,P,h,w,3], scores of each map's own first three principal components."""
    received_maps: np.ndarray
    """float32 [Q,S,P,h,w], attention that image tokens receive from image tokens, over uniform
    attention; like the next three NaN for the output."""
    register_maps: np.ndarray
    """float32 [Q,S,P,R,h,w], attention of the first R ≤ 4 registers to image tokens, mean over heads;
    NaN where registers are absent."""
    top_maps: np.ndarray
    """float32 [Q,S,P,h,w], attention of the image token with the largest norm to image tokens."""
    top_positions: np.ndarray
    """int64 [Q,S,P,2], row and column of that token; -1 for the output."""

    @property
    def grid(self) -> tuple[int, int]:
        """h, w of the token grid."""
        height, width = self.norm_maps.shape[-2:]
        return height, width


_ARRAYS = tuple(field.name for field in fields(Findings) if field.type == "np.ndarray")
_TABLES = ("measures", "errors")


def save_findings(findings: Sequence[Findings], out: Path) -> None:
    """Writes `outliers.json` and `outliers.npz` into the directory `out`."""
    arrays = {
        f"{number}.{name}": getattr(found, name)
        for number, found in enumerate(findings)
        for name in _ARRAYS
    }
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    atomic_files.write_bytes(out / ARRAYS_FILE, content.getvalue())
    atomic_files.write_json(
        out / JSON_FILE,
        {
            "format": FORMAT,
            "arrays": ARRAYS_FILE,
            "measures": MEASURES,
            "targets": [_to_json(found) for found in findings],
        },
    )


def load_findings(out: Path) -> list[Findings]:
    """What `save_findings` wrote. Raises InputError when a file is missing, damaged or of another format."""
    try:
        content = json.loads((out / JSON_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        with np.load(out / ARRAYS_FILE) as arrays:
            return [
                _from_json(target, {name: arrays[f"{number}.{name}"] for name in _ARRAYS})
                for number, target in enumerate(content["targets"])
            ]
    # A cut .npz is a bad zip file, an EOFError or a KeyError, depending on where it was cut.
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            found=f"{out} cannot be read as findings: {error!r}",
            required=f"{JSON_FILE} and {ARRAYS_FILE} as dsr-scale outliers writes them",
            remedy="run dsr-scale outliers again",
        ) from error


def _to_json(found: Findings) -> dict[str, Any]:
    values = {
        field.name: getattr(found, field.name)
        for field in fields(Findings)
        if field.name not in _ARRAYS + _TABLES
    }
    values["timesteps"] = [timestep._asdict() for timestep in found.timesteps]
    for table in _TABLES:
        values[table] = {name: _numbers(grid) for name, grid in getattr(found, table).items()}
    values["arrays"] = {name: list(getattr(found, name).shape) for name in _ARRAYS}
    return values


def _from_json(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Findings:
    return Findings(
        name=values["name"],
        kind=values["kind"],
        blocks=tuple(values["blocks"]),
        timesteps=tuple(Timestep(**timestep) for timestep in values["timesteps"]),
        images=values["images"],
        settings=values["settings"],
        captions=tuple(values["captions"]),
        pictured_blocks=tuple(values["pictured_blocks"]),
        measures=_tables(values["measures"]),
        errors=_tables(values["errors"]),
        **arrays,
    )


def _numbers(grid: np.ndarray) -> list[list[float | None]]:
    """Rows of numbers, None where there is none, which JSON calls null."""
    return [[value if math.isfinite(value) else None for value in row] for row in grid.tolist()]


def _tables(numbers: Mapping[str, Sequence[Sequence[float | None]]]) -> dict[str, np.ndarray]:
    return {
        name: np.array([[math.nan if value is None else value for value in row] for row in rows])
        for name, rows in numbers.items()
    }
