"""The result of an evaluation as a file: every number, what was left out and why, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsr_scale import __version__
from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError

REPORT_FILE = "evaluation.json"

_LIBRARIES = (
    "torch",
    "torchvision",
    "torch-fidelity",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
)


@dataclass
class Report:
    """What is known at the end."""

    values: dict[str, float] = field(default_factory=dict)
    """Name → number; all finite."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """Metric → what is missing and what to do about it."""
    failed: dict[str, str] = field(default_factory=dict)
    """Metric → why what was measured gives no number."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All that a repetition needs."""

    def leave_out(self, metric: str, error: InputError) -> None:
        """Notes that a metric cannot be computed, and why."""
        self.not_computed[metric] = _in_one_line(error)

    def fail(self, metric: str, error: InputError) -> None:
        """Notes that a metric was computed and is no number, and why."""
        self.failed[metric] = _in_one_line(error)

    def write(self, directory: Path) -> Path:
        """Writes evaluation.json into `directory`, whole or not at all; returns its path."""
        path = directory / REPORT_FILE
        content = {
            "metrics": self.values,
            "not_computed": self.not_computed,
            "failed": self.failed,
            "settings": self.settings,
            "versions": library_versions(),
        }
        atomic_files.write_json(path, content)
        return path


def by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """Metrics that lack the same, separated by commas → what they lack."""
    lacking: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        lacking.setdefault(reason, []).append(name)
    return {", ".join(names): reason for reason, names in lacking.items()}


def _in_one_line(error: InputError) -> str:
    return f"{error.found}; required: {error.required}; {error.remedy}"


def library_versions() -> dict[str, str]:
    """Versions of what numbers depend on, of the packages that are installed."""
    found = {"dsr-scale": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
