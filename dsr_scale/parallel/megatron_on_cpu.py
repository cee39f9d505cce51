"""Lets megatron-core's tensor-parallel layers run on a CPU, for tests and for machines without a GPU.

Its sequence-parallel mappings allocate on `torch.cuda.current_device()` and synchronise with CUDA,
whatever device their input is on. Nothing else in the layers used here needs a GPU, so those two
names are redirected when a run trains on the CPU; on a GPU this module is never called.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def run_megatron_on_cpu() -> None:
    """Redirects the two names for the rest of this process. Idempotent."""

    def current_device() -> str:
        return "cpu"

    def synchronize(device: Any = None) -> None:
        return None

    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.synchronize = synchronize
