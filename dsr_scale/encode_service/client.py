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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import BYTE_VOCABULARY
from dsr_scale.config.run import RunConfig
from dsr_scale.data.encoded import Encoded, EncodersLost, Row
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.contract import Contract, expected

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""How long a server that failed is left alone: doubled each time it fails in a row."""

BUSY_PAUSE_S = 0.02
"""How long to wait when every server has given out its credits."""

REGISTRY_AGE_S = 2.0
"""The registry, which is on a shared disk, is read again after this long."""

REFUSALS = 3
"""A request that so many attempts call malformed is at fault itself."""

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

    channel: Any
    contract: Contract | None = None
    failures: int = 0
    usable_from_s: float = 0.0
    last_error: str = ""
    unfit: bool = False


@dataclass
class ServiceClient:
    """Encodes rows by asking servers. Pickled to data workers, which connect by themselves."""

    run: RunConfig
    contract: Contract | None = None
    """What servers must fulfil to the letter; None until `agree` was asked."""
    speaks: bool = True
    """Tells a person when it waits; one client of many does."""
    _servers: dict[str, _Server] = field(default_factory=dict, repr=False)
    _known: tuple[float, list[str]] = (-REGISTRY_AGE_S, [])
    """When the addresses were read, and what they were."""
    _token: tuple[tuple[str, str], ...] | None = field(default=None, repr=False)
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
        contract = self._until_answered(lambda server: server.contract)
        assert contract is not None
        return contract

    def bound_to(self, contract: Contract) -> ServiceClient:
        """A client that accepts no other contract than this."""
        return ServiceClient(self.run, contract, self.speaks)

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        """Latents and tokens of `rows` at `target`, from any server.

        Raises EncodersLost when none answers within `encoder.give_up_after_s`; InputError when
        servers refuse the request or are all of other encoders.
        """
        assert self.contract is not None
        request = wire.EncodeRequest(self.contract.fingerprint, target, tuple(rows))
        return self._until_answered(lambda server: self._ask(server, request))

    @property
    def _speaks_here(self) -> bool:
        worker = get_worker_info()
        return self.speaks and (worker is None or worker.id == 0)

    def close(self) -> None:
        """Closes all connections."""
        for server in self._servers.values():
            server.channel.close()
        self._servers.clear()

    def _until_answered(self, ask: Callable[[_Server], _Answer]) -> _Answer:
        """Asks one server after the other until one answers."""
        waiting = _Waiting(self.run.encoder.give_up_after_s, self._speaks_here)
        refusals = 0
        while True:
            busy = False
            for address, server in self._in_turn():
                try:
                    self._describe(address, server)
                    answer = ask(server)
                except _Busy:
                    busy = True
                except _Refused as error:
                    refusals += 1
                    self._failed(server, str(error))
                    if refusals == REFUSALS:
                        raise _refused(str(error)) from error
                except _Unfit as error:
                    server.unfit = True
                    self._token = None
                    self._failed(server, str(error))
                except (_Failed, wire.MalformedMessage) as error:
                    server.contract = None
                    self._failed(server, f"{address}: {error}")
                else:
                    server.failures, server.unfit = 0, False
                    waiting.answered()
                    return answer
            if busy:
                waiting.answered()
                time.sleep(BUSY_PAUSE_S)
                continue
            if self.contract is None:
                self._refuse_if_all_unfit()
            waiting.nobody({a: s.last_error for a, s in self._servers.items()}, self.run)

    def _in_turn(self) -> Iterator[tuple[str, _Server]]:
        """Servers that may be asked now, each time beginning with another."""
        addresses = self._addresses()
        for gone in self._servers.keys() - set(addresses):
            self._servers.pop(gone).channel.close()
        self._turn += 1
        now = time.monotonic()
        for place in range(len(addresses)):
            address = addresses[(self._turn + place) % len(addresses)]
            if address not in self._servers:
                from dsr_scale.encode_service.credentials import open_channel
                from dsr_scale.encode_service.memory import keep_large_blocks

                keep_large_blocks()
                self._servers[address] = _Server(open_channel(address, self.run))
            server = self._servers[address]
            if server.usable_from_s <= now:
                yield address, server

    def _addresses(self) -> list[str]:
        from dsr_scale.encode_service.registry import registry_directory, servers_in

        read_s, addresses = self._known
        if time.monotonic() - read_s >= REGISTRY_AGE_S or not addresses:
            registered = servers_in(registry_directory(self.run))
            addresses = sorted({*self.run.encoder.servers, *registered})
            self._known = (time.monotonic(), addresses)
        return addresses

    def _refuse_if_all_unfit(self) -> None:
        servers = self._servers.values()
        if servers and all(server.unfit for server in servers):
            raise InputError(
                found="; ".join(server.last_error for server in servers),
                required="an encoder server of this run's encoders",
                remedy="start 'dsr-scale serve' with the same run file and files, or correct the "
                "run's encoders, encoder.registry or encoder.credentials",
            )

    def _describe(self, address: str, server: _Server) -> None:
        """Learns what a server gives. Raises _Unfit unless it is what the run needs."""
        if server.contract is not None:
            return
        import grpc

        describe = server.channel.unary_unary(f"/{wire.SERVICE}/{wire.DESCRIBE}")
        try:
            text = describe(b"", timeout=self.run.encoder.request_timeout_s, **self._metadata())
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

    def _ask(self, server: _Server, request: wire.EncodeRequest) -> Encoded:
        """One attempt at one server."""
        import grpc

        conversation = _Conversation(request)
        call = server.channel.stream_stream(f"/{wire.SERVICE}/{wire.ENCODE}")(
            conversation.messages(), timeout=self.run.encoder.request_timeout_s, **self._metadata()
        )
        try:
            if next(call, None) != wire.CREDIT:
                raise wire.MalformedMessage("no credit was granted")
            conversation.go_on()
            return wire.receive_reply(
                call, request.contract, len(request.rows), padding=BYTE_VOCABULARY - 1
            )
        except grpc.RpcError as error:
            raise _sorted_out(error) from error
        finally:
            conversation.end()
            call.cancel()

    def _metadata(self) -> Mapping[str, Any]:
        if self._token is None:
            from dsr_scale.encode_service.credentials import call_metadata

            self._token = call_metadata(self.run)
        return {"metadata": self._token}

    def _failed(self, server: _Server, reason: str) -> None:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**server.failures)
        server.failures += 1
        server.usable_from_s = time.monotonic() + pause_s
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


class _Waiting:
    """Patience with a service that does not answer, told once."""

    def __init__(self, patience_s: float, speaks: bool) -> None:
        self._patience_s = patience_s
        self._speaks = speaks
        self._since_s: float | None = None

    def nobody(self, errors: Mapping[str, str], run: RunConfig) -> None:
        """No server could be asked. Raises EncodersLost when that has lasted too long."""
        now = time.monotonic()
        tried = "; ".join(f"{address}: {error}" for address, error in errors.items())
        tried = tried or "none is registered and encoder.servers names none"
        if self._since_s is None:
            self._since_s = now
            self._say(f"no encoder server answers, waiting {self._patience_s:g} s ({tried})")
        if now - self._since_s > self._patience_s:
            raise EncodersLost(
                found=f"no encoder server answered for {self._patience_s:g} s ({tried})",
                required="a running 'dsr-scale serve' of this run's encoders",
                remedy=f"start it with the same run file (its registry is "
                f"{registry_name(run)}), then give the same command again",
            )
        time.sleep(FIRST_PAUSE_S)

    def answered(self) -> None:
        """Somebody did."""
        if self._since_s is not None:
            waited_s = time.monotonic() - self._since_s
            self._since_s = None
            self._say(f"encoder servers answer again after {waited_s:.1f} s")

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, file=sys.stderr, flush=True)


def registry_name(run: RunConfig) -> str:
    """The directory where this run looks for servers."""
    from dsr_scale.encode_service.registry import registry_directory

    return str(registry_directory(run))


def _sorted_out(error: Any) -> Exception:
    """What a failed call means for what to do next."""
    import grpc

    text = f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
    match error.code():
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _Busy()
        # A server answers "internal" when its encoders are well and fail on this request alone.
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.INTERNAL:
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
