"""From the data stream to the examples of a step, equal on every rank of a model replica.

One rank of each replica reads, decodes and encodes; its latents, text tokens and sample ids are sent
to the replica's other ranks, which have neither stream nor encoders. Noise and timesteps are not sent:
they follow from the sample ids. A rank that cannot read tells the others, so that all raise alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

import torch
import torch.distributed as dist
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.data.loader import Batch, BatchStream
from dsr_scale.model.conditioning import Condition
from dsr_scale.parallel.groups import Ranks
from dsr_scale.train.objective import Encoders, Example, FlowMatching

_FIELDS = ("null", "labels", "tokens", "mask")


class Objective(Protocol):
    """What a batch is turned into an example of."""

    def example(self, batch: Batch, encoders: Encoders) -> Any:
        """The encoded micro-batch, as the engine in training takes it."""
        ...


class StepData(NamedTuple):
    """What one optimizer step works on."""

    examples: Sequence[Any]
    """This replica's micro-batches; encoded (and sent) when one is asked for, in order, once."""
    batches: list[Batch]
    """The same as they were read; empty on ranks that do not read."""
    failure: Exception | None
    """Why they could not be read, where that is so; asking for an example raises it on all ranks."""


@dataclass(frozen=True)
class Feed:
    """The examples of every step. All ranks of a replica take the same steps together."""

    objective: Objective
    ranks: Ranks
    micro_batches: int
    """Per step and replica."""
    stream: BatchStream | None
    """On the rank that reads; None on the others of its replica."""
    encoders: Encoders | None

    def steps(self, first_step: int) -> Iterator[StepData]:
        """Data of optimizer steps first_step, first_step + 1, …, for ever; workers start at once."""
        if self.stream is None:
            return self._of(None, None)
        try:
            return self._of(self.stream.steps(first_step), None)
        except Exception as error:
            return self._of(None, error)

    def _of(
        self, source: Iterator[list[Batch]] | None, failure: Exception | None
    ) -> Iterator[StepData]:
        while True:
            batches: list[Batch] = []
            if source is not None:
                try:
                    batches = next(source)
                except Exception as error:
                    failure = error
            yield StepData(_Examples(self, batches, failure), batches, failure)

    def close(self) -> None:
        """Ends the workers of the stream."""
        if self.stream is not None:
            self.stream.close()

    def example(self, batch: Batch | None, failure: Exception | None) -> Any:
        """The example of a micro-batch, from what was read here or on the rank that reads."""
        example = None
        if batch is not None:
            try:
                example = self._encoded(batch)
            except Exception as error:
                failure = error
        if self.ranks.replica.size > 1:
            example = self._shared(example, failure)
        if failure is not None:
            raise failure
        assert example is not None
        return example

    def _encoded(self, batch: Batch) -> Any:
        assert self.encoders is not None
        return self.objective.example(batch, self.encoders)

    def _shared(self, example: Example | None, failure: Exception | None) -> Example | None:
        """Sends the reading rank's example, or its failure, to the others of the replica."""
        tensors: list[Tensor | None] = []
        # Only errors of ours are known to survive the journey to other processes.
        told = failure if isinstance(failure, InputError) else failure and repr(failure)
        header: list[Any] = [told, None, None, []]
        if example is not None:
            condition = example.condition
            tensors = [example.latents, *(getattr(condition, field) for field in _FIELDS)]
            layouts = [None if t is None else (tuple(t.shape), t.dtype) for t in tensors]
            header = [None, example.epochs, example.sample_ids, layouts]
        dist.broadcast_object_list(header, group_src=0, group=self.ranks.replica_host_group)
        told, epochs, sample_ids, layouts = header
        if told is not None:
            if failure is not None:
                return None
            raise (
                told
                if isinstance(told, InputError)
                else RuntimeError(f"on the rank that reads this replica's data: {told}")
            )
        if example is None:
            tensors = [
                None
                if layout is None
                else torch.empty(layout[0], dtype=layout[1], device=self.ranks.device)
                for layout in layouts
            ]
        for tensor in tensors:
            if tensor is not None:
                # NCCL and gloo know no bool.
                sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                dist.broadcast(sent.contiguous(), group_src=0, group=self.ranks.replica.group)
        if example is not None:
            return example
        assert isinstance(self.objective, FlowMatching), "no other model is split over ranks"
        latents, *fields = tensors
        assert latents is not None
        condition = Condition(**dict(zip(_FIELDS, fields, strict=True)))  # type: ignore[arg-type]
        return Example(self.objective, latents, condition, epochs, sample_ids)


class _Examples(Sequence[Any]):
    """Encodes a micro-batch when it is asked for, so that one step holds one at a time."""

    def __init__(self, feed: Feed, batches: list[Batch], failure: Exception | None) -> None:
        self._feed = feed
        self._batches = batches
        self._failure = failure

    def __len__(self) -> int:
        return self._feed.micro_batches

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        batch = self._batches[index] if self._batches else None
        return self._feed.example(batch, self._failure)
