"""Steps that are not taken: not finite, or far above what loss and gradient norm have been.

The verdict is a tensor on the device. It is reached between DeepSpeed's gradient norm and the
update, and handed to fused AdamW in the place where mixed-precision training puts its overflow flag:
the kernel reads it and changes nothing. So no rank waits for its host to know. A gradient that is
not finite DeepSpeed itself refuses before that point, on its own look at the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsr_scale.config.training import SkipConfig


class StepGuard:
    """Running mean and variance of loss and gradient norm, and the verdict on a step."""

    def __init__(
        self, config: SkipConfig, device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        """`group` is of all ranks, None for one: a step is skipped by all of them or by none."""
        self._config = config
        self._group = group
        self.statistics = torch.zeros(5, dtype=torch.float64, device=device)
        """Applied steps, mean of loss and norm, variance of loss and norm."""

    @torch.no_grad()
    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1 for a step to skip, else 0: float32, zero-dimensional. Remembers what it lets pass.

        `gradient_norm` below 0 is DeepSpeed's sign for one that is not finite.
        """
        values = torch.stack([loss.double(), gradient_norm.double()])
        count, mean, variance = self.statistics[0], self.statistics[1:3], self.statistics[3:5]
        bad = ~(torch.isfinite(values).all() & (values[1] >= 0))
        if self._config.spike_deviations is not None:
            limit = mean + self._config.spike_deviations * variance.sqrt()
            bad = bad | ((values > limit).any() & (count >= self._config.window_steps))
        skip = bad.float()
        if self._group is not None:
            dist.all_reduce(skip, op=dist.ReduceOp.MAX, group=self._group)
        self._remember(values, skip > 0)
        return skip

    def _remember(self, values: Tensor, skipped: Tensor) -> None:
        count, mean, variance = self.statistics[0], self.statistics[1:3], self.statistics[3:5]
        share = 1 / (count + 1).clamp(max=self._config.window_steps)
        difference = torch.where(skipped, 0.0, values - mean)
        updated = (1 - share) * (variance + share * difference**2)
        self.statistics.copy_(
            torch.cat(
                [
                    (count + (~skipped).double())[None],
                    mean + share * difference,
                    torch.where(skipped, variance, updated),
                ]
            )
        )


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that asks for a verdict once per optimizer step, however many calls that takes.

    DeepSpeed calls `step` once for each flat partition, after it has the gradient norm.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, fused=True, **settings)
        self.found_inf: Tensor | None = None
        self._ask: Callable[[], Tensor] | None = None

    def expect(self, ask: Callable[[], Tensor]) -> None:
        """The next `step` asks for 1 (skip) or 0; later ones of the same optimizer step reuse it."""
        self.found_inf, self._ask = None, ask

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.found_inf is None and self._ask is not None:
            self.found_inf = self._ask()
        return super().step(closure)
