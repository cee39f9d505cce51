"""Mean and variance of latents over a data set, per channel and position, in one pass.

Batches and partial results are merged by the pairwise update of Chan, Golub and LeVeque in
float64, so that the order of batches and the split over processes do not matter beyond rounding.
The file names the encoder it belongs to and what was done about its outliers, and is refused for any
other: whitening with the wrong statistics trains without an error and samples badly. A file of one
share of a data set is refused too, until all shares are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from dsr_scale.base.atomic_files import write_bytes
from dsr_scale.base.errors import InputError

_RECOMPUTE = (
    "compute the statistics for this encoder and resolution with `dsr-scale stats`, or name the "
    "right file"
)


@dataclass(frozen=True)
class StatisticsIdentity:
    """What latents the statistics are of."""

    encoder: str
    """What the encoder is called: `encoders.image.name`, or else `encoders.image.model`."""
    revision: str | None
    """Commit of the hub repository, if pinned."""
    resolution: int
    """Side of the square image, in pixels."""
    treatment: str = "none"
    """What is done about outliers, as `outliers.treatment_identity` says; files without it are of
    an encoder without treatment."""

    def metadata(self) -> dict[str, str]:
        """As the strings that safetensors keeps; an unpinned revision is empty."""
        return {name: "" if value is None else str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class StatisticsSource:
    """Which images statistics were computed from."""

    data_set: str
    """Names the whole set, the same in all its shares."""
    fingerprint: str
    """Of the images of this share."""
    share: int = 0
    """0 ≤ share < shares."""
    shares: int = 1

    def metadata(self) -> dict[str, str]:
        """As the strings that safetensors keeps."""
        return {name: str(value) for name, value in asdict(self).items()}


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


def save_statistics(
    path: Path,
    statistics: LatentStatistics,
    identity: StatisticsIdentity,
    source: StatisticsSource | None = None,
) -> None:
    """Writes `mean` and `variance` float64 [C,h,w] as safetensors, atomically.

    Raises InputError when the disk is full or the path is not writable.
    """
    from safetensors.torch import save

    tensors = {
        "mean": statistics.mean.cpu().contiguous(),
        "variance": statistics.variance.cpu().contiguous(),
    }
    metadata = {**identity.metadata(), "count": str(statistics.count)}
    if source is not None:
        metadata |= source.metadata()
    write_bytes(path, save(tensors, metadata=metadata))


def load_statistics(path: Path, identity: StatisticsIdentity) -> LatentStatistics:
    """Reads what `save_statistics` wrote of a whole data set; the result can be merged with more.

    Raises InputError when the file is missing, unreadable, of another encoder or of a share only.
    """
    statistics, metadata = _load(path, identity)
    if metadata.get("shares", "1") != "1":
        raise InputError(
            found=f"{path} with statistics of share {metadata['share']}/{metadata['shares']}",
            required="statistics of a whole data set",
            remedy="merge all shares with `dsr-scale stats CONFIG --merge FILE --merge FILE …`",
        )
    return statistics


def load_shares(
    paths: Sequence[Path], identity: StatisticsIdentity
) -> list[tuple[LatentStatistics, StatisticsSource]]:
    """The shares of one data set, each exactly once, by number.

    Raises InputError when one is missing, doubled, of another data set or of another encoder.
    """
    if not paths:
        raise InputError(
            found="no files to merge",
            required="the files of all shares",
            remedy="name each with --merge FILE, or the folder that holds them",
        )
    shares: dict[int, tuple[Path, LatentStatistics, StatisticsSource]] = {}
    for path in paths:
        statistics, metadata = _load(path, identity)
        source = _source(path, metadata)
        first_path, _, first = next(iter(shares.values()), (path, statistics, source))
        if (source.data_set, source.shares) != (first.data_set, first.shares):
            raise InputError(
                found=f"{first_path} of data set {first.data_set} in {first.shares} shares, {path} "
                f"of {source.data_set} in {source.shares}",
                required="shares of one data set, cut the same way",
                remedy="compute all shares with the same images, --count and number of shares",
            )
        if source.share in shares:
            raise InputError(
                found=f"share {source.share}/{source.shares} in {shares[source.share][0]} and {path}",
                required="every share once",
                remedy="leave one of the two out",
            )
        shares[source.share] = (path, statistics, source)
    wanted = next(iter(shares.values()))[2].shares
    missing = sorted(set(range(wanted)) - shares.keys())
    if missing:
        raise InputError(
            found=f"{len(shares)} of {wanted} shares",
            required=f"also {', '.join(f'{number}/{wanted}' for number in missing[:8])}"
            + (", …" if len(missing) > 8 else ""),
            remedy="compute the missing shares and merge all of them at once",
        )
    return [shares[number][1:] for number in range(wanted)]


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


def _load(path: Path, identity: StatisticsIdentity) -> tuple[LatentStatistics, dict[str, str]]:
    tensors, metadata = _read(path)
    if "count" not in metadata or not {"mean", "variance"} <= tensors.keys():
        raise InputError(
            found=f"{path} with tensors {sorted(tensors)} and metadata {sorted(metadata)}",
            required="tensors mean and variance, and metadata encoder, revision, resolution, count",
            remedy=_RECOMPUTE,
        )
    wanted = identity.metadata()
    held = {name: metadata.get(name, "") for name in wanted}
    held["treatment"] = metadata.get("treatment", "none")
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
    return LatentStatistics(count, mean, variance * count), metadata


def _source(path: Path, metadata: dict[str, str]) -> StatisticsSource:
    fields = {"data_set", "fingerprint", "share", "shares"}
    if not fields <= metadata.keys():
        raise InputError(
            found=f"{path} without {', '.join(sorted(fields - metadata.keys()))} in its metadata",
            required="statistics of one share, as `dsr-scale stats --share i/n` writes them",
            remedy="compute the share again",
        )
    return StatisticsSource(
        metadata["data_set"],
        metadata["fingerprint"],
        int(metadata["share"]),
        int(metadata["shares"]),
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
