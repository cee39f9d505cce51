"""`python -m tools.bench NAME…` runs benchmarks one after the other; `list` says what there is."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from rich.console import Console

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from tools.bench.protocol import LEAST_ROUNDS, Settings
from tools.bench.report import as_json, environment, print_table

BENCHMARKS = (
    "split_cpu",
    "step_overhead",
    "checkpoint",
    "bubble",
    "encoder_service",
    "latent_sources",
    "gpu_step",
    "gpu_encoders",
)


def benchmark(name: str) -> ModuleType:
    """The module of a benchmark; its `run(settings)` gives a Report."""
    return importlib.import_module(f"tools.bench.{name}")


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*BENCHMARKS, "list"])
    parser.add_argument("--rounds", type=int, default=11, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for NAME.json")
    options = parser.parse_args()
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {options.rounds}: medians need at least {LEAST_ROUNDS}")
    declare_torchvision_operators()
    console = Console()
    if "list" in options.names:
        for name in BENCHMARKS:
            summary = (benchmark(name).__doc__ or "").partition("\n")[0]
            console.print(f"{name:15} {summary}", highlight=False, soft_wrap=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        before = environment()
        with tempfile.TemporaryDirectory(dir=options.out, prefix="scratch_") as scratch:
            try:
                report = benchmark(name).run(Settings(options.rounds, Path(scratch)))
            except InputError as error:
                sys.exit(f"{name}\n{error}")
        path = options.out / f"{name}.json"
        path.write_text(as_json(name, report, before, environment(), options.rounds))
        print_table(name, report, console)
        console.print(f"written to {path}", highlight=False)


if __name__ == "__main__":
    main()
