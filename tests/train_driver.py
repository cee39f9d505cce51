"""Runs a training in a process of its own, writes which samples each step used, and may die.

python train_driver.py CONFIG IDS_FILE KILL_AFTER_STEP [key=value …]; step 0 never kills.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dsr_scale.config.load import load_run
from dsr_scale.data.loader import Batch
from dsr_scale.train.loop import train


def drive(config: Path, ids_file: Path, kill_after: int, overrides: list[str]) -> None:
    """Trains; each rank appends the samples that it read in every step."""
    run = load_run(config, overrides)
    rank = os.environ.get("RANK", "0")

    def on_step(step: int, batches: list[Batch]) -> None:
        ids = [i for batch in batches for i in batch.sample_ids.tolist()]
        with ids_file.open("a") as file:
            file.write(json.dumps({"step": step, "rank": rank, "ids": ids}) + "\n")
        if step == kill_after:
            wait_for_saves(Path(run.directory))
            os.kill(os.getpid(), signal.SIGKILL)

    train(run, on_step=on_step)


def wait_for_saves(directory: Path) -> None:
    """Until no save is being written in the background, so that what the kill leaves is known."""
    while list(directory.glob("checkpoints/*.partial")):
        time.sleep(0.01)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
