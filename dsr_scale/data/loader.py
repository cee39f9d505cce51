"""From a step number to this rank's micro-batches, decoded in worker processes.

The parent decides *which* samples (`buckets.BatchPlan`, a pure function of the step), the workers
decide nothing: a request names epoch, sample ids and image size, and the answer depends on those
and the seed only. So the number of workers and ranks changes the speed, never the data, and a run
resumes from its step number. `torch.utils.data.DataLoader` moves requests and answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.buckets import BatchPlan
from dsr_scale.data.captions import choose_caption, drop_condition
from dsr_scale.data.corruption import REPLACEMENT_ATTEMPTS, CorruptImage, replacement_id
from dsr_scale.data.encoded import Encoded, Row, RowEncoder
from dsr_scale.data.order import SampleOrder
from dsr_scale.data.samples import Sample, Samples, UnusableRecord
from dsr_scale.data.shards import ShardStore
from dsr_scale.data.shared_memory import remove_abandoned
from dsr_scale.data.transforms import (
    UnreadableImage,
    choose_view,
    cover_and_crop,
    decode_rgb,
)
from dsr_scale.data.worker_processes import tie_to_parent


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples; every row agrees on its position in all fields."""

    images: torch.Tensor | None
    """uint8 [B, 3, H, W], RGB; None where the workers have them encoded and nobody wants both."""
    encoded: Encoded | None
    """Latents and tokens in their place."""
    captions: tuple[str, ...]
    """The chosen caption, also where `null` says that it is to be ignored; "" if there is none."""
    labels: torch.Tensor | None
    """int64 [B], 0 ≤ label < num_classes; None without classes."""
    null: torch.Tensor
    """bool [B]: the condition is dropped."""
    epochs: torch.Tensor
    """int64 [B]"""
    sample_ids: torch.Tensor
    """int64 [B]: the samples that are in the batch, so the replacements of unusable ones."""
    keys: tuple[str, ...]
    corrupt: tuple[CorruptImage, ...]
    """Samples that were asked for and could not be used."""


class Request(NamedTuple):
    """What a worker is asked for."""

    epochs: np.ndarray
    sample_ids: np.ndarray
    target: tuple[int, int]


def open_samples(config: DataConfig) -> Samples:
    """The data set that `config.shards` names, in the format it names. Raises `InputError`."""
    if config.format == "mds":
        return ShardStore(config)
    from dsr_scale.data.tars import TarStore

    return TarStore(config)


