"""Who this process is among the others: one process, torchrun, or srun, by the same command.

The three launchers differ only in which environment variables they set; `place_from_environment`
reads them as a pure function, so that rank arithmetic is tested without processes. Only
`start` touches torch.distributed. It also lays the ranks out as tensor × pipeline × data parallel,
tensor fastest and pipeline slowest, so that the ranks that talk most share a node; the groups are
megatron-core's.
"""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from dsr_scale.base.errors import InputError
from dsr_scale.job.attempt import current_attempt
from dsr_scale.parallel import rendezvous
from dsr_scale.parallel.megatron_on_cpu import run_megatron_on_cpu

COLLECTIVE_TIMEOUT_S = 1800

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One process's position in the job."""

    rank: int
    world_size: int
    local_rank: int
    rendezvous: str | None
    """`host:port` of rank 0, or None when there is only one process."""


class Axis(NamedTuple):
    """This process's place along one way of splitting the work."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """Of the ranks that differ only along this axis; None where there is no other."""


ALONE = Axis(0, 1, None)


@dataclass(frozen=True)
class Ranks:
    """The started process groups: every rank is one of tensor × pipeline × data ranks."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup
    """A gloo group of all ranks for small messages between hosts, beside NCCL on GPUs."""
    saving_group: dist.ProcessGroup | None
    """Another one, for the thread that writes checkpoints; None for a single process."""
    tensor: Axis
    pipeline: Axis
    data: Axis
    """Model replicas."""
    replica: Axis
    """The tensor × pipeline ranks that hold one copy of the model."""
    replica_host_group: dist.ProcessGroup | None
    """A gloo group of the replica's ranks."""
    store: dist.Store | None = None
    """Keys and values of all ranks, kept by the first; None for a single process."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @property
    def leads_replica(self) -> bool:
        """Whether this rank reads and encodes its replica's batches."""
        return self.replica.rank == 0

    def sum_on_host(self, values: list[float]) -> list[float]:
        """Sum of `values` over all ranks, in double precision, without touching the device."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def gather_on_host(self, items: list[T]) -> list[T]:
        """Every rank's items, in rank order, on every rank; for small things that happen rarely."""
        gathered: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, items, group=self.host_group)
        return [item for rank_items in gathered for item in rank_items]

    def on_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on the first rank; all ranks get its result, or raise its error together.

        Without this a rank that fails alone leaves the others waiting in their next collective.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except Exception as error:
                failure = error
        # Only errors of ours are known to survive the journey to other processes.
        told = failure if isinstance(failure, InputError) else failure and repr(failure)
        outcome: list[Any] = [(result, told)]
        dist.broadcast_object_list(outcome, src=0, group=self.host_group)
        result, told = outcome[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise told if isinstance(told, InputError) else RuntimeError(f"on rank 0: {told}")
        return cast("T", result)


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """Reads torchrun's variables, else srun's, else says that this is the only process.

    Raises InputError when a launcher's variables are incomplete: a rank that believes it is alone
    would train on all the data and overwrite the others' files.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _torchrun_place(environment)
    # Only srun sets the step variables; a batch script itself has SLURM_PROCID=0 as well.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _require(environment, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"))
        host = environment.get("MASTER_ADDR") or _first_host(environment)
        port = environment.get("MASTER_PORT") or _port_of_attempt(environment)
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            rendezvous=f"{host}:{port}",
        )
    return Place(rank=0, world_size=1, local_rank=0, rendezvous=None)


def slurm_port(job_id: str, attempt: int = 0) -> int:
    """A port that differs between jobs sharing a node, the same on every rank of one job.

    It differs between attempts of a job as well: a process that the last one left behind, or the
    kernel, may still hold that one's. All lie below those that Linux gives to outgoing connections.
    """
    return 20_000 + (16 * int(job_id) + attempt % 16) % 12_000


def _port_of_attempt(environment: Mapping[str, str]) -> int:
    current = current_attempt(environment)
    return slurm_port(environment["SLURM_JOB_ID"], 0 if current is None else current[1].number)


def _torchrun_place(environment: Mapping[str, str]) -> Place:
    _require(environment, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return Place(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        rendezvous=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
    )


def _require(environment: Mapping[str, str], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in environment]
    if missing:
        present = [name for name in needed if name in environment]
        raise InputError(
            found=f"the environment has {', '.join(present)} but not {', '.join(missing)}",
            required="all of " + ", ".join(needed),
            remedy="start with torchrun or srun, or unset RANK and WORLD_SIZE to run one process",
        )


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise InputError(
            found=f"no MASTER_ADDR, and {' '.join(command)} failed: {error}",
            required="the host of rank 0",
            remedy="export MASTER_ADDR=<host of rank 0> before srun (needed inside containers)",
        ) from error


def choose_device(choice: str, local_rank: int) -> torch.device:
    """`auto` takes the GPU of this local rank when there is one. Raises InputError when there is not.

    A process that sees a single GPU takes it, whatever its local rank: srun may bind one to each task.
    """
    available = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and available == 0):
        return torch.device("cpu")
    bound = available == 1 and "SLURM_STEP_NUM_TASKS" in os.environ
    index = 0 if bound else local_rank
    if index >= available:
        raise InputError(
            found=f"local rank {local_rank}, but {available} visible GPUs",
            required="one GPU per process, or training.device=cpu",
            remedy="start fewer processes per node, check CUDA_VISIBLE_DEVICES, "
            "or set training.device=cpu",
        )
    return torch.device("cuda", index)


def start(device_choice: str, *, tp: int = 1, pp: int = 1) -> Ranks:
    """Joins the process group that the launcher prepared, or makes one of a single process.

    Every replica of the model takes `tp` × `pp` ranks, which divide the number of processes.
    """
    place = place_from_environment(os.environ)
    device = choose_device(device_choice, place.local_rank)
    # DeepSpeed and megatron call collectives by their old names; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if tp > 1:
        # Megatron relies on one queue to start a collective before the product that hides it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed reads these of a process that torch.distributed already started.
    os.environ["LOCAL_RANK"] = str(place.local_rank if device.index is None else device.index)
    os.environ["DS_ACCELERATOR"] = device.type
    if not dist.is_initialized():
        _join(place, "nccl" if device.type == "cuda" else "gloo")
    world = dist.group.WORLD
    assert world is not None
    host_group = world if device.type == "cpu" else dist.new_group(backend="gloo")
    assert isinstance(host_group, dist.ProcessGroup)
    data = Axis(place.rank, place.world_size, world)
    tensor = pipeline = replica = ALONE
    replica_host_group = None
    if tp * pp > 1:
        tensor, pipeline, data, replica = _split_model(device, tp, pp)
        replica_host_group = _gloo_like(replica, device)
    saving_group = dist.new_group(backend="gloo") if place.world_size > 1 else None
    assert saving_group is None or isinstance(saving_group, dist.ProcessGroup)
    return Ranks(
        rank=place.rank,
        world_size=place.world_size,
        device=device,
        host_group=host_group,
        saving_group=saving_group,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        replica=replica,
        replica_host_group=replica_host_group,
        store=_store() if place.world_size > 1 else None,
    )


def _gloo_like(axis: Axis, device: torch.device) -> dist.ProcessGroup | None:
    """A gloo group of the same ranks, for small messages between hosts."""
    if device.type == "cpu":
        return axis.group
    assert axis.group is not None
    members: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(members, dist.get_process_group_ranks(axis.group))
    # Every rank takes part in making every group, in one order.
    mine = None
    for ranks in sorted({tuple(each) for each in members}):
        group = dist.new_group(list(ranks), backend="gloo")
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def _store() -> dist.Store:
    """The store behind the process group, which keeps it."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _join(place: Place, backend: str) -> None:
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if place.rendezvous is None:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    began_s = time.monotonic()
    try:
        # torchrun's agent has a store already, and its own patience.
        store = (
            None
            if "TORCHELASTIC_RUN_ID" in os.environ
            else rendezvous.meet(place.rank, place.world_size, place.rendezvous)
        )
        dist.init_process_group(
            backend,
            init_method="env://" if store is None else None,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise rendezvous.failed(place.rank, place.rendezvous, began_s, reason) from error
    if store is not None:
        # From here on it is waited in for as long as for a collective.
        store.set_timeout(timeout)


def _split_model(device: torch.device, tp: int, pp: int) -> tuple[Axis, Axis, Axis, Axis]:
    """Tensor, pipeline, data and replica axes, in megatron-core's order of ranks."""
    if device.type == "cpu":
        run_megatron_on_cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages that are not used here
        from megatron.core import parallel_state, tensor_parallel  # noqa: F401

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=COLLECTIVE_TIMEOUT_S // 60,
    )

    def axis(group: object) -> Axis:
        assert isinstance(group, dist.ProcessGroup)
        return Axis(dist.get_rank(group), dist.get_world_size(group), group)

    return (
        axis(parallel_state.get_tensor_model_parallel_group()),
        axis(parallel_state.get_pipeline_model_parallel_group()),
        axis(parallel_state.get_data_parallel_group()),
        axis(parallel_state.get_model_parallel_group()),
    )


def stop() -> None:
    """Leaves the process group; not for the error path, where other ranks may wait in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
