"""What one node can say about itself: its GPUs, room on disks, memory, limits of its processes.

GPUs are asked about through `nvidia-smi`: it needs no torch and makes no CUDA context, and a driver that
hangs hangs that process and not this one. What only a comparison of nodes shows is judged elsewhere
(`preflight_verdict`).
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warning", "failed"]

GIB = 2**30
MOST_USED_MIB = 2048
"""Memory of a GPU that its driver may hold while nobody uses it."""
LEAST_BYTES, COMFORTABLE_BYTES = GIB, 8 * GIB
"""Of shared memory, of temporary files and of the data cache: below the first workers fail, below the
second they may."""
LEAST_MEMORY_BYTES, COMFORTABLE_MEMORY_BYTES = 2 * GIB, 16 * GIB
COMFORTABLE_OPEN_FILES = 4096
NVIDIA_SMI_TIMEOUT_S = 15.0
SHARED_MEMORY = Path("/dev/shm")

_FIELDS = (
    "index,uuid,name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"
)


@dataclass(frozen=True)
class Result:
    """How one check came out on one node."""

    check: str
    """Its name, the same on all nodes."""
    state: State
    value: str
    """What was measured, for a table."""
    found: str = ""
    """With `required` and `remedy`, the three parts of a problem; empty where there is none."""
    required: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Needs:
    """What a run asks of every node."""

    gpus: int
    """0 on CPU nodes."""
    run_directory: Path
    checkpoint_bytes: int
    """Checkpoints that the run directory still has to take."""
    data_cache: Path | None
    colocated_encoders: bool = False
    """Encoder servers hold memory of the same GPUs."""
    named_encoders: tuple[str, ...] = ()
    """host:port of servers that the run file names."""
    announced_encoders: tuple[str, ...] = ()
    """host:port of servers that announced themselves; some may be gone."""
    uses_encoders: bool = False
    requires_encoders: bool = False
    """Whether it is a failure that no server answers yet."""


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    index: int
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    driver: str
    uncorrected_errors: int
    """Since the driver was loaded; 0 where the GPU does not count them."""


class GpuQueryError(Exception):
    """nvidia-smi is missing, hangs, or reports that a GPU does not work."""


def place_results(needs: Needs) -> list[Result]:
    """Room on disks and in memory, and limits of processes."""
    return [
        checkpoint_room(needs.run_directory, needs.checkpoint_bytes),
        *(() if needs.data_cache is None else (scratch_room("data cache", needs.data_cache),)),
        scratch_room("temporary files", Path(tempfile.gettempdir())),
        scratch_room("shared memory", SHARED_MEMORY),
        _memory(),
        _open_files(),
    ]


def query_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that processes here may use, in the order in which ranks take them.

    Raises GpuQueryError.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise GpuQueryError("there is no nvidia-smi on PATH") from None
    except subprocess.TimeoutExpired:
        raise GpuQueryError(f"nvidia-smi did not answer in {NVIDIA_SMI_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise GpuQueryError(f"nvidia-smi cannot be run: {error.strerror}") from None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode != 0:
        said = lines[-1].strip() if lines else "nothing"
        raise GpuQueryError(f"nvidia-smi ended with status {done.returncode}: {said}")
    try:
        gpus = [_parse_gpu(line) for line in done.stdout.splitlines() if line.strip()]
    except ValueError:
        raise GpuQueryError(f"nvidia-smi printed {lines[0].strip()!r}") from None
    return _visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))


def _parse_gpu(line: str) -> Gpu:
    index, uuid, name, total, used, driver, errors = (part.strip() for part in line.split(","))
    return Gpu(
        int(index),
        uuid,
        name,
        int(total),
        int(used),
        driver,
        int(errors) if errors.isdigit() else 0,
    )


def _visible(gpus: Sequence[Gpu], chosen: str | None) -> list[Gpu]:
    """Those of CUDA_VISIBLE_DEVICES, in its order; like CUDA, it ends at the first unknown entry."""
    if chosen is None:
        return list(gpus)
    found = []
    for entry in chosen.split(","):
        entry = entry.strip()
        fitting = [
            gpu for gpu in gpus if entry and (entry == str(gpu.index) or gpu.uuid.startswith(entry))
        ]
        if not fitting:
            break
        found.append(fitting[0])
    return found


def gpu_results(gpus: Sequence[Gpu] | GpuQueryError, needs: Needs) -> list[Result]:
    """Number, free memory and memory errors of the first `needs.gpus` GPUs, which the ranks take."""
    required = f"{needs.gpus} GPUs"
    if isinstance(gpus, GpuQueryError):
        remedy = "give the job and its container the GPUs and the driver's tools; on CPU nodes set training.device=cpu"
        return [Result("GPUs", "failed", "unknown", str(gpus), required, remedy)]
    number = len(gpus)
    taken = gpus[: needs.gpus]
    value = f"{number} × {gpu_model(taken)}" if gpus else "0"
    if number < needs.gpus:
        remedy = "correct --gpus-per-node of the job, or have the missing GPUs looked at"
        return [Result("GPUs", "failed", value, f"{number} GPUs", required, remedy)]
    count = Result("GPUs", "ok", value)
    if number > needs.gpus:
        remedy = "start one process per GPU, or ask for fewer GPUs"
        count = Result("GPUs", "warning", value, f"{number} GPUs, some without work", required, remedy)  # fmt: skip
    return [count, _gpu_memory(taken, needs.colocated_encoders), _gpu_errors(taken)]


def gpu_model(gpus: Sequence[Gpu]) -> str:
    """Names of the GPUs' models, each once."""
    return " + ".join(sorted({gpu.name for gpu in gpus}))


