"""A web server on the loopback for the tests of remote data, and what they ask of a cache."""

from __future__ import annotations

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsr_scale.data.samples import Sample, Samples


class Server:
    """Serves one directory and counts what was asked for."""

    def __init__(self, directory: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.damaged_replies = 0
        """So many of the next shards are sent with a wrong last byte."""
        requests, server = self.requests, self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, *_: object) -> None:
                requests[self.path] += 1

            def copyfile(self, source: Any, outputfile: Any) -> None:
                content = bytearray(source.read())
                if server.damaged_replies and self.path.endswith(".mds"):
                    server.damaged_replies -= 1
                    content[-1] ^= 1
                outputfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(directory))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # A short poll: shutting down waits for it.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.server.shutdown()
    server.server.server_close()


def read_all(samples: Samples) -> list[Sample]:
    return [samples.read(number) for number in range(len(samples))]


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
