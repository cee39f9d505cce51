"""Metrics of a run: one JSON object per line in the run directory, and the same to wandb.

The local file needs no account and is what the tools of this package read. A resumed run appends;
steps that were logged, lost with a crash and trained again appear twice, and readers take the last.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dsr_scale.base.atomic_files import storage_errors

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics; only the first rank has one."""

    def __init__(
        self,
        directory: Path,
        *,
        wandb_mode: Literal["offline", "online", "off"],
        project: str,
        name: str,
        config: dict[str, Any],
        run_id: str | None,
    ) -> None:
        self._path = directory / METRICS_FILE
        with storage_errors(self._path):
            _end_torn_line(self._path)
            self._file = self._path.open("a", buffering=1)
        self._wandb: Any = None
        self.run_id = run_id
        if wandb_mode != "off":
            import wandb

            self._wandb = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                mode=wandb_mode,
                dir=str(directory),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.run_id = self._wandb.id

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Records `metrics` after `step` finished steps; a number that is not finite becomes null."""
        written = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        with storage_errors(self._path):
            self._file.write(json.dumps({"step": step, **written}, allow_nan=False) + "\n")
        if self._wandb is not None:
            numbers = {key: value for key, value in metrics.items() if not isinstance(value, list)}
            self._tracked(lambda: self._wandb.log(numbers, step=step))

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Shows a picture that was already written to `path` in the tracker as well."""
        if self._wandb is not None:
            import wandb

            self._tracked(lambda: self._wandb.log({name: wandb.Image(str(path))}, step=step))

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        if self._wandb is not None:
            self._tracked(lambda: self._wandb.finish())

    def _tracked(self, action: Callable[[], object]) -> None:
        """The tracker is a process of its own, which a signal to a whole job ends before the last save."""
        try:
            action()
        except Exception as error:
            print(f"wandb is gone, {self._path} goes on: {error!r}", file=sys.stderr, flush=True)
            self._wandb = None


def _end_torn_line(path: Path) -> None:
    """Ends a line that a crash or a full disk cut off, so that the next one is whole."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All records of a run in step order, the last one of each step; torn lines are left out."""
    path = directory / METRICS_FILE
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        by_step[record["step"]] = {**by_step.get(record["step"], {}), **record}
    return [by_step[step] for step in sorted(by_step)]
