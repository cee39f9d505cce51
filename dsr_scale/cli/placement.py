"""Options that say which part of the work this process does, and on which device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dsr_scale.base.errors import InputError
from dsr_scale.data.shares import Share

if TYPE_CHECKING:
    import torch


def parse_share(text: str) -> Share:
    """What `--share i/n` means. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(
            found=f"--share {text}",
            required="i/n with 0 ≤ i < n, such as 0/4, 1/4, 2/4 and 3/4 for four processes",
            remedy="give every process another i and the same n",
        )
    return Share(int(match[1]), int(match[2]))


def usable_device(name: str) -> torch.device:
    """The device that `--device` means. Raises InputError when there is none of that name."""
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None or (name != "cpu" and int(match[1] or 0) >= count):
        raise InputError(
            found=f"--device {name}, with {count} CUDA devices",
            required="cpu, cuda or cuda:N of a device that is there",
            remedy="leave --device out, or name another",
        )
    return torch.device(name)
