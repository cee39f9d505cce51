"""Images that exist, to be evaluated or compared with: a folder, packed shards, or a `.npz` as ADM's.

An ADM file holds images (`arr_0`, uint8 [N,H,W,3]), or the statistics of a larger set (`mu`, `sigma`
for FID, `mu_s`, `sigma_s` for sFID), or both; then the statistics are for FID and sFID and the images
for precision and recall. Images are read batch by batch, a compressed file too, so memory does not
grow with the set.

Real images are scaled and cropped as in training. Files to be evaluated are not: what a model drew is
judged as it is, so a folder with a grid among its images, or with images of another model, is refused.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.manifest import INDEX_NAME
from dsr_scale.data.plain_images import FolderImages, ImageSource, PlainImages, ShardImages
from dsr_scale.data.remote_files import is_remote
from dsr_scale.data.shards import PACKAGE_PREFIX
from dsr_scale.data.shares import WHOLE, Share
from dsr_scale.data.transforms import UnreadableImage, image_size
from dsr_scale.evaluate.frechet import Gaussian
from dsr_scale.evaluate.inception import POOL_CHANNELS, SPATIAL_CHANNELS
from dsr_scale.evaluate.sample_sets import share_of

_IMAGES = "arr_0.npy"


class ReferenceImages(Protocol):
    """A process's share of a set of images, in batches; `len` counts the share."""

    count: int
    """Images of the whole set."""

    def __len__(self) -> int: ...

    def batches(self, images: int) -> Iterator[Tensor]:
        """uint8 [B,3,H,W] with B = `images` in all but the last."""
        ...


@dataclass(frozen=True)
class Reference:
    """A reference set as it was found."""

    where: str
    fingerprint: str
    """Of the content; names the set in a report."""
    images: ReferenceImages | None
    """None for a file of statistics alone."""
    pool: Gaussian | None = None
    """Stored statistics for FID."""
    spatial: Gaussian | None = None
    """Stored statistics for sFID."""


def open_reference(place: str, resolution: int, share: Share = WHOLE) -> Reference:
    """Opens the statistics, or this process's share of the images, at `place`.

    Images of folders and shards are scaled to cover squares of `resolution` pixels and cropped to
    them, as in training. Raises InputError when there is nothing of the kind.
    """
    if place.endswith(".npz"):
        if not Path(place).is_file():
            raise InputError(
                found=f"no file {place}",
                required="a .npz file with arr_0, or mu and sigma",
                remedy="correct the path",
            )
        return _open_npz(Path(place), resolution, share)
    images = open_images(place, resolution, share)
    return Reference(place, images.data_set, images)


def open_existing(place: str, resolution: int) -> ReferenceImages:
    """Images to be evaluated, all of them.

    Those of a folder or a `.npz` are squares of side `resolution`; those of shards are a data set's,
    and are scaled and cropped. Raises InputError when there are none, as in a file of statistics.
    """
    images = open_reference(place, resolution).images
    if images is None:
        raise InputError(
            found=f"{place} without images",
            required="a folder of images, packed shards, or a .npz with arr_0",
            remedy="give the images themselves; statistics are for --reference",
        )
    if isinstance(images, PlainImages) and isinstance(images.source, FolderImages):
        return _plain(Squares(images.source, resolution), data_at(place, resolution))
    return images


class Squares:
    """Images of a source that are read as they are."""

    def __init__(self, source: ImageSource, side: int) -> None:
        """`side`: what all must have, in pixels."""
        self.name = source.name
        self.where = source.where
        self._source = source
        self._side = side

    def __len__(self) -> int:
        return len(self._source)

    def read(self, position: int) -> tuple[str, bytes]:
        """(name, encoded bytes). Raises InputError for an image of another size, or that is none."""
        name, content = self._source.read(position)
        try:
            height, width = image_size(content)
        except UnreadableImage as error:
            raise _not_as_drawn(f"{name} in {self.where}: {error}", self._side) from error
        if (height, width) != (self._side, self._side):
            raise _not_as_drawn(f"{name} in {self.where}, {width}×{height} pixels", self._side)
        return name, content


def _not_as_drawn(found: str, side: int) -> InputError:
    return InputError(
        found=found,
        required=f"images of {side}×{side} pixels, as one model draws them",
        remedy="give a folder of such images and no others; grids, as GenEval's grid.png, do not count",
    )


def open_images(place: str, resolution: int, share: Share = WHOLE) -> PlainImages:
    """The images of a folder or of shards; a share may be empty.

    Raises InputError when there are none.
    """
    data = data_at(place, resolution)
    packed = is_remote(place) or place.startswith(PACKAGE_PREFIX)
    tables = packed or data.format == "webdataset" or (Path(place) / INDEX_NAME).is_file()
    source = ShardImages(data) if tables else _folder(place)
    return _plain(source, data, share)


def _plain(source: ImageSource, data: DataConfig, share: Share = WHOLE) -> PlainImages:
    return PlainImages(
        source, len(source), resolution=data.resolution, background=data.background, share=share
    )


