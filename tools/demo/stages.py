"""Work in stages whose results are kept, so that a stopped demonstration goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from tools.comparison.commands import console

STAGES_FILE = "stages.json"


class Stages:
    """What is done in a directory, under settings that must not change while it is."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Raises InputError where `out` holds stages of other settings."""
        self._path = out / STAGES_FILE
        self._content: dict[str, Any] = {"settings": settings, "stages": {}}
        if self._path.is_file():
            self._content = json.loads(self._path.read_text())
            if self._content["settings"] != json.loads(json.dumps(settings)):
                raise InputError(
                    found=f"{out}, begun with other settings",
                    required="one directory for one form of the demonstration",
                    remedy="choose another --out, or remove that directory",
                )

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """The JSON value that `work` returns, from an earlier start if that finished the stage."""
        done = self._content["stages"]
        if name in done:
            console.print(f"{name}: done before", style="green")
            return done[name]["result"]
        console.print(name, style="bold green")
        started_s = time.perf_counter()
        result = json.loads(json.dumps(work()))
        done[name] = {"minutes": (time.perf_counter() - started_s) / 60, "result": result}
        atomic_files.write_json(self._path, self._content)
        return result

    @property
    def minutes(self) -> dict[str, float]:
        """Stage → how long it took, of those that are done."""
        return {name: stage["minutes"] for name, stage in self._content["stages"].items()}