class BatchStream:
    """The endless stream of one data-parallel rank's batches, from any step."""

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        *,
        seed: int,
        global_batch_images: int,
        microbatch_images: int,
        rank: int,
        world_size: int,
        num_classes: int | None = None,
        encoder: RowEncoder | None = None,
        keep_images: bool = False,
        start_method: Literal["fork", "spawn"] = "fork",
    ) -> None:
        """`rank` and `world_size` count model replicas; raises `InputError` for uneven batches.

        Batches carry labels if there are `num_classes`; None is for data without classes. With an
        `encoder` they carry latents and tokens instead of images; what it uses may want "spawn".
        `keep_images` is for decoders, which learn images from latents: batches carry both, and a
        sample needs no caption.
        """
        assert 0 <= rank < world_size
        if config.workers:
            remove_abandoned()
        if global_batch_images % (world_size * microbatch_images):
            raise InputError(
                found=f"global batch {global_batch_images}, {world_size} data-parallel ranks, "
                f"micro-batch {microbatch_images}",
                required="a global batch divisible by ranks × micro-batch",
                remedy="change the global batch or the micro-batch",
            )
        order = SampleOrder(
            samples.shard_sizes, seed=seed, block_samples=config.shuffle_block_samples
        )
        self._plan = BatchPlan(
            order,
            global_batch_images,
            resolution=config.resolution,
            buckets=config.buckets,
            sizes=samples.sizes if config.buckets else None,
        )
        rank_images = global_batch_images // world_size
        self._rows = range(rank * rank_images, (rank + 1) * rank_images, microbatch_images)
        self._microbatch = microbatch_images
        self._decoder = _Decoder(
            samples, config, seed, num_classes, encoder, keep_images=keep_images
        )
        self._config = config
        self._encodes = encoder is not None
        self._start_method = start_method
        self._iterator: Iterator[Batch | InputError] | None = None

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of optimizer steps first_step, first_step + 1, …, for ever.

        Workers start at once and end with `close`, with a new call of `steps`, or with the thread
        that started them.
        """
        workers = self._config.workers
        parallel: dict[str, Any] = {}
        if workers:
            parallel = {
                "prefetch_factor": self._config.prefetch_batches,
                "multiprocessing_context": self._start_method,
                "worker_init_fn": functools.partial(_start_worker, os.getpid()),
            }
        loader = DataLoader(
            self._decoder,
            batch_size=None,
            sampler=self._requests(first_step),
            num_workers=workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else it draws from, and so moves, the global one
            **parallel,
        )
        self.close()
        self._iterator = iter(loader)
        return self._taken_from(self._iterator)

    def _taken_from(self, iterator: Iterator[Batch | InputError]) -> Iterator[list[Batch]]:
        try:
            while iterator is self._iterator:
                yield [_raise_error(next(iterator)) for _ in self._rows]
        finally:
            # At once: left to the garbage collector, a worker can take 5 s to notice its end.
            if iterator is self._iterator:
                self.close()

    def close(self) -> None:
        """Ends the workers. A later call of `steps` starts new ones."""
        iterator, self._iterator = self._iterator, None
        if self._config.workers and iterator is not None:
            if self._encodes:
                _terminate_workers(iterator)
            getattr(iterator, "_shutdown_workers", lambda: None)()

    def _requests(self, first_step: int) -> Iterator[Request]:
        step = first_step
        while True:
            batch = self._plan.batch(step)
            for start in self._rows:
                rows = slice(start, start + self._microbatch)
                yield Request(batch.epochs[rows], batch.sample_ids[rows], batch.target)
            step += 1


def _terminate_workers(iterator: Any) -> None:
    """Ends workers that may be waiting for an answer: DataLoader would give each 5 s, in turn."""
    # Else their deaths are taken for accidents.
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.terminate()


def _start_worker(parent_pid: int, worker: int) -> None:
    tie_to_parent(parent_pid)


def _raise_error(answer: Batch | InputError) -> Batch:
    if isinstance(answer, InputError):
        raise answer
    return answer


def _unchanged(batch: Any) -> Any:
    return batch


class _Slot(NamedTuple):
    row: Row
    pixels: np.ndarray | None
    label: int
    null: bool
    key: str


class _Decoder(Dataset[Batch | InputError]):
    """Answers a request with a batch: reads, decodes, crops and chooses captions.

    An error for people is an answer too: raised here, DataLoader would turn it into a
    RuntimeError with a traceback for text.
    """

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        seed: int,
        num_classes: int | None,
        encoder: RowEncoder | None,
        *,
        keep_images: bool,
    ) -> None:
        self._samples = samples
        self._config = config
        self._seed = seed
        self._num_classes = num_classes
        self._encoder = encoder
        self._sends_files = encoder is not None and not encoder.wants_pixels
        self._keeps_images = keep_images or encoder is None
        self._needs_caption = num_classes is None and not keep_images

    def __getitem__(self, request: Request) -> Batch | InputError:
        try:
            return self._decode(request)
        except InputError as error:
            return error

    def _decode(self, request: Request) -> Batch:
        pairs = list(zip(request.epochs.tolist(), request.sample_ids.tolist(), strict=True))
        undecodable: dict[int, str] = {}
        filled = [self._fill(*pair, request.target, undecodable) for pair in pairs]
        images = encoded = None
        if self._encoder is not None:
            encoded = self._encode(self._encoder, pairs, filled, request.target, undecodable)
        slots = [slot for slot, _ in filled]
        if self._keeps_images:
            pixels = [slot.pixels for slot in slots if slot.pixels is not None]
            images = torch.from_numpy(np.stack(pixels))
        labels = None
        if self._num_classes is not None:
            labels = torch.tensor([slot.label for slot in slots])
        return Batch(
            images=images,
            encoded=encoded,
            captions=tuple(slot.row.caption for slot in slots),
            labels=labels,
            null=torch.tensor([slot.null for slot in slots]),
            epochs=torch.from_numpy(request.epochs.copy()),
            sample_ids=torch.tensor([slot.row.sample_id for slot in slots]),
            keys=tuple(slot.key for slot in slots),
            corrupt=tuple(record for _, unusable in filled for record in unusable),
        )

    def _encode(
        self,
        encoder: RowEncoder,
        pairs: list[tuple[int, int]],
        filled: list[_Filled],
        target: tuple[int, int],
        undecodable: dict[int, str],
    ) -> Encoded:
        """Encodes the rows of `filled`; what turns out undecodable is replaced there, as if read."""
        encoded = encoder.encode([slot.row for slot, _ in filled], target)
        failing = dict(encoded.failures)
        while failing:
            for place, reason in failing.items():
                undecodable[filled[place][0].row.sample_id] = reason
                filled[place] = self._fill(*pairs[place], target, undecodable)
            places = list(failing)
            again = encoder.encode([filled[place][0].row for place in places], target)
            encoded = encoded.replaced(places, again)
            failing = {places[index]: reason for index, reason in again.failures.items()}
        return encoded

    def _fill(
        self, epoch: int, wanted: int, target: tuple[int, int], undecodable: Mapping[int, str]
    ) -> _Filled:
        """The wanted sample, or the first usable replacement and a record of every failure."""
        failures: list[tuple[str, str, int]] = []
        sample_id = wanted
        for attempt in range(REPLACEMENT_ATTEMPTS + 1):
            try:
                sample = self._samples.read(sample_id)
                slot = self._use(sample, epoch, sample_id, target)
                if sample_id in undecodable:
                    raise UnusableRecord(sample.key, undecodable[sample_id])
            except UnusableRecord as error:
                failures.append((error.key, str(error), sample_id))
                sample_id = replacement_id(
                    wanted, attempt, samples=len(self._samples), seed=self._seed, epoch=epoch
                )
                continue
            used = slot.row.sample_id
            return slot, [CorruptImage(*failure, used) for failure in failures]
        key, reason, _ = failures[0]
        raise InputError(
            found=f"sample {key} is unusable ({reason}), and so are {REPLACEMENT_ATTEMPTS} others "
            "drawn in its place",
            required="a data set of which most samples can be used",
            remedy="check that the shards hold images with captions; pack the data again",
        )

    def _use(self, sample: Sample, epoch: int, sample_id: int, target: tuple[int, int]) -> _Slot:
        config = self._config
        identity = {"seed": self._seed, "epoch": epoch, "sample_id": sample_id}
        caption, label = "", -1
        if sample.captions:
            caption = choose_caption(sample.captions, config.caption_choice, **identity)
        elif self._needs_caption:
            raise UnusableRecord(sample.key, "no caption")
        if self._num_classes is not None:
            label = _label(sample, config.label_field, self._num_classes)
        view = choose_view(config.crop, config.horizontal_flip, **identity)
        pixels = None
        if self._keeps_images or not self._sends_files:
            try:
                decoded = decode_rgb(sample.image, config.background, target)
            except UnreadableImage as error:
                raise UnusableRecord(sample.key, str(error)) from error
            pixels = cover_and_crop(decoded, target, view)
        image = sample.image if pixels is None or self._sends_files else pixels
        null = drop_condition(config.condition_dropout, **identity)
        row = Row(sample_id, image, view, caption)
        return _Slot(row, pixels, label, null, sample.key)


_Filled = tuple[_Slot, list[CorruptImage]]


def _label(sample: Sample, field: str, num_classes: int) -> int:
    value = sample.metadata.get(field)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_classes:
        return value
    # One class beyond the last would be taken for the null class, without any sign of it.
    raise InputError(
        found=f"sample {sample.key} has {field} = {value!r} in its metadata",
        required=f"an integer from 0 to {num_classes - 1} (model.conditioning.num_classes = "
        f"{num_classes}) in the field {field} (data.label_field) of every sample",
        remedy="correct num_classes, pack the data with that field, name another field, or "
        "condition on text",
    )