def _folder(place: str) -> FolderImages:
    try:
        return FolderImages(Path(place))
    except InputError as error:  # its remedy is that of another command
        raise InputError(
            found=error.found, required=error.required, remedy="correct the path"
        ) from error


def image_side(place: str) -> int:
    """The shorter side, in pixels, of the first image at `place`. Raises InputError when there is none."""
    try:
        if place.endswith(".npz"):
            with zipfile.ZipFile(place) as archive, archive.open(_IMAGES) as file:
                return min(_read_header(file)[0][1:3])
        _, content = open_images(place, resolution=1).source.read(0)
        return min(image_size(content))
    except InputError:
        raise
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, UnreadableImage) as error:
        raise InputError(
            found=f"no image to begin with at {place}: {error}",
            required="a folder of images, packed shards, or a .npz with arr_0",
            remedy="correct the path",
        ) from error


def data_at(place: str, resolution: int) -> DataConfig:
    """The data set of packed shards or of tars at `place`."""
    path = Path(place)
    packed = (path / INDEX_NAME).is_file()
    tars = not packed and path.is_dir() and any(path.glob("*.tar"))
    return DataConfig(shards=place, format="webdataset" if tars else "mds", resolution=resolution)


def _open_npz(path: Path, resolution: int, share: Share) -> Reference:
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "no archive of arrays")
    try:
        # Not pickled: an array of objects would run code.
        with np.load(path, allow_pickle=False) as content:
            names = set(content.files)
            pool = _gaussian(content, "mu", "sigma", POOL_CHANNELS, path)
            spatial = _gaussian(content, "mu_s", "sigma_s", SPATIAL_CHANNELS, path)
        images = NpzImages(path, resolution, share) if "arr_0" in names else None
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    except InputError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if images is None and pool is None and spatial is None:
        raise InputError(
            found=f"{path} with arrays {', '.join(sorted(names)) or 'none'}",
            required="arr_0 (uint8 [N,H,W,3]), or statistics mu and sigma, mu_s and sigma_s",
            remedy="give a reference batch of ADM's evaluator, or a folder of images",
        )
    return Reference(str(path), fingerprint, images, pool, spatial)


def _gaussian(
    content: np.lib.npyio.NpzFile, mean_name: str, covariance_name: str, channels: int, path: Path
) -> Gaussian | None:
    """Stored statistics, None where the file has none. Raises InputError for misshapen ones."""
    if mean_name not in content.files and covariance_name not in content.files:
        return None
    found = {n: content[n] for n in (mean_name, covariance_name) if n in content.files}
    shapes = {name: array.shape for name, array in found.items()}
    if shapes != {mean_name: (channels,), covariance_name: (channels, channels)}:
        raise InputError(
            found=f"{path} with "
            + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()),
            required=f"{mean_name} [{channels}] and {covariance_name} [{channels},{channels}]",
            remedy="give statistics of the Inception features that ADM's evaluator writes",
        )
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in found.values())
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
        raise InputError(
            found=f"{path} with a {covariance_name} that is not symmetric",
            required="a covariance",
            remedy="give the file as it was written, or another",
        )
    return Gaussian(mean, (covariance + covariance.T) / 2)


class NpzImages:
    """A share of `arr_0` of an ADM file, read from front to back."""

    def __init__(self, path: Path, resolution: int, share: Share = WHOLE) -> None:
        """Raises InputError unless it is uint8 [N,S,S,3] of side `resolution`."""
        with zipfile.ZipFile(path) as archive, archive.open(_IMAGES) as file:
            shape, fortran_order, dtype = _read_header(file)
        side = (resolution, resolution, 3)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[1:] != side:
            raise InputError(
                found=f"{path} with arr_0 {dtype} {list(shape)}"
                + (" in column order" if fortran_order else ""),
                required=f"uint8 [N,{resolution},{resolution},3], as large as the generated images",
                remedy="give the reference batch of this resolution, or a folder of its images",
            )
        self.count = int(shape[0])
        self._path = path
        self._side = side
        self._numbers = share_of(self.count, share)

    def __len__(self) -> int:
        return len(self._numbers)

    def batches(self, images: int) -> Iterator[Tensor]:
        """uint8 [B,3,S,S] with B = `images` in all but the last. Raises InputError if damaged."""
        image_bytes = int(np.prod(self._side))
        with zipfile.ZipFile(self._path) as archive, archive.open(_IMAGES) as file:
            _read_header(file)
            file.seek(self._numbers.start * image_bytes, io.SEEK_CUR)
            for start in range(self._numbers.start, self._numbers.stop, images):
                count = min(images, self._numbers.stop - start)
                content = _read(file, count * image_bytes, self._path)
                pixels = np.frombuffer(content, np.uint8).reshape(count, *self._side)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


def _read(file: IO[bytes], size: int, path: Path) -> bytes:
    try:
        content = file.read(size)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if len(content) < size:
        raise _damaged(path, "fewer images than its header says")
    return content


def _damaged(path: Path, how: str) -> InputError:
    return InputError(
        found=f"{path} is damaged: {how}",
        required="the file as it was written",
        remedy="copy the file again",
    )


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, column order and type of the array that `file` is at the start of."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
