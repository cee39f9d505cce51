"""`dsr-scale …` as a person would type it, shown before it runs.

Training gets a process of its own: it keeps process groups and signal handlers to itself. What only
reads runs here, where libraries are imported once; it is the same code either way.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

COMMAND = Path(sys.executable).with_name("dsr-scale")

console = Console(stderr=True, highlight=False)

Trainer = Callable[[Sequence[str], Path], int]
"""Runs `dsr-scale` with these words, appends what it prints to a file, returns its exit status."""


def show(words: Sequence[str]) -> None:
    """Prints a command."""
    line = shlex.join(["dsr-scale", *words])
    console.print(f"$ {line}", style="dim", markup=False, soft_wrap=True)


def in_a_process(words: Sequence[str], log: Path) -> int:
    """A `Trainer`. A Ctrl-C reaches the command too, which is then given time to save."""
    show(words)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen([str(COMMAND), *words], stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def here(*words: object) -> None:
    """Runs `dsr-scale` in this process. Raises what the command raises, InputError for bad input."""
    from dsr_scale.cli.main import app

    texts = [str(word) for word in words]
    show(texts)
    app(texts, standalone_mode=False)
