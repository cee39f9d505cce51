"""What the loop, the report and resuming need of a started run, whatever it trains.

`build.Training` is a diffusion transformer's, `decoder_build.DecoderTraining` a decoder's. The loop
itself knows neither: signals, skipped steps, checkpoints, logs and hangs are the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsr_scale.base.boxes import Piece
from dsr_scale.config.derive import BatchArithmetic
from dsr_scale.config.run import AnyRun
from dsr_scale.config.section import Section
from dsr_scale.data.samples import Samples
from dsr_scale.parallel.groups import Ranks
from dsr_scale.parallel.guard import StepGuard
from dsr_scale.parallel.pipeline import Probes
from dsr_scale.parallel.zero import Section as TimedSection
from dsr_scale.train.feed import Feed


class Measures(Protocol):
    """What is measured of examples and losses between two log lines, beside the loss itself."""

    def watched(self, examples: Sequence[Any]) -> Sequence[Any]:
        """A step's examples, such that what they tell is counted."""
        ...

    def probes(self, step: int) -> Probes | None:
        """What looks at the tokens of step `step`, from 1; None for most steps, or always."""
        ...

    def end_step(self, skipped: Tensor) -> None:
        """Counts a step; `skipped`, on the device, is not 0 for one that changed nothing."""
        ...

    def take(self) -> dict[str, float]:
        """Metrics of all ranks since the last call. A collective."""
        ...


class Engine(Protocol):
    """Weights, optimizer and averages, distributed over the ranks."""

    guard: StepGuard

    def step(self, loss: Tensor, *, step: int, learning_rate: float) -> Tensor:
        """Updates with the gradients at hand; loss, gradient norm, skipped: float64 [3]."""
        ...

    def pieces(self, *, owned: bool) -> Iterator[Piece]:
        """The state by global name; `owned` is this rank's share of it alone."""
        ...

    def refresh(self, *, applied_steps: int) -> None:
        """Follows the pieces, whose tensors were written."""
        ...


class Started(Protocol):
    """The parts of a started run."""

    @property
    def run(self) -> AnyRun:
        """The run file."""
        ...

    @property
    def ranks(self) -> Ranks:
        """All processes."""
        ...

    @property
    def shape(self) -> Section:
        """All that fixes the network: kept with checkpoints, compared on resume."""
        ...

    @property
    def timestep_shift(self) -> float | None:
        """α in force; None for what has no timesteps."""
        ...

    @property
    def batches(self) -> BatchArithmetic:
        """How a global batch is shared out."""
        ...

    @property
    def samples(self) -> Samples:
        """The data set."""
        ...

    @property
    def feed(self) -> Feed:
        """Examples of every step."""
        ...

    @property
    def engine(self) -> Engine:
        """What is trained."""
        ...

    @property
    def measures(self) -> Measures:
        """What the report tells beside the loss."""
        ...

    @property
    def training_flops(self) -> int:
        """Of one image."""
        ...

    def forward_backward(
        self, examples: Sequence[Any], *, step: int, section: TimedSection, probes: Probes | None
    ) -> Tensor:
        """Gradients of step `step`, from 0; its mean loss over all replicas, on the device."""
        ...

    def checkpoint_shapes(self) -> dict[str, torch.Size]:
        """Name and global shape of everything that a checkpoint of this run holds."""
        ...
