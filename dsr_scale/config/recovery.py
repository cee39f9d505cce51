"""What a run does when a rank crashes, hangs or loses its node (docs/slurm.md)."""

from __future__ import annotations

from pydantic import Field

from dsr_scale.config.section import Section


class RecoveryConfig(Section):
    """When a run counts as hung, and how often its job may start again."""

    hang_multiple: float = Field(default=20.0, gt=1)
    """A step that takes this many times the median of recent steps is a hang: all ranks write their
    stacks and end."""
    hang_least_s: float = Field(default=300.0, gt=0)
    """No step counts as hung before that long. A bucket's first step compiles anew and takes minutes."""
    start_timeout_s: float = Field(default=1800.0, gt=0)
    """The same for everything that is no ordinary step: loading, the first steps with their
    compilation, checkpoints, sample grids, each batch of an evaluation."""
    most_failures: int = Field(default=10, ge=0)
    """A job is not started again after this many failures without a new checkpoint between them."""
    shrink: bool = False
    """After a lost node, go on at once with fewer nodes, where the layout and the global batch allow
    it; otherwise the job waits in the queue for a new node."""
