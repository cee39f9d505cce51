"""Stands in for `dsr-scale` under a launcher: what a cluster does to a job is tested in seconds.

`plan` and `job` are the real ones. `train`, `serve` and `preflight` run a line of shell that the test gives
in TRAIN, SERVE or PREFLIGHT, with the variables that Slurm and the launcher set.
"""

from __future__ import annotations

import os
import sys

STAND_INS = {"train": "true", "serve": "sleep 600", "preflight": "true"}


def main() -> None:
    """Becomes the shell line, or the real command."""
    command = sys.argv[1]
    if command in STAND_INS:
        line = os.environ.get(command.upper(), STAND_INS[command])
        os.execvp("bash", ["bash", "-c", line])
    from dsr_scale.cli.main import run

    run()


if __name__ == "__main__":
    main()
