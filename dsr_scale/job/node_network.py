"""What one node finds out about another over TCP: that it answers, what its clock says, how fast a link is.

Each node listens on a free port and connects to others. A connection begins with a digest of the
meeting, so that a port which meanwhile belongs to another program is not taken for the node. Data goes
in acknowledged pieces and the median piece counts: one hiccup does not make a link slow, and a link that
is slow is known without waiting for all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import queue
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

CONNECT_TIMEOUT_S = 5.0
TRANSFER_LIMIT_S = 5.0
PIECES = 16
PIECE_BYTES = 4 * 2**20
"""64 MiB in all."""
CLOCK_QUESTIONS = 5
"""The one answered fastest counts."""

_SERVER_TIMEOUT_S = 30.0
_RANK, _CLOCK = struct.Struct("!I"), struct.Struct("!d")
_ASK_CLOCK, _SEND_PIECE, _RECEIVED = b"t", b"p", b"r"
_CHUNK_BYTES = 2**20

Key = TypeVar("Key")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Link:
    """One node's connection to another."""

    to: int
    """Rank of the other."""
    error: str = ""
    """Why there is none."""
    clock_behind_s: float = 0.0
    """The other's clock minus this node's."""
    bytes_per_s: float | None = None
    """None where no data was sent."""
    loopback: bool = False
    """Whether it never leaves the machine, so that its bandwidth says nothing."""


class Listener:
    """Answers other nodes of the same meeting from threads of its own, until it is closed."""

    def __init__(self, meeting: str, rank: int, *, clock: Callable[[], float] = time.time) -> None:
        """Takes a free port. `clock` gives seconds since the epoch."""
        self._digest, self._rank, self._clock = _digest(meeting), rank, clock
        try:
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except (OSError, ValueError):
            # Kernels without IPv6.
            self._socket = socket.create_server(("", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Nobody is let in any more."""
        with contextlib.suppress(OSError):
            # Wakes the thread that waits in accept.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_SERVER_TIMEOUT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if _receive(connection, len(self._digest)) != self._digest:
                return
            connection.sendall(_RANK.pack(self._rank))
            while command := connection.recv(1):
                if command == _ASK_CLOCK:
                    connection.sendall(_CLOCK.pack(self._clock()))
                elif command == _SEND_PIECE:
                    _discard(connection, PIECE_BYTES)
                    connection.sendall(_RECEIVED)
                else:
                    return


def measure_link(
    to: int,
    host: str,
    port: int,
    meeting: str,
    *,
    transfer: bool,
    clock: Callable[[], float] = time.time,
) -> Link:
    """Connects to the node of rank `to` at `host:port`, asks its clock and, with `transfer`, sends
    64 MiB. Never raises for what the network does: that is `Link.error`."""
    place = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_digest(meeting))
            try:
                answered = _RANK.unpack(_receive(connection, _RANK.size))[0]
            except OSError:
                return Link(to, f"something else answers at {place}")
            if answered != to:
                return Link(to, f"{place} leads to another node, rank {answered}")
            return Link(
                to,
                clock_behind_s=_clock_difference_s(connection, clock),
                bytes_per_s=_transfer(connection) if transfer else None,
                loopback=_stays_here(connection),
            )
    except socket.gaierror:
        return Link(to, f"the name {host} does not resolve")
    except TimeoutError:
        return Link(to, f"no answer from {place} within {CONNECT_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Link(to, f"{place}: {(error.strerror or str(error)).lower()}")


def connection_error(host: str, port: int) -> str:
    """Why no TCP connection to `host:port` can be made; empty when one was."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            return ""
    except socket.gaierror:
        return "the name does not resolve"
    except TimeoutError:
        return f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def all_at_once(
    questions: Mapping[Key, Callable[[], Answer]], timeout_s: float
) -> dict[Key, Answer]:
    """Answers to all questions that came within `timeout_s`.

    Each runs in a thread that nobody waits for longer: looking up a name cannot be interrupted.
    """
    answers: queue.SimpleQueue[tuple[Key, Answer]] = queue.SimpleQueue()
    for key, question in questions.items():
        threading.Thread(
            target=lambda key=key, question=question: answers.put((key, question())), daemon=True
        ).start()
    found: dict[Key, Answer] = {}
    until = time.monotonic() + timeout_s
    with contextlib.suppress(queue.Empty):
        while len(found) < len(questions):
            key, answer = answers.get(timeout=max(0.0, until - time.monotonic()))
            found[key] = answer
    return found


def _clock_difference_s(connection: socket.socket, clock: Callable[[], float]) -> float:
    """The other's clock minus this one, as NTP reckons: the answer was given half way."""
    exchanges = []
    for _ in range(CLOCK_QUESTIONS):
        asked, began = clock(), time.monotonic()
        connection.sendall(_ASK_CLOCK)
        theirs = _CLOCK.unpack(_receive(connection, _CLOCK.size))[0]
        round_trip = time.monotonic() - began
        exchanges.append((round_trip, theirs - (asked + round_trip / 2)))
    return min(exchanges)[1]


def _transfer(connection: socket.socket) -> float:
    """Bytes per second of the median piece. Raises TimeoutError when not one arrives."""
    connection.settimeout(TRANSFER_LIMIT_S)
    piece = bytes(PIECE_BYTES)
    took_s: list[float] = []
    until = time.monotonic() + TRANSFER_LIMIT_S
    while len(took_s) < PIECES and time.monotonic() < until:
        began = time.monotonic()
        try:
            connection.sendall(_SEND_PIECE)
            connection.sendall(piece)
            _receive(connection, len(_RECEIVED))
        except TimeoutError:
            if not took_s:
                raise
            break
        took_s.append(time.monotonic() - began)
    return PIECE_BYTES / statistics.median(took_s)


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address; other names are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stays_here(connection: socket.socket) -> bool:
    """Whether both ends are addresses of this machine."""
    ours, theirs = connection.getsockname()[0], connection.getpeername()[0]
    return ours == theirs or is_loopback(theirs)


def _digest(meeting: str) -> bytes:
    return hashlib.sha256(b"dsr-scale preflight " + meeting.encode()).digest()


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises OSError when the other end closes before."""
    received = bytearray()
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError("closed by the other end")
        received += part
    return bytes(received)


def _discard(connection: socket.socket, size: int) -> None:
    """Reads `size` bytes and keeps none."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size:
        count = connection.recv_into(buffer, min(size, _CHUNK_BYTES))
        if not count:
            raise ConnectionResetError("closed by the other end")
        size -= count
