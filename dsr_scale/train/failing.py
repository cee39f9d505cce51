"""How a rank says that it failed, and ends.

Every rank leaves its own account in a file of its node; whoever judges the attempt compares them. A
rank that ends by itself must be gone at once: threads that wait in a collective for the others, and
destructors of communicators, would keep it and with it the job. This module imports no torch: a
mistake in the run file is told without it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dsr_scale.base.errors import InputError
from dsr_scale.job.failures import FAILURE_VARIABLE, INPUT_STATUS, Failure, Kind, write_failure

OUTAGE_STATUS = 69
"""EX_UNAVAILABLE: encoder servers or other ranks could not be reached."""
ERROR_STATUS = 1

MOST_LINES = 20
"""Of a message; a wrong run file may have hundreds of problems."""


@dataclass
class Account:
    """Where this rank is, for when it must say so. The loop keeps it up to date."""

    phase: str = "start"
    finished_steps: int | None = None
    """None before the first step was begun."""


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank by its launcher's variables, 0 without a launcher."""
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)


def has_others(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher's variables say that there are other ranks."""
    size = environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1
    return int(size) > 1


def own_node(environment: Mapping[str, str] = os.environ) -> str:
    """Name of this node: Slurm's if it has one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def kind_of(error: Exception) -> Kind:
    """Who can do something about it."""
    if not isinstance(error, InputError):
        return "error"
    # Without torch neither can have been raised, and it takes seconds to import.
    if "torch" in sys.modules:
        from dsr_scale.data.encoded import EncodersLost
        from dsr_scale.parallel.rendezvous import RendezvousError

        if isinstance(error, (EncodersLost, RendezvousError)):
            return "outage"
    return "input"


def record(error: Exception, account: Account) -> int:
    """Writes this rank's account of an error that ends it; returns the exit status for it."""
    kind = kind_of(error)
    leave(
        Failure(
            rank=own_rank(),
            node=own_node(),
            kind=kind,
            error=type(error).__name__,
            message="\n".join(str(error).splitlines()[:MOST_LINES]),
            step=account.finished_steps,
            phase=account.phase,
            time_s=time.time(),
            traceback="".join(traceback.format_exception(error)),
        )
    )
    return {"input": INPUT_STATUS, "outage": OUTAGE_STATUS}.get(kind, ERROR_STATUS)


def leave(failure: Failure) -> None:
    """Writes an account to where the launcher asked for it; nothing without a launcher."""
    path = os.environ.get(FAILURE_VARIABLE)
    if not path:
        return
    try:
        write_failure(Path(path), failure)
    except (OSError, InputError) as error:
        # The error itself is what has to be seen.
        print(f"the account of the failure could not be written: {error}", file=sys.stderr)


def end_now(error: Exception, account: Account) -> NoReturn:
    """Records and prints an error of a thread that must end the whole process."""
    status = record(error, account)
    print(f"rank {own_rank()}: {error}", file=sys.stderr, flush=True)
    os._exit(status)
