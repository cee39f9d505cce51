"""How a run file and an encoder server write where a server is: `host:port`."""

from __future__ import annotations

import ipaddress

LAST_PORT = 65_535


def parse_address(address: str) -> tuple[str, int] | None:
    """`host:port` or `[IPv6]:port` → host without brackets, and port; None for anything else."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit()) or int(port) > LAST_PORT:
        return None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        return (host, int(port)) if _is_ipv6(host) else None
    return (host, int(port)) if _is_name(host) else None


def is_host(text: str) -> bool:
    """Whether this is a host name or an IP without brackets, and no port."""
    return _is_name(text) or _is_ipv6(text)


def _is_name(host: str) -> bool:
    """A host name or an IPv4 address."""
    return bool(host) and not any(char.isspace() or char in ":/[]@" for char in host)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
