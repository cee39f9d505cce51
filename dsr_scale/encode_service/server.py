"""What a server does with a call: let it in, read it, decode, encode, answer; and say no in time.

Each call is a coroutine, so waiting costs no thread and a client that goes away takes its work along. A
call holds a credit from before its images are sent until its answer is written, and no longer than
`encoder.request_timeout_s`: so `credits` requests and their answers are all that is ever in memory,
however many clients wait and whatever they do. Clients that find no room are told within a second and
ask another server.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.data.encoded import Encoded
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.batching import AnswerSize, DeviceThread, Job
from dsr_scale.encode_service.contract import Contract
from dsr_scale.encode_service.credentials import Credentials
from dsr_scale.encode_service.decoding import decode_rows, pieces
from dsr_scale.encode_service.metrics import ServerMetrics
from dsr_scale.encode_service.stored_latents import StoredLatents

HELLO_S = 10.0
"""How long a call may be open without a first message."""
CREDIT_WAIT_S = 1.0
"""How long a call waits for a credit before the client is sent elsewhere."""
ABORT_S = 1.0
"""How long an error may take to leave."""
MOST_CALLS = 1024
"""Calls open at once, health checks and waiting ones included; gRPC refuses the rest."""
LARGEST_ANSWER = 8
"""An answer is at most this many times as large as a request may be: float32 latents of raw pixels are
4 times the pixels, captions come on top."""


class Refused(Exception):
    """A call that ends with an error for its client."""

    def __init__(self, outcome: str, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome
        self.code = code


@dataclass(frozen=True)
class Loaded:
    """What a server has once its encoders are ready."""

    contract: Contract
    device: DeviceThread
    answer_size: AnswerSize
    stored: StoredLatents | None


@dataclass
class _Progress:
    """Of one call."""

    answered: bool = False
    """All but the last chunk is written."""


class EncoderServicer:
    """The methods of `wire.SERVICE`."""

    def __init__(
        self, run: AnyRun, credentials: Credentials | None, metrics: ServerMetrics
    ) -> None:
        """Refuses calls until `loaded` is set; `credentials` None lets everyone in."""
        settings = run.encoder.server
        self.loaded: Loaded | None = None
        self._run = run
        self._credentials = credentials
        self._metrics = metrics
        self._limit_bytes = settings.max_request_mib << 20
        self._credits = asyncio.Semaphore(settings.credits)
        self._receivers = ThreadPoolExecutor(settings.credits, "receive")
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._inside = 0
        self._draining = False

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`; messages are bytes as they are."""
        methods = {
            wire.DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
            wire.ENCODE: grpc.stream_stream_rpc_method_handler(self._encode),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)

    @property
    def serving(self) -> bool:
        """Whether a call would be answered."""
        return self.loaded is not None and not self._draining

    async def drain(self, most_s: float) -> None:
        """Lets nobody in any more and waits, at most `most_s`, until those inside are done."""
        self._draining = True
        until_s = time.monotonic() + most_s
        while self._inside and time.monotonic() < until_s:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Lets go of the threads, once no call is open any more."""
        self._receivers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _describe(self, _request: bytes, context: Any) -> bytes:
        try:
            return self._admitted(context).contract.to_json()
        except Refused as refusal:
            return await context.abort(refusal.code, str(refusal))

    async def _encode(self, _messages: Any, context: Any) -> None:
        refused = await self._refused(context)
        if refused is None:
            return
        # Out here nothing holds on to the answer any more.
        try:
            async with asyncio.timeout(ABORT_S):
                await context.abort(refused.code, str(refused))
        except TimeoutError:
            # The client does not read, so what was written keeps the status from leaving.
            raise asyncio.CancelledError from None

    async def _refused(self, context: Any) -> Refused | None:
        """Answers a call, or says why not; counts how it ended."""
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        outcome, refused = "internal", None
        progress = _Progress()
        try:
            await self._converse(context, progress)
            outcome = "ok"
        except Refused as refusal:
            outcome, refused = refusal.outcome, refusal.with_traceback(None)
        except wire.MalformedMessage as error:
            outcome, refused = "malformed", Refused("malformed", invalid, str(error))
        except InputError as error:
            outcome, refused = "invalid", Refused("invalid", invalid, str(error))
        except TimeoutError:
            outcome = "late"
            text = f"not finished after {self._run.encoder.request_timeout_s:g} s"
            refused = Refused("late", grpc.StatusCode.DEADLINE_EXCEEDED, text)
        except asyncio.CancelledError:
            outcome = "ok" if progress.answered else "gone"
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            text = f"{type(error).__name__}: {error}"
            refused = Refused("internal", grpc.StatusCode.INTERNAL, text)
        finally:
            self._metrics.requests.labels(outcome).inc()
        return refused

    async def _converse(self, context: Any, progress: _Progress) -> None:
        loaded = self._admitted(context)
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await context.read()
        except TimeoutError:
            text = f"no first message after {HELLO_S:g} s"
            raise Refused("late", grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
        if hello != b"":
            raise wire.MalformedMessage("a call that does not begin with an empty message")
        async with self._credit():
            started_s = time.monotonic()
            async with asyncio.timeout(self._run.encoder.request_timeout_s):
                await context.write(wire.CREDIT)
                request = await self._received(context)
                self._refuse_other_contract(request, loaded.contract)
                refuse_oversized(request, loaded.answer_size, self._limit_bytes)
                encoded, new = await self._encoded(request, loaded)
                rows = len(request.rows)
                del request  # its images are no longer needed while the answer is sent
                storing = None
                if loaded.stored is not None and new:
                    storing = self._in(self._decoders, loaded.stored.keep, new)
                answer = wire.reply_chunks(encoded, loaded.contract.fingerprint)
                # The first chunk needs the checksum of all, the others are mere copies.
                chunk = await self._in(self._receivers, next, answer)
                for after in answer:
                    await context.write(chunk)
                    chunk = after
                if storing is not None:
                    await storing
                # A client may hang up as soon as it has the last chunk.
                progress.answered = True
                self._metrics.answered(
                    images=rows - len(encoded.failures),
                    captions=rows,
                    failed=len(encoded.failures),
                    latency_s=time.monotonic() - started_s,
                )
                await context.write(chunk)

    def _admitted(self, context: Any) -> Loaded:
        """Raises Refused for strangers, and for all until the encoders are loaded."""
        known = self._credentials is None or self._credentials.accepts(
            context.invocation_metadata()
        )
        if not known:
            text = "no token, or not that of this server's credentials"
            raise Refused("stranger", grpc.StatusCode.UNAUTHENTICATED, text)
        if self.loaded is None or self._draining:
            raise _not_serving("is stopping" if self._draining else "is loading its encoders")
        return self.loaded

    @asynccontextmanager
    async def _credit(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(CREDIT_WAIT_S):
                await self._credits.acquire()
        except TimeoutError:
            text = f"all {self._run.encoder.server.credits} credits are given out"
            raise Refused("busy", grpc.StatusCode.RESOURCE_EXHAUSTED, text) from None
        self._inside += 1
        self._metrics.credits_in_use.set(self._inside)
        try:
            if self._draining:
                raise _not_serving("is stopping")
            yield
        finally:
            self._inside -= 1
            self._metrics.credits_in_use.set(self._inside)
            self._credits.release()

    async def _received(self, context: Any) -> wire.EncodeRequest:
        """The request, read and checked in a thread: checksums of megabytes would hold up others."""
        loop = asyncio.get_running_loop()

        def messages() -> Iterator[bytes]:
            while True:
                # Reading ends with the call, which the timeout ends.
                piece = asyncio.run_coroutine_threadsafe(context.read(), loop).result()
                if piece is grpc.aio.EOF:  # type: ignore[attr-defined]
                    return
                yield piece

        return await self._in(
            self._receivers, wire.EncodeRequest.receive, messages(), self._limit_bytes
        )

    def _refuse_other_contract(self, request: wire.EncodeRequest, contract: Contract) -> None:
        if request.contract != contract.fingerprint:
            text = f"this server's contract is {contract.fingerprint}, not {request.contract}"
            raise Refused("contract", grpc.StatusCode.FAILED_PRECONDITION, text)

    async def _encoded(
        self, request: wire.EncodeRequest, loaded: Loaded
    ) -> tuple[Encoded, dict[bytes, torch.Tensor]]:
        """The answer, and what of it the cache does not have yet.

        Latents come from the cache where it has them, all else from the device.
        """
        rows, stored = request.rows, loaded.stored
        keys: list[bytes] = []
        found: dict[int, torch.Tensor] = {}
        if stored is not None:
            keys = await self._in(self._decoders, stored.keys, rows, request.target)
            found = await self._in(self._decoders, stored.find, keys)
            self._metrics.cache_hits.inc(len(found))
            self._metrics.cache_misses.inc(len(rows) - len(found))
        missing = [number for number in range(len(rows)) if number not in found]
        pixels, failures = await self._decoded(request, missing)
        job = Job(pixels, [row.caption for row in rows])
        loaded.device.submit(job)
        fresh, tokens, mask = await asyncio.wrap_future(job.answer)
        latents = _assembled(len(rows), found, missing, fresh, failures)
        new = {keys[n]: latents[n] for n in missing if keys and n not in failures}
        return Encoded(latents, tokens, mask, failures), new

    async def _decoded(
        self, request: wire.EncodeRequest, missing: list[int]
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Pixels uint8 [M,3,H,W] of the rows in `missing`, black where one failed, and why it did."""
        rows = [request.rows[number] for number in missing]
        pixels = np.zeros((len(rows), 3, *request.target), dtype=np.uint8)
        work = partial(decode_rows, rows, pixels=pixels, background=self._run.data.background)
        parts = await asyncio.gather(
            *(self._in(self._decoders, work, p) for p in pieces(len(rows)))
        )
        failures = {missing[n]: reason for part in parts for n, reason in part.items()}
        return torch.from_numpy(pixels), failures

    def _in(self, pool: ThreadPoolExecutor, work: Any, *arguments: Any) -> asyncio.Future[Any]:
        """Starts `work` in a thread of `pool`."""
        return asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def refuse_oversized(request: wire.EncodeRequest, size: AnswerSize, limit_bytes: int) -> None:
    """Raises Refused for more than the memory set aside for a request and its answer."""
    rows, (height, width) = len(request.rows), request.target
    answer = rows * (height * width * size.per_pixel + size.per_caption)
    for what, needed, limit in (
        ("its pixels take", rows * 3 * height * width, limit_bytes),
        ("its answer takes", answer, LARGEST_ANSWER * limit_bytes),
    ):
        if needed > limit:
            text = f"{rows} images of {height}×{width}: {what} {needed / 2**20:.0f} MiB, "
            text += f"{limit / 2**20:.0f} allowed (encoder.server.max_request_mib)"
            raise Refused("malformed", grpc.StatusCode.INVALID_ARGUMENT, text)


def _not_serving(why: str) -> Refused:
    return Refused("not_serving", grpc.StatusCode.UNAVAILABLE, f"the server {why}")


def _assembled(
    rows: int,
    found: dict[int, torch.Tensor],
    missing: list[int],
    fresh: torch.Tensor,
    failures: dict[int, str],
) -> torch.Tensor:
    """[N,C,h,w] in the request's order, zero where an image failed."""
    if not found and not failures:
        return fresh
    like = fresh[0] if missing else next(iter(found.values()))
    latents = torch.zeros(rows, *like.shape, dtype=like.dtype)
    for number, latent in found.items():
        latents[number] = latent
    for place, number in enumerate(missing):
        if number not in failures:
            latents[number] = fresh[place]
    return latents