def _gpu_memory(gpus: Sequence[Gpu], shared: bool) -> Result:
    value = f"{max(gpu.used_mib for gpu in gpus) / 1024:.1f} GiB in use"
    busy = [gpu for gpu in gpus if gpu.used_mib > MOST_USED_MIB]
    if shared or not busy:
        return Result("GPU memory", "ok", value)
    shown = ", ".join(f"GPU {gpu.index}: {gpu.used_mib / 1024:.1f} GiB" for gpu in busy)
    return Result(
        "GPU memory",
        "failed",
        value,
        f"memory in use before training, {shown}",
        f"less than {MOST_USED_MIB / 1024:.0f} GiB",
        "end the processes that nvidia-smi shows there, or leave the node out",
    )


def _gpu_errors(gpus: Sequence[Gpu]) -> Result:
    broken = [gpu for gpu in gpus if gpu.uncorrected_errors]
    value = f"{sum(gpu.uncorrected_errors for gpu in gpus)} memory errors"
    if not broken:
        return Result("GPU errors", "ok", value)
    shown = ", ".join(f"GPU {gpu.index}: {gpu.uncorrected_errors}" for gpu in broken)
    return Result(
        "GPU errors",
        "failed",
        value,
        f"uncorrected memory errors, {shown}",
        "none",
        "leave the node out and have the GPU reset or replaced",
    )


def checkpoint_room(directory: Path, needed_bytes: int) -> Result:
    """Whether `directory`, which may not exist yet, has room for the checkpoints to come."""
    try:
        free = _free_bytes(directory)
    except OSError as error:
        return _unreadable("run directory", directory, error)
    state: State = "failed" if free < needed_bytes else "ok"
    return _room(
        "run directory",
        state,
        free,
        directory,
        f"{_gib(needed_bytes)} for the checkpoints to come",
        "free space, set another directory=…, or lower checkpoint.keep_last",
    )


def scratch_room(
    check: str,
    directory: Path,
    *,
    least_bytes: int = LEAST_BYTES,
    comfortable_bytes: int = COMFORTABLE_BYTES,
) -> Result:
    """Whether a place for short-lived files has room: failed below the first bound, a warning below
    the second."""
    try:
        free = _free_bytes(directory)
    except OSError as error:
        return _unreadable(check, directory, error)
    state: State = (
        "failed" if free < least_bytes else "warning" if free < comfortable_bytes else "ok"
    )
    remedies = {
        "shared memory": "remove what others left there, or give the container more (--shm-size)",
        "data cache": "free space, or set another data.cache_directory",
    }
    return _room(
        check,
        state,
        free,
        directory,
        f"{_gib(least_bytes if state == 'failed' else comfortable_bytes)} or more",
        remedies.get(check, "free space, or point TMPDIR at a larger disk"),
    )


def _room(
    check: str, state: State, free: int, directory: Path, required: str, remedy: str
) -> Result:
    if state == "ok":
        return Result(check, state, _gib(free))
    return Result(check, state, _gib(free), f"{_gib(free)} free at {directory}", required, remedy)


def _unreadable(check: str, directory: Path, error: OSError) -> Result:
    return Result(
        check,
        "failed",
        "unreadable",
        f"{directory}: {(error.strerror or str(error)).lower()}",
        "a directory that can be looked at",
        "have the node's mounts and the permissions looked at",
    )


def _free_bytes(directory: Path) -> int:
    """Free bytes where `directory` is or would be."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _memory() -> Result:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if match is None:
        return Result("memory", "ok", "unknown")
    available = int(match[1]) * 1024
    if available >= COMFORTABLE_MEMORY_BYTES:
        return Result("memory", "ok", _gib(available))
    enough = available >= LEAST_MEMORY_BYTES
    return Result(
        "memory",
        "warning" if enough else "failed",
        _gib(available),
        f"{_gib(available)} of memory available",
        f"{_gib(COMFORTABLE_MEMORY_BYTES if enough else LEAST_MEMORY_BYTES)} or more",
        "end what else runs on the node",
    )


def _open_files() -> Result:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= COMFORTABLE_OPEN_FILES:
        return Result(
            "open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else str(limit)
        )
    return Result(
        "open files",
        "warning",
        str(limit),
        f"a limit of {limit} open files",
        f"{COMFORTABLE_OPEN_FILES} or more",
        "raise ulimit -n in the job or on the node",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
