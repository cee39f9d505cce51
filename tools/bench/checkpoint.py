"""Checkpoint bandwidth against plain files of the same bytes, and how long a save holds up the loop.

Writes end with fsync; before a read the kernel is asked to forget the file. A plain write is one file
from memory, so the save's share is its copy, its checksums and DCP's formats. `verify` reads every
byte once more, as a resume does before it loads.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path

import torch

from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.checkpoint.tensors import load_pieces
from dsr_scale.checkpoint.verification import verify
from dsr_scale.config.parallel import ParallelConfig
from dsr_scale.parallel.zero import ZeroEngine
from tools.bench import workload
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Sample,
    Samples,
    Settings,
    Variant,
    compare,
    interleave,
    timed,
)
from tools.bench.ranks import in_own_process

AIM = Aim(low=0.8)
BANDWIDTH, BLOCKED = "bytes_per_s", "blocked_s"


def run(settings: Settings) -> Report:
    """Saves and loads of an engine's state in turn with plain files."""
    sizes = (
        {"width": 32, "depth": 2, "heads": 2, "grid": 4, "registers": 4}
        if settings.tiny
        else {"width": 768, "depth": 4, "heads": 12, "grid": 16, "registers": 36}
    )
    samples, facts = in_own_process(measure, sizes, settings)
    writes, reads = ("raw write again", "raw write"), ("raw read again", "raw read")
    copies = "copy again", "copy"
    rows = compare(
        samples,
        [
            Comparison("save", BANDWIDTH, "save", "raw write", writes, AIM),
            Comparison("save", "cpu_s", "save", "raw write", writes),
            Comparison("load", BANDWIDTH, "load", "raw read", reads, AIM),
            Comparison("verify", BANDWIDTH, "verify", "raw read", reads),
            Comparison("load", "cpu_s", "load", "raw read", reads),
            Comparison("loop held up by a save", BLOCKED, "save", "copy", copies, Aim(high=1.1)),
        ],
    )
    return Report(rows, samples, {**sizes, **facts})


def measure(sizes: dict[str, int], settings: Settings) -> tuple[Samples, dict[str, object]]:
    """The samples, and what explains them."""
    torch.set_num_threads(1)
    training = workload.training_config(images=1, microbatch=1, device="cpu", precision="fp32")
    engine, _ = workload.start_engine(workload.class_shape(**sizes), training, ParallelConfig())
    files = _Files(engine, settings.scratch)
    first = files.save()[BLOCKED]
    samples = interleave(files.variants(), settings.rounds)
    later = statistics.median(sample[BLOCKED] for sample in samples["save"])
    return samples, {
        "bytes": files.bytes,
        "pieces": len(list(engine.pieces(owned=True))),
        "first save holds up, over later ones": round(first / later, 2),
    }


class _Files:
    """The state of an engine as a checkpoint and as one plain file."""

    def __init__(self, engine: ZeroEngine, scratch: Path) -> None:
        self._engine = engine
        self._scratch = scratch
        self._writer = CheckpointWriter(None)
        self._content = torch.cat([piece.tensor.reshape(-1) for piece in engine.pieces(owned=True)])
        self._target = torch.empty_like(self._content)
        self._checkpoint = scratch / "checkpoint"
        self._raw = scratch / "raw"
        self.bytes = self._content.nbytes

    def variants(self) -> dict[str, Variant]:
        """Everything that is compared; a read finds what the write before it left."""
        return {
            "copy": self._copy,
            "copy again": self._copy,
            "raw write": self._write_raw,
            "raw write again": self._write_raw,
            "save": self.save,
            "raw read": self._read_raw,
            "raw read again": self._read_raw,
            "load": self._load,
            "verify": self._verify,
        }

    def save(self) -> Sample:
        """A whole save; what of it the caller waits for is `blocked_s`."""
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        blocked = 0.0

        def save() -> None:
            nonlocal blocked
            blocked = self._writer.start(
                self._checkpoint, self._engine.pieces(owned=True), {"step": 0}
            )
            self._writer.wait()

        return {**self._with_bandwidth(timed(save)), BLOCKED: blocked}

    def _copy(self) -> Sample:
        sample = timed(lambda: self._target.copy_(self._content))
        return {**sample, BLOCKED: sample["wall_s"]}

    def _write_raw(self) -> Sample:
        self._raw.unlink(missing_ok=True)
        memory = self._content.numpy().data

        def write() -> None:
            with self._raw.open("wb", buffering=0) as file:
                written = file.write(memory)
                assert written == self.bytes
                os.fsync(file.fileno())

        return self._with_bandwidth(timed(write))

    def _read_raw(self) -> Sample:
        forget(self._raw)
        memory = self._target.numpy().data.cast("B")

        def read() -> None:
            with self._raw.open("rb", buffering=0) as file:
                found = 0
                while count := file.readinto(memory[found:]):
                    found += count
                assert found == self.bytes

        return self._with_bandwidth(timed(read))

    def _load(self) -> Sample:
        self._forget_checkpoint()
        return self._with_bandwidth(
            timed(lambda: load_pieces(self._checkpoint, self._engine.pieces(owned=False)))
        )

    def _verify(self) -> Sample:
        self._forget_checkpoint()
        problems: list[str] = []
        sample = timed(lambda: problems.extend(verify(self._checkpoint)))
        assert not problems, problems
        return self._with_bandwidth(sample)

    def _forget_checkpoint(self) -> None:
        for path in self._checkpoint.iterdir():
            forget(path)

    def _with_bandwidth(self, sample: Sample) -> Sample:
        return {**sample, BANDWIDTH: self.bytes / sample["wall_s"]}


def forget(path: Path) -> None:
    """Asks the kernel to drop a file's pages; what was written must be on disk already."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
