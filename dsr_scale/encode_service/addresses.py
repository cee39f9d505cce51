"""host:port texts, and which hosts never leave this machine."""

from __future__ import annotations

import ipaddress
import socket

from dsr_scale.base.errors import InputError
from dsr_scale.config.addresses import parse_address


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[IPv6]:port` → host without brackets, and port. Raises InputError."""
    parsed = parse_address(address)
    if parsed is None:
        raise InputError(
            found=f"the address {address!r}",
            required="host:port, with an IPv6 host in brackets",
            remedy="correct encoder.server.listen or encoder.servers, e.g. 0.0.0.0:7070",
        )
    return parsed


def join_address(host: str, port: int) -> str:
    """The text that `split_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback IP. Other names are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable_host(listen_host: str, advertise: str | None) -> str:
    """The name that clients are given: `advertise`, or the address listened on, or this machine's name."""
    if advertise is not None:
        return advertise
    try:
        everywhere = ipaddress.ip_address(listen_host).is_unspecified
    except ValueError:
        everywhere = False
    return socket.gethostname() if everywhere else listen_host
