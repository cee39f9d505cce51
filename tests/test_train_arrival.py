"""Waiting for data: a signal interrupts it, a failure is kept, and stuck workers hold nothing up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest

from dsr_scale.config.data import DataConfig
from dsr_scale.data.encoded import Encoded, EncodersLost, Row
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.train.arrival import Arrivals
from dsr_scale.train.feed import Feed, StepData
from dsr_scale.train.signals import StopRequest


class Stuck:
    """Waits for an answer that does not come."""

    wants_pixels = False

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        time.sleep(600)
        raise AssertionError


def waiting() -> Iterator[StepData]:
    time.sleep(60)
    yield StepData((), [], None)


def signal_soon() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_a_signal_ends_a_long_wait_and_is_remembered() -> None:
    with StopRequest() as request:
        arrivals = Arrivals(waiting, may_wait_long=True)
        started_s = time.monotonic()
        signal_soon()
        assert arrivals.next(request) is None
        assert time.monotonic() - started_s < 10
        assert request.signal_name == "SIGTERM"
        # Later ones come in the middle of a save, which they must not interrupt.
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrivals.next(request) is None


def test_a_failure_is_kept_and_ends_the_data() -> None:
    lost = EncodersLost(found="f", required="r", remedy="m")
    steps = iter([StepData((), [], None), StepData((), [], lost)])
    arrivals = Arrivals(lambda: steps, may_wait_long=False)
    with StopRequest() as request:
        assert arrivals.next(request) is not None and arrivals.failure is None
        assert arrivals.next(request) is None and arrivals.failure is lost


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_that_wait_for_an_answer_end_at_once(
    start_method: Literal["fork", "spawn"],
) -> None:
    feed = stuck_feed(workers=3, start_method=start_method)
    with StopRequest() as request:
        arrivals = Arrivals(lambda: feed.steps(0), may_wait_long=True)
        signal_soon()
        assert arrivals.next(request) is None
        started_s = time.monotonic()
        feed.close()
        assert time.monotonic() - started_s < 4


def test_a_signal_while_workers_are_forked_is_not_lost() -> None:
    """What a handler raises inside a callback of `os.fork` goes no further."""
    sent = []

    def send_one() -> None:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    feed = stuck_feed(workers=1, start_method="fork")
    os.register_at_fork(before=send_one)
    with StopRequest() as request:
        arrivals = Arrivals(lambda: feed.steps(0), may_wait_long=True)
        assert arrivals.next(request) is None
        assert sent and request.signal_name == "SIGTERM"
        feed.close()


def stuck_feed(*, workers: int, start_method: Literal["fork", "spawn"]) -> Feed:
    config = DataConfig(shards="package:emoji", resolution=16, max_samples=32, workers=workers)
    stream = BatchStream(
        open_samples(config),
        config,
        seed=0,
        global_batch_images=8,
        microbatch_images=4,
        rank=0,
        world_size=1,
        encoder=Stuck(),
        start_method=start_method,
    )
    return Feed(None, None, 1, stream, None)  # type: ignore[arg-type]
