"""Several data readers against several servers that are killed one after the other: is anything lost?

    python tools/service_soak.py --seconds 120 --servers 3 --clients 4 --kill-every-s 10

Every client reads its share of the same batches through the service for as long as it is told, and keeps
a hash of each micro-batch: sample ids, latents, tokens, in the order they came. At the end the same
stream is read once more without servers. Lost, doubled, reordered or wrong data changes a hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import yaml
from rich.console import Console

COMMAND = Path(sys.executable).with_name("dsr-scale")
START_S = 180.0

RUN = {
    "name": "soak",
    "data": {
        "shards": "package:emoji",
        "max_samples": 512,
        "resolution": 64,
        "crop": "random",
        "workers": 2,
    },
    "encoders": {"image": {"kind": "pixels", "patch": 8}, "text": {"kind": "bytes"}},
    "encoder": {"mode": "service", "request_timeout_s": 10.0},
    "model": {"width": 32, "depth": 2, "heads": 2, "conditioning": {"kind": "cross_attention"}},
    "training": {"steps": 1, "global_batch_images": 32, "microbatch_images": 4},
}


@dataclass(frozen=True)
class Report:
    """What happened."""

    seconds: float
    servers: int
    clients: int
    kills: int
    microbatches: int
    """Over all clients."""
    wrong: int
    """Micro-batches whose hash is not that of the stream read without servers."""


def soak(
    folder: Path, *, seconds: float, servers: int, clients: int, kill_every_s: float
) -> Report:
    """Runs servers and clients; kills a random server every `kill_every_s`."""
    from dsr_scale.encode_service.registry import entries_in

    config = folder / "soak.yaml"
    config.write_text(yaml.safe_dump({**RUN, "directory": str(folder / "run")}))
    registry = folder / "run" / "encoder_servers"
    commands = [subprocess.Popen([str(COMMAND), "serve", str(config)]) for _ in range(servers)]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    files = [folder / f"client_{rank}.jsonl" for rank in range(clients)]
    readers = [
        context.Process(target=read_until, args=(config, rank, clients, files[rank], stop))
        for rank in range(clients)
    ]
    draw = random.Random(0)
    kills = 0
    try:
        for reader in readers:
            reader.start()
        wait_for(lambda: all(file.exists() and file.stat().st_size for file in files))
        started_s = time.monotonic()
        while time.monotonic() - started_s < seconds:
            time.sleep(kill_every_s)
            # A killed server stands in the registry until its successor sweeps up.
            registered = [entry.process for _, entry in entries_in(registry)]
            running = [process for process in registered if Path(f"/proc/{process}").exists()]
            if running:
                os.kill(draw.choice(running), signal.SIGKILL)
                kills += 1
        elapsed_s = time.monotonic() - started_s
        stop.set()
        for reader in readers:
            reader.join(START_S)
            assert reader.exitcode == 0, "a client failed"
    finally:
        for reader in readers:
            if reader.is_alive():
                reader.kill()
        for command in commands:
            command.terminate()
            command.wait()
    received = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    wrong = 0
    for rank, hashes in enumerate(received):
        wanted = stream_hashes(config, rank, clients, through_service=False)
        wrong += sum(got != next(wanted) for got in hashes)
    total = sum(map(len, received))
    return Report(elapsed_s, servers, clients, kills, total, wrong)


def read_until(config: Path, rank: int, world: int, file: Path, stop: Event) -> None:
    """A client: reads until `stop`, then writes its hashes as the last line of `file`."""
    hashes: list[str] = []
    for digest in stream_hashes(config, rank, world, through_service=True):
        if not hashes:
            file.write_text("[]\n")
        hashes.append(digest)
        if stop.is_set():
            break
    with file.open("a") as out:
        out.write(json.dumps(hashes) + "\n")


def stream_hashes(config: Path, rank: int, world: int, *, through_service: bool) -> Iterator[str]:
    """A hash of each micro-batch of one of `world` readers, for ever."""
    import torch

    from dsr_scale.config.load import load_run
    from dsr_scale.data.loader import BatchStream, open_samples
    from dsr_scale.encode_service.client import ServiceClient
    from dsr_scale.encode_service.local import build_local

    run = load_run(config)
    client = None
    if through_service:
        stranger = ServiceClient(run, speaks=rank == 0)
        client = stranger.bound_to(stranger.agree())
        stranger.close()
    encoders = build_local(run, torch.device("cpu"))
    stream = BatchStream(
        open_samples(run.data),
        run.data,
        seed=run.seed,
        global_batch_images=run.training.global_batch_images,
        microbatch_images=run.training.microbatch_images,
        rank=rank,
        world_size=world,
        encoder=client,
        start_method="spawn" if through_service else "fork",
    )
    try:
        for batches in stream.steps(0):
            for batch in batches:
                encoded = batch.encoded
                if encoded is None:
                    assert batch.images is not None
                    encoded = encoders.encode(batch.images, batch.captions)
                state = hashlib.blake2b(batch.sample_ids.numpy().tobytes())
                for tensor in (encoded.latents, encoded.tokens, encoded.mask):
                    assert tensor is not None
                    state.update(tensor.contiguous().numpy().tobytes())
                yield state.hexdigest()
    finally:
        stream.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def main() -> None:
    """Runs it as told on the command line; the exit status says whether all was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--kill-every-s", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            Path(folder),
            seconds=options.seconds,
            servers=options.servers,
            clients=options.clients,
            kill_every_s=options.kill_every_s,
        )
    Console().print_json(data=asdict(report))
    sys.exit(report.wrong > 0)


if __name__ == "__main__":
    main()
