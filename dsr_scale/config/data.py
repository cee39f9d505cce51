"""Where samples come from and what is done to them on the way to the encoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsr_scale.config.section import Section

Pixels = Annotated[int, Field(gt=0)]
Colour = Annotated[int, Field(ge=0, le=255)]


class DataConfig(Section):
    """Image-caption shards and the deterministic choices made on every sample."""

    shards: str
    """Directory or URL (`s3://`, `gs://`, `http://`) of packed MDS shards or of webdataset tars,
    or `package:emoji` for the pack that ships with this package."""

    format: Literal["mds", "webdataset"] = "mds"
    """`mds` for what `dsr-scale pack` writes; `webdataset` reads tars as they are."""

    cache_directory: str | None = None
    """Where remote shards are kept. Required for a URL."""

    cache_limit_gib: float | None = Field(default=None, gt=0)
    """Least recently used shards are removed over this size, in GiB. None keeps all."""

    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first samples of the pack; for trials."""

    resolution: int = Field(default=256, gt=0)
    """Side of the square training image, in pixels."""

    buckets: tuple[tuple[Pixels, Pixels], ...] = ()
    """(height, width) pairs in pixels for aspect-ratio bucketing; empty means squares of `resolution`."""

    crop: Literal["center", "random"] = "center"
    """The image is scaled to cover the target, then cropped."""

    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a mirrored image."""

    caption_choice: Literal["weighted", "first"] = "weighted"
    """Which of a sample's captions is used: drawn by weight for each epoch, or always the first."""

    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that a sample trains the unconditional branch (needed for guidance)."""

    label_field: str = "label"
    """Metadata field that holds the integer class, for class conditioning."""

    background: tuple[Colour, Colour, Colour] = (255, 255, 255)
    """RGB colour under transparent pixels."""

    max_corrupt_rate: float = Field(default=0.001, ge=0, le=1)
    """Share of unreadable images over which the run stops; below it each is named in the log."""

    shuffle_block_samples: int = Field(default=262_144, gt=0)
    """Samples are shuffled within blocks of whole shuffled shards of about this many samples."""

    workers: int = Field(default=4, ge=0)
    """Decoding processes per rank; 0 decodes in the training process."""

    prefetch_batches: int = Field(default=4, gt=0)
    """Micro-batches each worker keeps ready."""
