"""A training run that takes a second, and the processes that run it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from rank_processes import run_ranks

from dsr_scale.checkpoint import directory, tensors

DRIVER = Path(__file__).with_name("train_driver.py")

CONFIG = {
    "name": "tiny",
    "directory": "",
    "seed": 3,
    "data": {
        "shards": "package:emoji",
        "max_samples": 20,
        "resolution": 32,
        "workers": 1,
        "crop": "random",
    },
    "encoders": {"image": {"kind": "pixels", "patch": 8}, "text": {"kind": "bytes"}},
    "model": {
        "width": 32,
        "depth": 4,
        "heads": 2,
        "registers": {"count": 4},
        "conditioning": {"kind": "cross_attention"},
    },
    "training": {
        "steps": 6,
        "global_batch_images": 8,
        "microbatch_images": 4,
        "precision": "fp32",
        "device": "cpu",
        # A key bias has no gradient but rounding; Adam's usual eps would blow that up to full steps.
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-4},
        "ema_decays": [0.9],
    },
    "checkpoint": {"every_steps": 3, "keep_last": 5},
    "tracking": {"log_every_steps": 1, "wandb": "off"},
}


def write_config(folder: Path) -> Path:
    """The tiny run file, writing into `folder`/run."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "directory": str(folder / "run")}))
    return path


def run_training(folder: Path, *overrides: str, ranks: int = 1, kill_after: int = 0) -> Path:
    """Trains in new processes, which are killed after a step if it is not 0; returns the run directory."""
    # The trainer is heavy, and most who import this module only want the run file.
    from train_driver import drive

    arguments = (write_config(folder), folder / "ids.jsonl", kill_after, list(overrides))
    if kill_after:
        with pytest.raises(AssertionError, match=f"died with status {-signal.SIGKILL}"):
            run_ranks(drive, ranks, *arguments)
    else:
        run_ranks(drive, ranks, *arguments)
    return folder / "run"


def checkpoint_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    checkpoint = directory.step_directory(run, step)
    loaded: dict[str, torch.Tensor] = {}
    tensors.load(checkpoint, tensors.names_and_shapes(checkpoint), loaded.__setitem__)
    return loaded


def consumed(folder: Path) -> dict[int, list[int]]:
    """Sample ids of each step over all ranks; the last time a step was trained counts."""
    steps: dict[int, dict[str, list[int]]] = {}
    for line in (folder / "ids.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {})[record["rank"]] = record["ids"]
    return {step: [i for rank in sorted(by) for i in by[rank]] for step, by in steps.items()}
