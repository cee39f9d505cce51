"""Served latents are local ones, whatever else is asked; and no call can hurt the server."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fake_encoders import (
    TIMEOUT_S,
    Call,
    Gate,
    Server,
    apart,
    as_pixels,
    ask,
    assert_same,
    decoded,
    encode,
    file_rows,
    picture,
    refusal,
    running,
    tiny_run,
)

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import RunConfig
from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.contract import Contract
from dsr_scale.encode_service.credentials import open_channel
from dsr_scale.encode_service.local import build_local
from dsr_scale.encode_service.registry import entries_in, registry_directory, servers_in

TARGET = (32, 32)


def request_of(server: Server, rows: list[Row], target: tuple[int, int] = TARGET):
    return wire.EncodeRequest(server.ready.fingerprint, target, tuple(rows))


def locally(run: RunConfig, rows: list[Row], target: tuple[int, int] = TARGET):
    local = build_local(run, torch.device("cpu"))
    return local.encode(decoded(rows, run, target), [row.caption for row in rows])


def until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health_of(channel) -> str:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub(channel)
    status = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


def watched_health(channel) -> Iterator[str]:
    """Each status as it changes."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub(channel)
    for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S):
        yield health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@apart
def test_served_is_local_bit_for_bit(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.batch_images=4")
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        for rows in (file_rows(6), as_pixels(file_rows(6), run, TARGET), file_rows(1)):
            assert_same(encode(channel, run, request_of(server, rows)), locally(run, rows))
        wide = (24, 48)
        rows = file_rows(3)
        assert_same(encode(channel, run, request_of(server, rows, wide)), locally(run, rows, wide))
        describe = channel.unary_unary(f"/{wire.SERVICE}/{wire.DESCRIBE}")
        contract = Contract.from_json(describe(b"", timeout=TIMEOUT_S))
        assert contract == build_local(run, torch.device("cpu")).contract


@apart
def test_answers_of_several_chunks_and_without_text(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        "encoders.text={kind: none}",
        "model.conditioning={kind: class, num_classes: 2}",
        "encoders.latent_dtype=bf16",
    )
    target = (512, 512)
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        rows = file_rows(8)
        served = encode(channel, run, request_of(server, rows, target))
        assert served.latents.nbytes > 2 * wire.CHUNK_BYTES
        assert_same(served, locally(run, rows, target))


@apart
def test_requests_that_wait_are_encoded_together(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.batch_images=10")
    gate = Gate()
    with running(run, hook=gate) as server, open_channel(server.ready.address, run) as channel:
        sizes, wide = [1, 2, 3, 4, 3, 1], (32, 64)
        targets = [TARGET, TARGET, TARGET, TARGET, wide, wide]
        asked = [file_rows(n, first=10 * n) for n in sizes]

        def one(number: int):
            request = request_of(server, asked[number], targets[number])
            return encode(channel, run, request)

        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(one, 0)
            assert gate.arrived.acquire(timeout=TIMEOUT_S)
            rest = []
            for number in range(1, 6):
                rest.append(pool.submit(one, number))
                until(lambda n=number: server.value("queue_depth") == n)
            assert server.value("credits_in_use") == 6
            gate.open()
            answers = [first.result(TIMEOUT_S), *[answer.result(TIMEOUT_S) for answer in rest]]
        # The warm-up, the first alone, those of equal target behind it, those of another.
        assert gate.seen == [1, 1, 9, 4]
        assert server.value("batch_images_count") == 3
        assert server.value("batch_images_sum") == sum(sizes)
        for number, answer in enumerate(answers):
            assert_same(answer, locally(run, asked[number], targets[number]))


@apart
def test_a_request_larger_than_a_batch_is_encoded_in_parts(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.batch_images=4")
    seen: list[int] = []
    hook = lambda images: seen.append(len(images))  # noqa: E731
    with running(run, hook=hook) as server, open_channel(server.ready.address, run) as channel:
        rows = file_rows(10)
        assert_same(encode(channel, run, request_of(server, rows)), locally(run, rows))
        assert seen == [1, 4, 4, 2]


@apart
def test_an_image_that_cannot_be_decoded_fails_alone(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    rows = file_rows(6)
    bomb = bytearray(picture(0))
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2  # width and height of the PNG's header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    bad = {
        0: (b"", "not an image"),
        2: (picture(2)[:-200], "OSError"),
        3: (bytes(bomb), "DecompressionBomb"),
        4: (script, "known format"),
    }
    for number, (data, _) in bad.items():
        rows[number] = rows[number]._replace(image=data)
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        served = encode(channel, run, request_of(server, rows))
        assert set(served.failures) == set(bad)
        for number, (_, reason) in bad.items():
            assert reason in served.failures[number]
            assert not served.latents[number].any()
        good = [1, 5]
        local = locally(run, [rows[number] for number in good])
        assert torch.equal(served.latents[good], local.latents)
        assert served.tokens is not None and local.tokens is not None
        assert torch.equal(served.tokens[good], local.tokens)
        assert server.value("failed_images_total") == 4
        assert server.value("images_total") == 2


@apart
def test_what_is_wrong_gets_an_error_and_the_next_request_an_answer(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.max_request_mib=1")
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        rows = file_rows(3)
        good = request_of(server, rows)
        local = locally(run, rows)
        valid = list(good.chunks())
        flipped = [*valid[:-1], valid[-1][:-1] + bytes([valid[-1][-1] ^ 1])]
        large = wire.EncodeRequest(good.contract, TARGET, (Row(-1, bytes(2 << 20), CENTRE, ""),))
        blank = np.zeros((3, 36, 36), np.uint8)
        cases = [
            (valid[:-1], "INVALID_ARGUMENT", "ends after"),
            ([b"short"], "INVALID_ARGUMENT", "a preamble of 5 bytes"),
            ([], "INVALID_ARGUMENT", "a preamble of 0 bytes"),
            (flipped, "INVALID_ARGUMENT", "checksum"),
            ([*valid, b"more"], "", ""),
            (large.chunks(), "INVALID_ARGUMENT", "1048576 allowed"),
            (wire.chunks({"contract": 1}, []), "INVALID_ARGUMENT", "no request"),
            (wire.EncodeRequest("0" * 32, TARGET, good.rows).chunks(), "FAILED_PRECONDITION", good.contract),
            (request_of(server, rows, (9999, 16)).chunks(), "INVALID_ARGUMENT", "max_request_mib"),
            (
                request_of(server, [Row(-1, blank, CENTRE, "")], (36, 36)).chunks(),
                "INVALID_ARGUMENT",
                "divisible by the patch of 8",
            ),
        ]  # fmt: skip
        for messages, status, text in cases:
            if status:
                got = refusal(lambda messages=messages: ask(channel, messages))
                assert got[0] == status and text in got[1], got
            assert_same(encode(channel, run, good), local)
        call = Call(channel)
        call.send([b"hello?"])
        assert refusal(lambda: next(call.replies))[0] == "INVALID_ARGUMENT"
        call.close()
        giant = Call(channel)
        giant.credit()
        giant.send([bytes(4 << 20)])  # within gRPC's limit, beyond ours
        assert refusal(lambda: next(giant.replies))[0] == "INVALID_ARGUMENT"
        giant.close()
        assert_same(encode(channel, run, good), local)
        assert server.outcomes("contract") == 1
        assert server.outcomes("invalid") == 1
        assert server.outcomes("malformed") == 9
        assert server.outcomes("internal") == 0


@apart
def test_no_more_requests_are_inside_than_there_are_credits(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.credits=2")
    gate = Gate()
    with (
        running(run, hook=gate) as server,
        open_channel(server.ready.address, run) as channel,
        mock.patch("dsr_scale.encode_service.server.CREDIT_WAIT_S", 0.2),
    ):
        calls = [Call(channel) for _ in range(5)]
        calls[0].credit()
        calls[1].credit()
        for call in calls[2:]:
            status, text = refusal(call.credit)
            assert status == "RESOURCE_EXHAUSTED" and "all 2 credits" in text
        assert server.value("credits_in_use") == 2
        calls[0].close()
        late = Call(channel)
        late.credit()
        for call in (late, *calls):
            call.close()
        until(lambda: server.value("credits_in_use") == 0)
        assert server.outcomes("busy") == 3
        assert server.outcomes("gone") == 3


@apart
def test_clients_that_stall_lose_their_credit(tmp_path: Path) -> None:
    settings = ("encoder.server.credits=1", "encoder.request_timeout_s=0.4")
    # The device is watched by the same time, and 64 large images take a while.
    run = tiny_run(tmp_path, *settings, "encoder.server.batch_images=4")
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        request = request_of(server, file_rows(3))
        sending = Call(channel)
        sending.credit()
        sending.send(list(request.chunks())[:2])
        # The next one waits for the credit of the first.
        assert_same(encode(channel, run, request), locally(run, list(request.rows)))
        status, text = refusal(lambda: next(sending.replies))
        assert status == "DEADLINE_EXCEEDED" and "not finished after 0.4 s" in text
        sending.close()
        reading = Call(channel)
        reading.credit()
        reading.send(request_of(server, file_rows(64), (256, 256)).chunks())
        reading.finish()  # and never reads the 50 MB it asked for
        until(lambda: server.outcomes("late") == 2)
        assert server.value("credits_in_use") == 0
        # And its client hears of that, should it ever read on.
        started_s = time.monotonic()
        assert refusal(lambda: list(reading.replies))[0] in ("DEADLINE_EXCEEDED", "CANCELLED")
        assert time.monotonic() - started_s < 5
        reading.close()


@apart
def test_a_client_that_goes_away_takes_its_work_along(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    gate = Gate()
    with (
        running(run, hook=gate) as server,
        open_channel(server.ready.address, run) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        kept = pool.submit(encode, channel, run, request_of(server, file_rows(2)))
        assert gate.arrived.acquire(timeout=TIMEOUT_S)
        leaving = Call(channel)
        leaving.credit()
        leaving.send(request_of(server, file_rows(5)).chunks())
        until(lambda: server.value("queue_depth") == 1)
        leaving.close()
        until(lambda: server.outcomes("gone") == 1)
        gate.open()
        kept.result(TIMEOUT_S)
        encode(channel, run, request_of(server, file_rows(1)))
        assert gate.seen == [1, 2, 1]


@apart
def test_a_failure_hits_only_the_request_that_caused_it(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.batch_wait_ms=200")

    def refuses_white(images: torch.Tensor) -> None:
        if (images == 255).all(dim=(1, 2, 3)).any():
            raise RuntimeError("white is not supported")

    with (
        running(run, hook=refuses_white) as server,
        open_channel(server.ready.address, run) as channel,
        ThreadPoolExecutor(2) as pool,
    ):
        white = Row(-1, np.full((3, 32, 32), 255, np.uint8), CENTRE, "")
        rows = file_rows(2)
        good = pool.submit(encode, channel, run, request_of(server, rows))
        status, text = refusal(lambda: encode(channel, run, request_of(server, [white])))
        assert status == "INTERNAL" and "white is not supported" in text
        assert_same(good.result(TIMEOUT_S), locally(run, rows))


@apart
def test_a_broken_device_ends_the_server(tmp_path: Path) -> None:
    from dsr_scale.encode_service.serving import BROKEN_DEVICE

    run = tiny_run(tmp_path)
    broken = threading.Event()

    def breaks(images: torch.Tensor) -> None:
        if broken.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with running(run, hook=breaks) as server, open_channel(server.ready.address, run) as channel:
        broken.set()
        status, text = refusal(lambda: encode(channel, run, request_of(server, file_rows(1))))
        assert status in ("INTERNAL", "UNAVAILABLE"), text
        assert server.ended.result(TIMEOUT_S) == BROKEN_DEVICE
        assert servers_in(registry_directory(run)) == []


@apart
def test_a_device_that_hangs_ends_the_server(tmp_path: Path) -> None:
    from dsr_scale.encode_service import serving

    run = tiny_run(tmp_path, "encoder.request_timeout_s=0.3")
    gate = Gate()
    with (
        mock.patch.object(serving, "LAST_WORDS_S", 1.0),
        running(run, hook=gate) as server,
        open_channel(server.ready.address, run) as channel,
    ):
        health = watched_health(channel)
        assert next(health) == "SERVING"
        started_s = time.monotonic()
        status, _ = refusal(lambda: encode(channel, run, request_of(server, file_rows(1))))
        assert status in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        assert next(health) == "NOT_SERVING"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            server.page("healthz")
        assert servers_in(registry_directory(run)) == []
        # The batch never ends, and nobody waits for it.
        assert server.ended.result(TIMEOUT_S) == serving.BROKEN_DEVICE
        assert time.monotonic() - started_s < 5
        gate.open()


@apart
def test_health_follows_loading_and_stopping(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "encoder.server.listen=127.0.0.1:0")
    loading, load = threading.Event(), threading.Event()
    gate = Gate()

    def slow(images: torch.Tensor) -> None:
        if not load.is_set():
            loading.set()
            assert load.wait(TIMEOUT_S)
        gate(images)

    ports: list[int] = []
    from dsr_scale.encode_service import serving

    bind = serving._bind

    def noted(*arguments):
        ports.append(bind(*arguments))
        return ports[0]

    with (
        mock.patch.object(serving, "_bind", noted),
        running(run, hook=slow, wait=False) as server,
    ):
        assert loading.wait(TIMEOUT_S)
        with open_channel(f"127.0.0.1:{ports[0]}", run) as channel:
            assert health_of(channel) == "NOT_SERVING"
            describe = channel.unary_unary(f"/{wire.SERVICE}/{wire.DESCRIBE}")
            status, text = refusal(lambda: describe(b"", timeout=TIMEOUT_S))
            assert status == "UNAVAILABLE" and "is loading" in text
            assert servers_in(registry_directory(run)) == []
            load.set()
            assert server.started.wait(TIMEOUT_S)
            assert health_of(channel) == "SERVING"
            assert server.page("healthz") == "ok\n"
            assert servers_in(registry_directory(run)) == [server.ready.address]
            rows = file_rows(2)
            with ThreadPoolExecutor(1) as pool:
                inside = pool.submit(encode, channel, run, request_of(server, rows))
                assert gate.arrived.acquire(timeout=TIMEOUT_S)
                server.stop.ask()
                until(lambda: health_of(channel) == "NOT_SERVING")
                assert servers_in(registry_directory(run)) == []
                status, text = refusal(lambda: ask(channel, []))
                assert status == "UNAVAILABLE" and "is stopping" in text
                assert not server.ended.done()
                gate.open()
                assert_same(inside.result(TIMEOUT_S), locally(run, rows))
            assert server.ended.result(TIMEOUT_S) == 0


@apart
def test_stored_latents_are_those_that_were_encoded(tmp_path: Path) -> None:
    cache = tmp_path / "latents"
    run = tiny_run(tmp_path, f"encoder.server.cache_directory={cache}")
    rows = file_rows(4)
    rows[1] = rows[1]._replace(image=b"no image")
    mirrored = [
        row._replace(view=row.view._replace(mirrored=not row.view.mirrored)) for row in rows
    ]
    seen: list[int] = []
    hook = lambda images: seen.append(len(images))  # noqa: E731
    with running(run, hook=hook) as server, open_channel(server.ready.address, run) as channel:
        first = encode(channel, run, request_of(server, rows))
        again = encode(channel, run, request_of(server, [*rows, *file_rows(1, first=9)]))
        assert torch.equal(again.latents[:4], first.latents)
        assert again.failures.keys() == first.failures.keys() == {1}
        good = [0, 2, 3]
        local = locally(run, [rows[number] for number in good])
        assert torch.equal(first.latents[good], local.latents)
        assert server.value("cache_hits_total") == 3
        encode(channel, run, request_of(server, mirrored))
        assert server.value("cache_hits_total") == 3
        assert seen == [1, 4, 2, 4]
    with running(run, hook=hook) as server, open_channel(server.ready.address, run) as channel:
        assert torch.equal(encode(channel, run, request_of(server, rows)).latents, first.latents)
        assert server.value("cache_hits_total") == 3


@apart
def test_the_metrics_page_tells_what_it_promises(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        for _ in range(3):
            encode(channel, run, request_of(server, file_rows(2)))
        values = server.metrics()
        wanted = {
            'requests_total{outcome="ok"}': 3,
            "images_total": 6,
            "captions_total": 6,
            "failed_images_total": 0,
            "queue_depth": 0,
            "batch_images_count": 3,
            "credits": 8,
            "images_per_second": 0.6,
            "cache_hits_total": 0,
            "cache_misses_total": 0,
        }
        assert {name: values[f"dsr_encoder_{name}"] for name in wanted} == wanted
        assert values["dsr_encoder_encode_seconds_total"] > 0
        assert values["dsr_encoder_resident_memory_bytes"] > 50 << 20
        median = values['dsr_encoder_request_latency_seconds{quantile="0.5"}']
        assert 0 < median <= values['dsr_encoder_request_latency_seconds{quantile="0.99"}'] < 10


def start_command(config: Path, *overrides: str) -> subprocess.Popen[str]:
    start = "from dsr_scale.cli.main import run; run()"
    return subprocess.Popen(
        [sys.executable, "-c", start, "serve", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@apart
def test_the_command_serves_restarts_what_dies_and_drains(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    registry = registry_directory(run)
    command = start_command(tmp_path / "tiny.yaml")
    try:
        assert command.stdout is not None and command.stderr is not None
        line = command.stdout.readline()
        contract = build_local(run, torch.device("cpu")).contract.fingerprint
        assert re.search(r"^serving 127\.0\.0\.1:\d+ on cpu .* pixels .* bytes ", line), line
        assert line.endswith(f"contract {contract}\n")
        ((_, victim),) = entries_in(registry)
        assert victim.address == line.split()[1]
        assert f"metrics http://{victim.metrics}/metrics" in line
        os.kill(victim.process, signal.SIGKILL)
        assert "ended with -9, started again in 1 s" in command.stderr.readline()
        assert servers_in(registry) == [victim.address]
        successor = command.stdout.readline().split()[1]
        # The entry that kill -9 left is swept up by whoever starts next on the machine.
        assert servers_in(registry) == [successor]
        request = wire.EncodeRequest(contract, TARGET, tuple(file_rows(2)))
        with open_channel(successor, run) as channel:
            assert_same(encode(channel, run, request), locally(run, list(request.rows)))
        command.send_signal(signal.SIGTERM)
        out, err = command.communicate(timeout=TIMEOUT_S)
        assert (command.returncode, out, err) == (0, "", "")
        assert list(registry.iterdir()) == []
    finally:
        command.kill()


@apart
def test_servers_that_cannot_start_say_why(tmp_path: Path) -> None:
    from dsr_scale.encode_service.metrics import ServerMetrics, metrics_page
    from dsr_scale.encode_service.processes import Servers, check_before_start

    for override, found in (
        ("encoder.server.listen=node", "the address 'node'"),
        ("encoder.server.max_request_mib=1 training.microbatch_images=8192", "a micro-batch of"),
        ("encoder.server.advertise=node-1", "advertise = node-1"),
        ("training.device=cuda encoder.server.devices=99", "visible GPUs"),
        (f"encoder.registry={tmp_path / 'tiny.yaml'}", "is a file"),
    ):
        overrides = override.split()
        if "8192" in override:
            overrides.append("training.global_batch_images=8192")
        with pytest.raises(InputError) as caught:
            check_before_start(tiny_run(tmp_path, *overrides))
        assert found in caught.value.found
    three = tiny_run(
        tmp_path,
        "encoder.server.devices=3",
        "encoder.server.listen='[::1]:7070'",
        "encoder.server.metrics_port=9100",
    )
    places = Servers(three, check_before_start(three), ready=print, say=print)._places
    assert [place.listen for place in places] == ["[::1]:7070", "[::1]:7071", "[::1]:7072"]
    assert [place.metrics_port for place in places] == [9100, 9101, 9102]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        page = metrics_page("127.0.0.1", port, ServerMetrics(torch.device("cpu"), 1), bool)
        with pytest.raises(InputError, match=f"{port} for the metrics page: .* in use"), page:
            pass
    told: list[str] = []
    run = tiny_run(tmp_path, "encoder.server.listen=192.0.2.1:0", "encoder.plain=true")
    servers = Servers(run, check_before_start(run), ready=print, say=told.append)
    with pytest.raises(InputError, match=r"192\.0\.2\.1:0 cannot be listened on"):
        servers.watch()
    assert told == []


class Started:
    """What `Servers` sees of processes that live as `lives` tells: each a list of messages, then death."""

    def __init__(self, servers: Any, lives: dict[int, list[list[Any]]]) -> None:
        self._lives = lives
        self._places = servers._places
        servers._start = self.start

    def start(self, place: Any) -> None:
        place.messages, theirs = multiprocessing.Pipe(duplex=False)
        place.process, place.start_at_s = mock.Mock(exitcode=2), None
        for message in self._lives[self._places.index(place)].pop(0):
            if callable(message):
                message()
            else:
                theirs.send(message)
        theirs.close()


@apart
def test_an_input_error_ends_servers_only_before_they_were_ready(tmp_path: Path) -> None:
    from dsr_scale.encode_service.processes import Servers

    run = tiny_run(tmp_path)
    error = InputError(found="no disk", required="a disk", remedy="mount it")
    told: list[str] = []
    heard: list[object] = []
    devices = [torch.device("cpu")] * 2
    with mock.patch("dsr_scale.encode_service.processes.FIRST_BACKOFF_S", 0.01):
        servers = Servers(run, devices, ready=heard.append, say=told.append)
        end = lambda: servers._signals.append(signal.SIGTERM)  # noqa: E731
        Started(servers, {0: [["a"], [error], ["b", end]], 1: [["c"]] + [["d"]] * 9})
        assert servers.watch() == 0
        assert {"a", "b", "c"} <= set(heard)
        assert "server on cpu cannot start: no disk" in told
        servers = Servers(run, devices, ready=heard.append, say=told.append)
        Started(servers, {0: [["a"]], 1: [[error]]})
        with pytest.raises(InputError, match="no disk"):
            servers.watch()


def test_the_allocator_keeps_large_blocks() -> None:
    code = "from dsr_scale.encode_service.memory import keep_large_blocks as k\nassert k()\n"
    code += "import resource as r\ndef faults(): return r.getrusage(r.RUSAGE_SELF).ru_minflt\n"
    code += "bytearray(40 << 20)\nbefore = faults()\n"
    code += "for _ in range(10): bytearray(b'x') * (40 << 20)\nprint(faults() - before)"
    tuned = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert tuned.returncode == 0, tuned.stderr
    # Ten blocks of 10 240 pages each: anew every time without the settings.
    assert int(tuned.stdout) < 30_000
