"""A run's side of the service: rows in, latents out, whatever happens to single servers.

A request is stateless and its answer a function of it, so nothing is lost or doubled by asking again:
a server that dies, stalls, is full or answers nonsense costs time only. Each data worker asks for one
micro-batch at a time, workers take turns over all servers, and the loader gives batches in order,
whichever server was fastest. What must not happen is an answer of another encoder: every server is
described before it is used, and one that differs is left out and named.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.data.encoded import Encoded, Row
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.answers import expected_answer
from dsr_scale.encode_service.contract import Contract, expected
from dsr_scale.encode_service.patience import PAUSE_S, Patience

LONGEST_PAUSE_S = 10.0
"""How long a server that failed is left alone at most: `PAUSE_S`, doubled each time in a row."""

AVOIDED_FOR = 10
"""A server that failed is avoided for this many times as long as the failed attempt took, so that one
that hangs costs its callers a tenth of their time at most, as long as there are others."""

REGISTRY_AGE_S = 2.0
"""The registry, which is on a shared disk, is read again after this long."""

REFUSALS = 3
"""A request that so many servers, or all if there are fewer, call malformed is at fault itself."""

_Answer = TypeVar("_Answer")


class _Busy(Exception):
    """The server is well and full."""


class _Failed(Exception):
    """The call did not come to an end; the text says how."""


class _Refused(Exception):
    """The server says that the request itself is wrong."""


class _Unfit(Exception):
    """The server is of another contract, or does not know us."""


@dataclass
class _Server:
    """What a client knows of one address."""

    channel: Any = None
    """Opened when it is first needed, and anew after a failure."""
    metadata: tuple[tuple[str, str], ...] = ()
    contract: Contract | None = None
    failures: int = 0
    """In a row."""
    usable_from_s: float = 0.0
    preferred_from_s: float = 0.0
    """Until then it is asked only if no other server is there."""
    last_error: str = ""
    unfit: bool = False


@dataclass
class ServiceClient:
    """Encodes rows by asking servers. Pickled to data workers, which connect by themselves."""

    run: AnyRun
    contract: Contract | None = None
    """What servers must fulfil to the letter; None until `agree` was asked."""
    speaks: bool = True
    """Tells a person when it waits; one client of many does."""
    _servers: dict[str, _Server] = field(default_factory=dict, repr=False)
    _known: tuple[float, list[str]] = (-REGISTRY_AGE_S, [])
    """When the addresses were read, and what they were."""
    _tokens: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict, repr=False)
    _turn: int = field(default_factory=lambda: random.Random(os.getpid()).randrange(1 << 16))

    def __getstate__(self) -> dict[str, Any]:
        return {"run": self.run, "contract": self.contract, "speaks": self.speaks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def wants_pixels(self) -> bool:
        """Rows are to hold pixels, not files."""
        return self.run.encoder.send == "pixels"

    def agree(self) -> Contract:
        """The contract of the servers that run, of which they must all have the same.

        Waits for a first server. Raises InputError when there are servers, but none that gives what
        the run file says; EncodersLost when none answers in time.
        """
        contract = self._until_answered(lambda server, _: server.contract)
        assert contract is not None
        return contract

    def bound_to(self, contract: Contract) -> ServiceClient:
        """A client that accepts no other contract than this."""
        return ServiceClient(self.run, contract, self.speaks)

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        """Latents and tokens of `rows` at `target`, from any server.

        Raises EncodersLost when none answers within `encoder.give_up_after_s`, those of other encoders
        counting as none; InputError when servers refuse the request.
        """
        assert self.contract is not None
        request = wire.EncodeRequest(self.contract.fingerprint, target, tuple(rows))
        return self._until_answered(lambda server, timeout_s: self._ask(server, request, timeout_s))

    @property
    def _speaks_here(self) -> bool:
        worker = get_worker_info()
        return self.speaks and (worker is None or worker.id == 0)

    def close(self) -> None:
        """Closes all connections."""
        for server in self._servers.values():
            self._close(server)
        self._servers.clear()

    def _until_answered(self, ask: Callable[[_Server, float], _Answer]) -> _Answer:
        """Asks one server after the other until one answers, or patience is at its end."""
        patience = Patience(self.run, speaks=self._speaks_here)
        refused_by: set[str] = set()
        refusals = 0
        while True:
            busy = False
            for address, server in self._in_turn():
                started_s = time.monotonic()
                try:
                    self._describe(address, server, patience.attempt_s())
                    answer = ask(server, patience.attempt_s())
                except _Busy:
                    busy = True
                except _Refused as error:
                    refusals += 1
                    refused_by.add(address)
                    self._failed(server, str(error), started_s)
                    if refusals >= REFUSALS and len(refused_by) >= min(
                        REFUSALS, len(self._servers)
                    ):
                        raise _refused(str(error)) from error
                except _Unfit as error:
                    server.unfit = True
                    self._failed(server, str(error), started_s)
                except (_Failed, wire.MalformedMessage) as error:
                    self._failed(server, f"{address}: {error}", started_s)
                else:
                    server.failures, server.unfit = 0, False
                    patience.answered()
                    return answer
            if self.contract is None:
                self._refuse_if_all_unfit()
            errors = [server.last_error for server in self._servers.values()]
            patience.go_on(errors, busy=busy)

    def _in_turn(self) -> Iterator[tuple[str, _Server]]:
        """Servers that may be asked now, each time beginning with another."""
        addresses = self._addresses()
        for gone in self._servers.keys() - set(addresses):
            self._close(self._servers.pop(gone))
        self._turn += 1
        now_s = time.monotonic()
        turned = [addresses[(self._turn + n) % len(addresses)] for n in range(len(addresses))]
        pairs = [(address, self._servers.setdefault(address, _Server())) for address in turned]
        usable = [pair for pair in pairs if pair[1].usable_from_s <= now_s]
        preferred = [pair for pair in usable if pair[1].preferred_from_s <= now_s]
        yield from preferred or usable

    def _addresses(self) -> list[str]:
        from dsr_scale.encode_service.registry import registry_directory, servers_in

        read_s, addresses = self._known
        if time.monotonic() - read_s >= REGISTRY_AGE_S or not addresses:
            registered = servers_in(registry_directory(self.run))
            addresses = sorted({*self.run.encoder.servers, *registered})
            self._known = (time.monotonic(), addresses)
        return addresses

    def _refuse_if_all_unfit(self) -> None:
        """There are servers, though none that fits; those that do not answer may be gone for good."""
        servers = self._servers.values()
        unfit = [server.last_error for server in servers if server.unfit]
        if unfit and all(server.unfit or server.failures for server in servers):
            raise InputError(
                found="; ".join(unfit),
                required="an encoder server of this run's encoders",
                remedy="start 'dsr-scale serve' with the same run file and files, or correct the "
                "run's encoders, encoder.registry or encoder.credentials",
            )

    def _describe(self, address: str, server: _Server, timeout_s: float) -> None:
        """Learns what a server gives. Raises _Unfit unless it is what the run needs."""
        if server.contract is not None:
            return
        import grpc

        self._connect(address, server)
        describe = server.channel.unary_unary(f"/{wire.SERVICE}/{wire.DESCRIBE}")
        try:
            text = describe(b"", timeout=timeout_s, metadata=server.metadata)
        except grpc.RpcError as error:
            raise _sorted_out(error) from error
        try:
            contract = Contract.from_json(text)
        except ValueError as error:
            raise wire.MalformedMessage(f"a description that is none: {error}") from error
        wanted = (self.contract or expected(self.run)).values
        differences = contract.differences(wanted)
        if differences:
            raise _Unfit(f"{address} would give other latents: {'; '.join(differences)}")
        server.contract = contract

    def _ask(self, server: _Server, request: wire.EncodeRequest, timeout_s: float) -> Encoded:
        """One attempt at one server."""
        import grpc

        conversation = _Conversation(request)
        call = server.channel.stream_stream(f"/{wire.SERVICE}/{wire.ENCODE}")(
            conversation.messages(), timeout=timeout_s, metadata=server.metadata
        )
        try:
            if next(call, None) != wire.CREDIT:
                raise wire.MalformedMessage("no credit was granted")
            conversation.go_on()
            return wire.receive_reply(
                call,
                request.contract,
                len(request.rows),
                expected_answer(self.run, request.target),
            )
        except grpc.RpcError as error:
            raise _sorted_out(error) from error
        finally:
            conversation.end()
            call.cancel()

    def _connect(self, address: str, server: _Server) -> None:
        """Anew after every failure: credentials may have changed, and gRPC's own pauses are left out."""
        from dsr_scale.encode_service.credentials import call_metadata, open_channel
        from dsr_scale.encode_service.memory import keep_large_blocks

        keep_large_blocks()
        self._close(server)
        server.channel = open_channel(address, self.run)
        server.metadata = call_metadata(address, self.run)

    def _close(self, server: _Server) -> None:
        if server.channel is not None:
            server.channel.close()
            server.channel = server.contract = None

    def _failed(self, server: _Server, reason: str, started_s: float) -> None:
        now_s = time.monotonic()
        server.usable_from_s = now_s + min(LONGEST_PAUSE_S, PAUSE_S * 2**server.failures)
        server.preferred_from_s = now_s + AVOIDED_FOR * (now_s - started_s)
        server.failures += 1
        self._close(server)
        if self._speaks_here and reason != server.last_error:
            print(f"encoder server: {reason}", file=sys.stderr, flush=True)
        server.last_error = reason


class _Conversation:
    """Our half of a call: hello, and the request once a credit was granted."""

    def __init__(self, request: wire.EncodeRequest) -> None:
        self._request = request
        self._decided = threading.Event()
        self._goes_on = False

    def messages(self) -> Iterator[bytes]:
        """What gRPC sends, from a thread of its own."""
        yield b""
        self._decided.wait()
        if self._goes_on:
            yield from self._request.chunks()

    def go_on(self) -> None:
        """The server has room for the request."""
        self._goes_on = True
        self._decided.set()

    def end(self) -> None:
        """Lets go of gRPC's thread, whatever became of the call."""
        self._decided.set()


def _sorted_out(error: Any) -> Exception:
    """What a failed call means for what to do next."""
    import grpc

    text = f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
    match error.code():
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _Busy()
        case grpc.StatusCode.INVALID_ARGUMENT:
            return _Refused(text)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return _Unfit(text)
    return _Failed(text)


def _refused(reason: str) -> InputError:
    return InputError(
        found=f"encoder servers refuse a request: {reason}",
        required="images and captions that the encoders take",
        remedy="look at the server's log; data.resolution, data.buckets, encoder.server.max_request_mib "
        "and the micro-batch decide what is sent",
    )
