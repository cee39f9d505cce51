"""What a server tells about itself: Prometheus text at /metrics, and /healthz for probes without gRPC.

Every server has a registry and a port of its own, since servers are processes. Rates and quantiles over
the last seconds are computed when somebody looks, from short windows that are kept in memory.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dsr_scale.base.errors import InputError
from dsr_scale.encode_service.addresses import join_address

RATE_WINDOW_S = 10.0
LATENCY_WINDOW_S = 60.0
_MOST_SAMPLES = 10_000
OUTCOMES = (
    "ok",
    "malformed",
    "invalid",
    "contract",
    "stranger",
    "busy",
    "late",
    "gone",
    "not_serving",
    "internal",
)
"""How an Encode call may end: answered; refused for its form, its size or what the encoders take, for
another contract, for its token, for want of a credit; too slow; left by its client; before or after the
server's time; by a failure of ours."""

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Window:
    """Values of the last `seconds`, at most `_MOST_SAMPLES` of them."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, float]] = deque(maxlen=_MOST_SAMPLES)
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        with self._lock:
            self._values.append((time.monotonic(), value))

    def values(self) -> list[float]:
        with self._lock:
            oldest = time.monotonic() - self._seconds
            while self._values and self._values[0][0] < oldest:
                self._values.popleft()
            return [value for _, value in self._values]


class ServerMetrics:
    """Counters and gauges of one server; every method may be called from any thread."""

    def __init__(self, device: torch.device, credits: int) -> None:
        disable_created_metrics()  # a line of its own for when each counter began
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dsr_encoder_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dsr_encoder_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Encode calls by how they ended", "outcome")
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.images = counter("images", "Images answered, from the cache or encoded")
        self.failed_images = counter("failed_images", "Images that could not be decoded")
        self.captions = counter("captions", "Captions answered")
        self.cache_hits = counter("cache_hits", "Images answered from the disk cache")
        self.cache_misses = counter("cache_misses", "Images that the disk cache did not have")
        self.encode_seconds = counter("encode_seconds", "Time of the device in the encoders")
        self.batch_images = Histogram(
            "dsr_encoder_batch_images",
            "Rows of all requests that were encoded together",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.queue_depth = gauge("queue_depth", "Requests that wait for the device")
        self.credits_in_use = gauge("credits_in_use", "Requests inside the server")
        gauge("credits", "Requests that may be inside the server").set(credits)
        self._recent_images, self._latencies = _Window(RATE_WINDOW_S), _Window(LATENCY_WINDOW_S)
        gauge("images_per_second", f"Over the last {RATE_WINDOW_S:g} s").set_function(
            lambda: sum(self._recent_images.values()) / RATE_WINDOW_S
        )
        latency = gauge(
            "request_latency_seconds",
            f"From the credit to the end of the answer, over the last {LATENCY_WINDOW_S:g} s",
            "quantile",
        )
        for share in (0.5, 0.99):
            latency.labels(str(share)).set_function(lambda share=share: self._latency(share))
        gauge("resident_memory_bytes", "Of this process").set_function(resident_bytes)
        if device.type == "cuda":
            gauge("cuda_memory_bytes", "Held by PyTorch on the device").set_function(
                lambda: float(torch.cuda.memory_reserved(device))
            )

    def answered(self, *, images: int, captions: int, failed: int, latency_s: float) -> None:
        """One request came to its end."""
        self.images.inc(images)
        self.captions.inc(captions)
        self.failed_images.inc(failed)
        self._recent_images.add(images)
        self._latencies.add(latency_s)

    def _latency(self, share: float) -> float:
        values = sorted(self._latencies.values())
        return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def resident_bytes() -> float:
    """Memory of this process that is in RAM, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def metrics_page(
    host: str, port: int, metrics: ServerMetrics, healthy: Callable[[], bool]
) -> Iterator[int]:
    """While entered, serves /metrics and /healthz on `port` of `host`, 0 for a free one; gives the port.

    Raises InputError when the port is taken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry))
            elif self.path == "/healthz":
                well = healthy()
                self._answer(
                    200 if well else 503, "text/plain", b"ok\n" if well else b"not ready\n"
                )
            else:
                self._answer(404, "text/plain", b"/metrics or /healthz\n")

        def _answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are no news."""

    class Page(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        page = Page((host, port), Handler)
    except OSError as error:
        raise InputError(
            found=f"{join_address(host, port)} for the metrics page: {error.strerror}",
            required="a free port",
            remedy="stop what uses it, or set encoder.server.metrics_port; 0 takes a free one",
        ) from error
    # A short poll: shutting down waits for it.
    thread = threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield page.server_port
    finally:
        page.shutdown()
        page.server_close()
