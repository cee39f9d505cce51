"""Step time of a trainer whose latents are made in its process, by a server, or read from a cache.

Each `encoder.mode` has a trainer of its own, with the feed and the engine that training builds; start-up
is left out. A visit starts the data workers, lets them fill their queues, and then

    queues full │ warm-up: uses up what was ready │ measured steps │ queues full
                │                                 └ wall, waiting ─┘           │
                └───────────────── CPU time ───────────────────────────────────┘

so CPU time is that of exactly these steps' images, of trainer, data workers and server.

Without a GPU trainer and server share the cores, so a server cannot win: it adds its messages to the same
work. CPU time per image of all processes is then the figure; wall time has no aim. On one GPU, which
they share, a server cannot win either; with a second it has that one. There wall time is the figure: a
host that waits for its GPU spins. Waiting is the host's, for its batch; what a GPU has queued goes on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsr_scale.config.run import RunConfig
from dsr_scale.encode_service.fill import fill
from dsr_scale.parallel import groups
from dsr_scale.train.build import build_training
from dsr_scale.train.feed import StepData
from dsr_scale.train.outcomes import Outcomes
from dsr_scale.train.schedule import learning_rate
from tools.bench.protocol import Aim, Comparison, Report, Sample, Settings, compare, interleave
from tools.bench.random_vits import Geometry, encoding_run, save_vit, vit_settings
from tools.bench.ranks import in_own_process
from tools.bench.service_processes import child

MODES = ("inline", "cache", "service")
TWIN = "inline again"
OVERHEAD_AIM, NO_SLOWER = Aim(high=1.1), Aim(high=1.0)
PREFETCH_BATCHES = 2
REST_S = 0.2
"""Processes that took less than a tenth of a core for so long have nothing to do."""


class Sizes(NamedTuple):
    """Encoder, network and steps."""

    vit: Geometry | None
    """None is raw pixels, which need no library."""
    width: int
    depth: int
    batch_images: int
    """Of a step, in one micro-batch."""
    workers: int
    steps: int

    @property
    def warmup_steps(self) -> int:
        """As many as use up what the workers have ready."""
        return self.workers * PREFETCH_BATCHES + 1


SIGLIP2_B = Geometry("google/siglip2-base-patch16-256", 768, 12, 12, 3072, 16, 256)
TWO_BLOCKS = Geometry("two blocks", width=384, depth=2, heads=6, hidden=1536, patch=16, side=128)
GPU = Sizes(SIGLIP2_B, width=768, depth=12, batch_images=128, workers=6, steps=20)
CPU = Sizes(TWO_BLOCKS, width=128, depth=4, batch_images=16, workers=1, steps=5)
TINY = Sizes(None, width=32, depth=2, batch_images=2, workers=1, steps=1)


def run(settings: Settings) -> Report:
    """Three trainers that are alive together and step in turn, and one server."""
    gpus = torch.cuda.device_count()
    sizes = TINY if settings.tiny else GPU if gpus else CPU
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    server_device = torch.device("cuda", 1) if gpus > 1 else device
    image = in_own_process(_image_settings, sizes, settings.scratch, device)
    runs = {mode: _run_config(settings.scratch, image, sizes, mode, device) for mode in MODES}
    # The fork server of `ranks`, which has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    with contextlib.ExitStack() as stack:
        pools = {mode: stack.enter_context(ProcessPoolExecutor(1, context)) for mode in MODES}
        begun = [pools[mode].submit(_start, runs[mode], sizes, ()) for mode in MODES[:2]]
        _, server = stack.enter_context(child(partial(_serve, server_device), runs["service"]))
        begun.append(pools["service"].submit(_start, runs["service"], sizes, (server,)))
        for each in begun:
            each.result()
        visits = {mode: lambda mode=mode: pools[mode].submit(_visit).result() for mode in MODES}
        variants = {TWIN: visits["inline"], **visits}
        samples = interleave(variants, settings.rounds, warmup=0 if settings.tiny else 1)
    # The same latents give the same loss; later ones differ, for trainers have made unlike many steps.
    losses = [samples[mode][0]["first_loss"] for mode in MODES]
    assert all(math.isclose(loss, losses[0], rel_tol=1e-3) for loss in losses), losses
    facts: dict[str, object] = {**sizes._asdict(), "server on": str(server_device)}
    for mode in MODES:
        metrics = ("wall_s", "cpu_s", "waiting_s")
        found = ([sample[metric] for sample in samples[mode]] for metric in metrics)
        wall_s, cpu_s, waiting_s = map(statistics.median, found)
        facts[f"{mode}: images/s"] = round(sizes.batch_images / wall_s, 1)
        facts[f"{mode}: CPU ms per image"] = round(1000 * cpu_s / sizes.batch_images, 2)
        facts[f"{mode}: waiting, ms per step"] = round(1000 * waiting_s, 2)
    return Report(compare(samples, _comparisons(gpus)), samples, facts)


def _comparisons(gpus: int) -> list[Comparison]:
    """Aims for what is the figure: CPU time without a GPU, wall time with one."""
    figure, service = ("wall_s" if gpus else "cpu_s"), (NO_SLOWER if gpus > 1 else OVERHEAD_AIM)
    aims = {("cache", figure): NO_SLOWER, ("service", figure): service}
    return [
        Comparison(mode, metric, mode, "inline", (TWIN, "inline"), aims.get((mode, metric)))
        for metric in ("wall_s", "cpu_s")
        for mode in MODES[1:]
    ]


def _image_settings(sizes: Sizes, scratch: Path, device: torch.device) -> dict[str, Any]:
    """The section `encoders.image`; writes the weights that it names."""
    if sizes.vit is None:
        return {"kind": "pixels", "patch": 8}
    name, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    save_vit(scratch / "vit", sizes.vit, dtype)
    return vit_settings(scratch / "vit", sizes.vit, chunk_images=sizes.batch_images, dtype=name)


def _run_config(
    scratch: Path, image: dict[str, Any], sizes: Sizes, mode: str, device: torch.device
) -> RunConfig:
    """Captions as bytes; modes differ in `encoder.mode` alone."""
    images = sizes.batch_images
    # A worker beside gRPC is spawned, which takes longer than all the rest of a dry run.
    workers = 0 if sizes is TINY and mode == "service" else sizes.workers
    data = {"max_samples": 8 * images, "horizontal_flip": 0.0, "workers": workers}
    geometry = {"width": sizes.width, "depth": sizes.depth, "heads": max(2, sizes.width // 64)}
    # Joined requests would be decoded, encoded and answered one after the other.
    server = {"batch_images": images, "decode_threads": sizes.workers}
    return encoding_run(
        scratch,
        image,
        32 if sizes.vit is None else sizes.vit.side,
        data={**data, "prefetch_batches": PREFETCH_BATCHES},
        encoders={"text": {"kind": "bytes"}},
        encoder={"mode": mode, "cache": str(scratch / "cache"), "server": server},
        model={**geometry, "registers": {"count": 4}, "conditioning": {"kind": "cross_attention"}},
        training={
            "global_batch_images": images,
            "microbatch_images": images,
            "precision": "bf16" if device.type == "cuda" else "fp32",
            "device": device.type,
        },
    )


def _serve(device: torch.device, config: RunConfig, messages: Connection) -> None:
    from dsr_scale.encode_service.serving import run_server

    torch.set_num_threads(1)
    run_server(config, device, config.encoder.server.listen, messages.send)


class _Trainer:
    """A training that goes on from visit to visit."""

    def __init__(self, config: RunConfig, sizes: Sizes, clocks: Sequence[int]) -> None:
        self._sizes = sizes
        self._clocks = clocks
        self._training = build_training(config, groups.start(config.training.device))
        self._outcomes = Outcomes()
        self._done = 0
        self._first_loss = math.nan

    def visit(self) -> Sample:
        """Seconds of a step: wall time, CPU time of all processes, and waiting for data."""
        sizes = self._sizes
        arrivals = self._training.feed.steps(self._done)
        data = next(arrivals)
        workers = [each.pid for each in multiprocessing.active_children() if each.pid]
        clocks = [*self._clocks, *map(_cpu_clock, workers)]
        cpu_s = _cpu_at_rest_s(clocks)
        started = waiting_s = 0.0
        for number in range(sizes.warmup_steps + sizes.steps):
            if number == sizes.warmup_steps:
                self._finish()
                started, waiting_s = time.perf_counter(), 0.0
            self._step(data)
            asked = time.perf_counter()
            data = next(arrivals)
            waiting_s += time.perf_counter() - asked
        self._finish()
        wall_s = time.perf_counter() - started
        cpu_s = _cpu_at_rest_s(clocks) - cpu_s
        self._training.feed.close()
        return {
            "wall_s": wall_s / sizes.steps,
            "cpu_s": cpu_s / (sizes.warmup_steps + sizes.steps),
            "waiting_s": waiting_s / sizes.steps,
            "first_loss": self._first_loss,
        }

    def _step(self, data: StepData) -> None:
        engine, step = self._training.engine, self._done
        loss = engine.forward_backward(data.examples)
        rate = learning_rate(self._training.run.training, step)
        values = engine.step(loss, step=step, learning_rate=rate)
        # As in training, the host waits for the step before: it queues no more than two.
        self._outcomes.push(step + 1, values, [])
        self._done += 1
        if step == 0:
            self._first_loss = loss.item()

    def _finish(self) -> None:
        self._outcomes.flush()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


_trainers: list[_Trainer] = []


def _start(config: RunConfig, sizes: Sizes, clocks: Sequence[int]) -> None:
    torch.set_num_threads(1)
    if config.encoder.mode == "cache" and config.encoder.cache is not None:
        device = torch.device(config.training.device)
        fill(config, Path(config.encoder.cache), device=device, decode_threads=sizes.workers)
    _trainers.append(_Trainer(config, sizes, clocks))


def _visit() -> Sample:
    return _trainers[0].visit()


def _cpu_clock(pid: int) -> int:
    """What clock_getcpuclockid gives on Linux."""
    return ~pid << 3 | 2


def _cpu_at_rest_s(clocks: Sequence[int]) -> float:
    """CPU time of this process and of `clocks`, once these have nothing to do."""
    before = -math.inf
    while (now := sum(map(time.clock_gettime, clocks))) - before > 0.1 * REST_S:
        before = now
        time.sleep(REST_S)
    return now + time.process_time()
