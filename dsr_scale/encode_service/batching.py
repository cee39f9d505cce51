"""The device's own thread: requests that wait together are encoded together.

Encoders give a row the same latents and tokens whatever batch it came in, so joining changes nothing but
speed. A batch that is not full waits a little for more; only requests of equal target can join. When a
batch fails its requests are tried one by one, so that a request the encoders cannot take fails alone. If
a failure is the device's, it cannot encode the warm-up image any more: then the server has to end. So it
has when a batch takes longer than any client waits: a device that hangs raises nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoder_access import ServerConfig
from dsr_scale.encode_service.local import LocalEncoders
from dsr_scale.encode_service.metrics import ServerMetrics
from dsr_scale.encode_service.watchdog import Watchdog

_LOOK_S = 0.1
"""How often a thread that is to end is looked at."""


class EncodedRows(NamedTuple):
    """What the encoders gave for one job, on the host."""

    latents: torch.Tensor
    """[M,C,h,w], one for each image of the job."""
    tokens: torch.Tensor | None
    mask: torch.Tensor | None


class AnswerSize(NamedTuple):
    """What an answer takes, in bytes, as the warm-up showed."""

    per_pixel: float
    per_caption: int
    dtype: torch.dtype
    """Of the latents."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request for the device."""

    pixels: torch.Tensor
    """uint8 [M,3,H,W]; M is 0 when the cache had every image."""
    captions: Sequence[str]
    """One for each row of the request, N ≥ M and N ≥ 1."""
    answer: Future[EncodedRows] = field(default_factory=Future)
    """Cancelling it takes the job out of the queue."""


class DeviceThread:
    """Encodes jobs one batch after the other, in the order they came."""

    def __init__(
        self,
        encoders: LocalEncoders,
        device: torch.device,
        settings: ServerConfig,
        metrics: ServerMetrics,
        broken: Callable[[Exception], None],
        limit_s: float,
    ) -> None:
        """`broken` is called when the device cannot encode any more, or takes over `limit_s` for a batch."""
        self._encoders = encoders
        self._device = device
        self._most_rows = settings.batch_images
        self._wait_s = settings.batch_wait_ms / 1000
        self._metrics = metrics
        self._broken = broken
        self._watchdog = Watchdog(limit_s, broken)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._warm_up = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        self._thread = threading.Thread(target=self._run, name="encoder device", daemon=True)

    def start(self, resolution: int) -> AnswerSize:
        """Encodes one black square of `resolution` pixels, then takes jobs. Raises what encoders raise."""
        self._warm_up = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)
        latents, tokens, _ = self._encode(self._warm_up, [""])
        self._thread.start()
        # Not before: loading and compiling take as long as they take.
        self._watchdog.start()
        per_caption = 0 if tokens is None else tokens.nbytes
        return AnswerSize(latents.nbytes / resolution**2, per_caption, latents.dtype)

    def submit(self, job: Job) -> None:
        """Puts `job` last; its `answer` is set by the device's thread."""
        with self._changed:
            self._jobs.append(job)
            self._metrics.queue_depth.set(len(self._jobs))
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the batch it is at, unless that hangs; jobs that wait are cancelled."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = list(self._jobs), deque()
            self._changed.notify()
        for job in waiting:
            job.answer.cancel()
        while self._thread.is_alive() and not self._watchdog.barked:
            self._thread.join(_LOOK_S)
        self._watchdog.close()

    def _run(self) -> None:
        while jobs := self._next_batch():
            running = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if running and not self._answer(running):
                return

    def _next_batch(self) -> list[Job]:
        """Jobs of the first one's target, waiting a little for a full batch; none when closed."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return []
                self._changed.wait()
            full_by_s = time.monotonic() + self._wait_s
            while True:
                chosen = self._joinable()
                left_s = full_by_s - time.monotonic()
                full = sum(len(job.captions) for job in chosen) >= self._most_rows
                if full or left_s <= 0 or self._closed:
                    break
                self._changed.wait(left_s)
            self._jobs = deque(job for job in self._jobs if job not in chosen)
            self._metrics.queue_depth.set(len(self._jobs))
            return chosen

    def _joinable(self) -> list[Job]:
        """The first job and those after it that fit beside it."""
        chosen: list[Job] = []
        rows = 0
        for job in self._jobs:
            fits = not chosen or rows + len(job.captions) <= self._most_rows
            if fits and (not chosen or job.pixels.shape[1:] == chosen[0].pixels.shape[1:]):
                chosen.append(job)
                rows += len(job.captions)
        return chosen

    def _answer(self, jobs: list[Job]) -> bool:
        """Sets the jobs' answers; False when the device is broken."""
        try:
            rows = self._encode_joined(jobs)
        except Exception as error:
            failure = error
        else:
            for job, encoded in zip(jobs, rows, strict=True):
                job.answer.set_result(encoded)
            return True
        if len(jobs) > 1:
            works = [self._answer([job]) for job in jobs]
            return all(works)
        jobs[0].answer.set_exception(failure)
        return isinstance(failure, InputError) or self._device_works()

    def _device_works(self) -> bool:
        try:
            self._encode(self._warm_up, [""])
        except Exception as error:
            self._broken(error)
            return False
        return True

    def _encode_joined(self, jobs: list[Job]) -> list[EncodedRows]:
        pixels = jobs[0].pixels if len(jobs) == 1 else torch.cat([job.pixels for job in jobs])
        captions = [caption for job in jobs for caption in job.captions]
        self._metrics.batch_images.observe(len(captions))
        with self._timed():
            latents, tokens, mask = self._encode(pixels, captions)
        images = latents.split([len(job.pixels) for job in jobs])
        if tokens is None or mask is None:
            return [EncodedRows(part, None, None) for part in images]
        lengths = [len(job.captions) for job in jobs]
        parts = zip(images, tokens.split(lengths), mask.split(lengths), strict=True)
        return [EncodedRows(*part) for part in parts]

    def _encode(self, pixels: torch.Tensor, captions: Sequence[str]) -> EncodedRows:
        """Never more than `batch_images` at once, whatever one request holds."""
        n = self._most_rows
        parts = []
        for start in range(0, len(pixels), n):
            with self._watchdog.watching():
                parts.append(self._encoders.latents(pixels[start : start + n]))
        latents = _joined(parts) if parts else torch.empty(0)
        if self._encoders.text is None:
            return EncodedRows(latents, None, None)
        tokens, masks = [], []
        for start in range(0, len(captions), n):
            with self._watchdog.watching(), torch.inference_mode():
                text = self._encoders.text.encode(captions[start : start + n])
                tokens.append(text.tokens.cpu())
                masks.append(text.mask.cpu())
        return EncodedRows(latents, _joined(tokens), _joined(masks))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts seconds between CUDA events, or on the clock where there is no CUDA."""
        if self._device.type != "cuda":
            started_s = time.perf_counter()
            yield
            self._metrics.encode_seconds.inc(time.perf_counter() - started_s)
            return
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            end.synchronize()
        self._metrics.encode_seconds.inc(start.elapsed_time(end) / 1000)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    # torch.cat copies a single tensor too.
    return parts[0] if len(parts) == 1 else torch.cat(parts)
