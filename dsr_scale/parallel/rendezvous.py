"""How ranks find each other: a store at the first one's address, to which all come in minutes or not at all.

torch's own way asks for a name that does not resolve for ever, and only counts who came. Here the error
says who is missing, because that rank's log has the cause.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from dsr_scale.base.errors import InputError

JOIN_TIMEOUT_S = 300.0
"""For all ranks to come to the first; the last has to load torch from a disk that all others ask."""
RESOLVE_TIMEOUT_S = 60.0
"""For the name of the first rank's host."""

NAMED_RANKS = 16
"""Of those that did not come."""


class RendezvousError(InputError):
    """The ranks did not come together: not on this rank's account, as far as it can know."""


def meet(rank: int, world_size: int, address: str) -> dist.TCPStore:
    """The store that the first rank keeps, once all ranks have come to it.

    Raises RendezvousError when the first rank's host has no address, or others did not come in time.
    """
    host, port = address.rsplit(":", 1)
    began_s = time.monotonic()
    _resolve(rank, address)
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    store = dist.TCPStore(
        host,
        int(port),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )
    # Its own way of waiting for all counts them; by name it is known who is missing.
    store.set(f"came/{rank}", "")
    if store.add("came", 1) == world_size:
        store.set("all came", "")
    try:
        store.wait(["all came"], timeout)
    except RuntimeError as error:
        raise failed(rank, address, began_s, _who_is_missing(store, world_size)) from error
    return store


def _who_is_missing(store: dist.TCPStore, world_size: int) -> str:
    try:
        missing = [rank for rank in range(world_size) if not store.check([f"came/{rank}"])]
    except RuntimeError:
        return "the first rank came, and left again"
    names = ", ".join(map(str, missing[:NAMED_RANKS]))
    more = f" and {len(missing) - NAMED_RANKS} more" if len(missing) > NAMED_RANKS else ""
    return f"of {world_size} ranks these did not come: {names}{more}"


def _resolve(rank: int, address: str) -> None:
    """Waits until the host has an address: torch would ask for one for ever."""
    host, port = address.rsplit(":", 1)
    began_s = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            return
        except OSError as error:
            if time.monotonic() - began_s > RESOLVE_TIMEOUT_S:
                reason = f"{host} has no address: {error.strerror or error}"
                raise failed(rank, address, began_s, reason) from error
        time.sleep(1)


def failed(rank: int, address: str, began_s: float, reason: str) -> RendezvousError:
    """What to raise when ranks did not come together, since the moment `began_s` of the monotonic clock."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return RendezvousError(
        found=f"rank {rank} on {node} tried {address} for "
        f"{time.monotonic() - began_s:.0f} s: {reason}",
        required="all ranks reach each other, and rank 0 at that address",
        remedy="look at the log of a rank that is missing, it may have died before; check MASTER_ADDR, "
        "firewalls between nodes, and the network interface in NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME",
    )
