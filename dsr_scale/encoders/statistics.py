"""Mean and variance of latents over a data set, per channel and position, in one pass.

Batches and partial results are merged by the pairwise update of Chan, Golub and LeVeque in
float64, so that the order of batches and the split over processes do not matter beyond rounding.
The file names the encoder it belongs to, and is refused for any other: whitening with the wrong
statistics trains without an error and samples badly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dsr_scale.base.atomic_files import write_bytes
from dsr_scale.base.errors import InputError

_RECOMPUTE = "compute the statistics for this encoder and resolution, or name the right file"


@dataclass(frozen=True)
class StatisticsIdentity:
    """What latents the statistics are of."""

    encoder: str
    """What the encoder is called: `encoders.image.name`, or else `encoders.image.model`."""
    revision: str | None
    """Commit of the hub repository, if pinned."""
    resolution: int
    """Side of the square image, in pixels."""

    def metadata(self) -> dict[str, str]:
        """As the strings that safetensors keeps; an unpinned revision is empty."""
        return {name: "" if value is None else str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class LatentStatistics:
    """Count, mean and sum of squared deviations of latents; made by `of`, joined by `merge`."""

    count: int
    """Images seen."""
    mean: Tensor
    """float64 [C,h,w]."""
    squares: Tensor
    """Sum of squared deviations from the mean, float64 [C,h,w]."""

    @classmethod
    def of(cls, latents: Tensor) -> LatentStatistics:
        """Statistics of one batch [B,C,h,w], B ≥ 1, on its device."""
        latents = latents.double()
        mean = latents.mean(dim=0)
        return cls(len(latents), mean, (latents - mean).square().sum(dim=0))

    def merge(self, other: LatentStatistics) -> LatentStatistics:
        """Statistics of both sets together. Raises InputError when the latents differ in shape."""
        if self.mean.shape != other.mean.shape:
            raise InputError(
                found=f"statistics of shape {list(self.mean.shape)} and {list(other.mean.shape)}",
                required="latents of one shape",
                remedy="compute both with one encoder and one resolution, without buckets",
            )
        count = self.count + other.count
        difference = other.mean - self.mean
        share = other.count / count
        return LatentStatistics(
            count,
            self.mean + difference * share,
            self.squares + other.squares + difference.square() * (self.count * share),
        )

    @property
    def variance(self) -> Tensor:
        """Population variance (divided by the count), float64 [C,h,w]."""
        return self.squares / self.count


def save_statistics(path: Path, statistics: LatentStatistics, identity: StatisticsIdentity) -> None:
    """Writes `mean` and `variance` float64 [C,h,w] as safetensors, atomically.

    Raises InputError when the disk is full or the path is not writable.
    """
    from safetensors.torch import save

    tensors = {
        "mean": statistics.mean.cpu().contiguous(),
        "variance": statistics.variance.cpu().contiguous(),
    }
    metadata = {**identity.metadata(), "count": str(statistics.count)}
    write_bytes(path, save(tensors, metadata=metadata))


def load_statistics(path: Path, identity: StatisticsIdentity) -> LatentStatistics:
    """Reads what `save_statistics` wrote; the result can be merged with more.

    Raises InputError when the file is missing, unreadable or of another encoder.
    """
    tensors, metadata = _read(path)
    if "count" not in metadata or not {"mean", "variance"} <= tensors.keys():
        raise InputError(
            found=f"{path} with tensors {sorted(tensors)} and metadata {sorted(metadata)}",
            required="tensors mean and variance, and metadata encoder, revision, resolution, count",
            remedy=_RECOMPUTE,
        )
    wanted = identity.metadata()
    held = {name: metadata.get(name, "") for name in wanted}
    if held != wanted:
        raise InputError(
            found=f"{path} with statistics of {held}",
            required=f"statistics of {wanted}",
            remedy=_RECOMPUTE,
        )
    count = int(metadata["count"])
    mean, variance = tensors["mean"].double(), tensors["variance"].double()
    if mean.shape != variance.shape or mean.ndim != 3 or bool((variance < 0).any()):
        raise InputError(
            found=f"{path} with mean {list(mean.shape)} and variance {list(variance.shape)}",
            required="mean and variance [C,h,w], the variance not negative",
            remedy=_RECOMPUTE,
        )
    return LatentStatistics(count, mean, variance * count)


def require_shape(
    path: Path, statistics: LatentStatistics, channels: int, grid: tuple[int, int]
) -> None:
    """Raises InputError unless the statistics are of latents [C,h,w] of this shape."""
    wanted = (channels, *grid)
    if tuple(statistics.mean.shape) != wanted:
        raise InputError(
            found=f"{path} with statistics of shape {list(statistics.mean.shape)}",
            required=f"shape {list(wanted)}, that of the encoder's latents",
            remedy=_RECOMPUTE,
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            found=f"{path} could not be read: {error}",
            required="a safetensors file with the latents' statistics",
            remedy=_RECOMPUTE,
        ) from error
