"""Tensors of a checkpoint by global name, through torch.distributed.checkpoint (DCP).

Each tensor is written whole by one rank (tensor i by rank i mod world size), so that a save costs
every rank its share of host memory and disk bandwidth, and any number of ranks, or one process
without a process group, can read the result by name.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.directory import FORMAT, PARTIAL_SUFFIX, RUN_STATE_FILE

READ_BYTES = 1 << 30
"""Tensors are read in groups of about this size, which bounds host memory during a load."""


def save(
    target: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    run_state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup,
) -> None:
    """Writes a complete checkpoint directory `target`, or leaves none. A collective.

    `tensors` yields the same names on every rank in the same order. Raises InputError on every rank
    when the disk of one is full or refuses.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = {
        name: tensor.detach().to("cpu", copy=True)
        for index, (name, tensor) in enumerate(tensors)
        if index % world_size == rank
    }
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    failure: BaseException | None = None
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    _raise_together(failure, partial, group)
    try:
        # Alone there is nobody to agree with; and after a save that agreed through gloo, steps on 2
        # CPU cores took 137 ms instead of 98 for the rest of the run (why is not known).
        with _quiet_about_no_process_group():
            dcp.save(
                mine,
                storage_writer=dcp.FileSystemWriter(partial),
                process_group=group,
                no_dist=world_size == 1,
            )
        if rank == 0:
            state = {**run_state, "format": FORMAT}
            atomic_files.write_json(partial / RUN_STATE_FILE, state)
            # Another save of the same step is kept until this one is whole.
            shutil.rmtree(target, ignore_errors=True)
            atomic_files.rename(partial, target)
    # DCP's own exception is no Exception.
    except (Exception, dcp.CheckpointException) as error:
        failure = error
    _raise_together(failure, partial, group)


def _raise_together(failure: BaseException | None, partial: Path, group: dist.ProcessGroup) -> None:
    """Raises on every rank when one of them failed, after removing what was written."""
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, None if failure is None else _described(failure), group=group)
    messages = sorted({message for message in failures if message is not None})
    if not messages:
        return
    if dist.get_rank(group) == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise InputError(
        found=f"the checkpoint {partial.with_suffix('')} could not be written: {'; '.join(messages)}",
        required="room for the whole checkpoint, and permission to write it",
        remedy="free space or change the permissions; start again with the same command, "
        "which goes on from the last complete checkpoint",
    ) from failure


def _described(failure: BaseException) -> str:
    """One line on why a save failed, with the cause DCP wraps."""
    if isinstance(failure, dcp.CheckpointException):
        causes = [repr(cause[0]) for cause in failure.failures.values()]
        text = "; ".join(causes)
    else:
        text = repr(failure)
    # torch's writer reports a full disk only as a position that is not the expected one.
    if "inline_container" in text or "PytorchStreamWriter" in text:
        return f"no space left or write refused ({text.splitlines()[0][:200]})"
    return text.splitlines()[0][:300]


def names_and_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """What a checkpoint holds, from its metadata alone."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        name: entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }


def load(
    checkpoint: Path,
    wanted: Mapping[str, torch.Size],
    receive: Callable[[str, torch.Tensor], object],
) -> None:
    """Reads the `wanted` tensors in fp32 and hands each to `receive`.

    Needs no process group: every caller reads for itself, so a job of many ranks reads the whole
    checkpoint once per rank. Raises InputError when a name is missing
    or has another shape: the checkpoint is of another model.
    """
    check_fits(checkpoint, wanted)
    for names in _groups(wanted):
        tensors = {name: torch.empty(wanted[name], dtype=torch.float32) for name in names}
        with _quiet_about_no_process_group():
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        for name in names:
            receive(name, tensors.pop(name))


def check_fits(checkpoint: Path, wanted: Mapping[str, torch.Size]) -> None:
    """Raises InputError unless the checkpoint holds every wanted name in the wanted shape."""
    held = names_and_shapes(checkpoint)
    problems = [f"{name} is missing" for name in wanted if name not in held]
    problems += [
        f"{name} is {tuple(held[name])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    kinds = {name.partition(".")[0] for name in wanted}
    problems += [
        f"{name} belongs to no parameter of this model"
        for name in held
        if name.partition(".")[0] in kinds and name not in wanted
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise InputError(
            found=f"checkpoint {checkpoint} of another model: {shown}",
            required="the tensors of the model in the config",
            remedy="use the config the run was started with (config.yaml in its directory), "
            "or another run directory",
        )


@contextlib.contextmanager
def _quiet_about_no_process_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _groups(wanted: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    group: list[str] = []
    group_bytes = 0
    for name, shape in wanted.items():
        tensor_bytes = 4 * math.prod(shape)
        if group and group_bytes + tensor_bytes > READ_BYTES:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += tensor_bytes
    if group:
        yield group
