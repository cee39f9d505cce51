"""Which images are drawn for an evaluation, and drawing any part of them.

A set is a list of prompts; image i has prompt i and the noise of (seed, i). So a set is the same
whatever the batch size and however it is divided among processes, and the first N of a larger set are
the set of N.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import Sample, UnusableRecord
from dsr_scale.data.shares import WHOLE, Share
from dsr_scale.export.pipeline import Pipeline


@dataclass(frozen=True)
class SampleSet:
    """The prompts of N images: captions, or class numbers as text."""

    prompts: tuple[str, ...]
    source: str
    """For people: where the prompts come from."""

    def __len__(self) -> int:
        return len(self.prompts)


class Drawn(NamedTuple):
    """Neighbouring images of a set."""

    first_index: int
    images: Tensor
    """uint8 [B,3,H,W] on the pipeline's device."""
    prompts: tuple[str, ...]


def share_of(count: int, share: Share) -> range:
    """A process's share of `count` things; one may be longer by 1 than another, or empty."""
    return range(count * share.index // share.of, count * (share.index + 1) // share.of)


def class_balanced(shape: ModelShape, count: int) -> SampleSet:
    """Every class as often as every other, one more at most, in turn.

    Raises InputError for a model without classes.
    """
    if shape.conditioning.kind != "class":
        raise InputError(
            found=f"a class-balanced set for a model conditioned by {shape.conditioning.kind}",
            required="a class-conditional model",
            remedy="give prompts with --prompts-file, or captions of a data set with --data",
        )
    classes = shape.conditioning.num_classes
    prompts = tuple(str(index % classes) for index in range(count))
    return SampleSet(prompts, f"{classes} classes in turn")


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank. Raises InputError for none, and for no text file."""
    try:
        # Not splitlines, for which a prompt may also end at a separator inside it, as of U+2028.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            found=f"{file} cannot be read: {error}",
            required="a UTF-8 text file with one prompt per line",
            remedy="correct the path or convert the file",
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(
            found=f"no prompt in {file}",
            required="one prompt per line",
            remedy="add prompts to the file",
        )
    return prompts


def prompts_in_turn(file: Path, count: int | None) -> SampleSet:
    """`count` images (None: one per prompt) for the prompts of a file, from the first on when they end."""
    prompts = read_prompts(file)
    total = count or len(prompts)
    return SampleSet(tuple(prompts[i % len(prompts)] for i in range(total)), _named(file, prompts))


def prompts_of_images(file: Path, images: int) -> SampleSet:
    """Line i is the prompt of image i. Raises InputError unless there are as many."""
    prompts = read_prompts(file)
    if len(prompts) != images:
        raise InputError(
            found=f"{len(prompts)} prompts in {file}, {images} images",
            required="one prompt per image, in the order of the images' names",
            remedy="give the file that the images were drawn from",
        )
    return SampleSet(prompts, _named(file, prompts))


def _named(file: Path, prompts: Sequence[str]) -> str:
    """The file, and a digest of its prompts by which another file of that name is told."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return f"{file} ({digest})"


def captions_of(data: DataConfig, shape: ModelShape, count: int | None) -> SampleSet:
    """The conditions of `count` (None: all) samples spread evenly over a data set.

    Raises InputError when there are fewer, and for a sample without caption or class.
    """
    samples = open_samples(data)
    positions = spread(len(samples), count, data.shards)
    prompts = []
    for position in positions:
        try:
            prompts.append(prompt_of(samples.read(position), shape, data.label_field))
        except UnusableRecord as error:
            raise unusable_sample(data, position, error) from error
    return SampleSet(tuple(prompts), f"{data.shards} ({samples.fingerprint})")


def spread(available: int, count: int | None, where: str) -> list[int]:
    """`count` (None: all) positions spread evenly over 0 … available − 1.

    Raises InputError when there are fewer.
    """
    if count is not None and count > available:
        raise InputError(
            found=f"{available} samples in {where}",
            required=f"{count} samples",
            remedy=f"ask for at most {available}, or give more data",
        )
    total = count or available
    return [number * available // total for number in range(total)]


def prompt_of(sample: Sample, shape: ModelShape, label_field: str) -> str:
    """What a model of `shape` is conditioned on for a sample: its first caption, or its class.

    Raises UnusableRecord for a sample that has none.
    """
    if shape.conditioning.kind != "class":
        if not sample.captions:
            raise UnusableRecord(sample.key, "no caption")
        return sample.captions[0].text
    label = sample.metadata.get(label_field)
    if not isinstance(label, int) or not 0 <= label < shape.conditioning.num_classes:
        raise UnusableRecord(
            sample.key, "no class", f"{label_field} = {label!r} in its metadata is no class number"
        )
    return str(label)


def unusable_sample(data: DataConfig, position: int, error: Exception) -> InputError:
    """The error of an evaluation whose sample `position` cannot be used: here each one counts."""
    return InputError(
        found=f"sample {position} of {data.shards}: {error!r}",
        required="a readable image with a caption (or a class) in every sample that is evaluated",
        remedy="pack the data again, which leaves such samples out",
    )


def draw(
    pipeline: Pipeline,
    samples: SampleSet,
    *,
    seed: int,
    sampling: SamplingConfig,
    batch: int,
    share: Share = WHOLE,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Drawn]:
    """Draws a share of a set, `batch` images at a time."""
    indices = share_of(len(samples), share)
    for start in range(indices.start, indices.stop, batch):
        prompts = samples.prompts[start : min(start + batch, indices.stop)]
        with torch.inference_mode():
            latents = pipeline.latents(
                prompts, seed=seed, sampling=sampling, first_index=start, on_step=on_step
            )
            images = pipeline.decoder.decode(latents)
        yield Drawn(start, images, prompts)
