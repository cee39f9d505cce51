"""Comparison of nodes, and the exchange of times through a store."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from dsr_scale.train import stragglers
from dsr_scale.train.stragglers import (
    LINES_IN_A_ROW,
    Comparison,
    RankTimes,
    SlowNodes,
    Stragglers,
    compare,
)


def nodes(**seconds: list[float]) -> list[RankTimes]:
    """Two ranks a node, numbered through."""
    flat = [(node, value) for node, values in seconds.items() for value in values]
    return [RankTimes(10, rank, node, value, 0.0) for rank, (node, value) in enumerate(flat)]


def test_slowest_node_by_the_median_of_its_ranks() -> None:
    found = compare(nodes(a=[1.0, 1.0, 3.0], b=[1.5, 1.5, 1.5], c=[1.0, 1.0, 1.0]))
    assert (found.slowest_rank, found.slowest_node) == (2, "b")
    assert found.slowest_over_median == pytest.approx(1.5)
    assert found.metrics() == {
        "slowest_rank": 2,
        "slowest_node": "b",
        "slowest_over_median": pytest.approx(1.5),
    }


def test_one_of_two_nodes_may_be_slow() -> None:
    assert compare(nodes(a=[2.0], b=[1.0])).slowest_over_median == pytest.approx(2.0)


def test_single_node_is_its_own_median() -> None:
    assert compare(nodes(a=[2.0, 1.0])).slowest_over_median == 1.0


def lines(slow_s: list[float]) -> list[list[str]]:
    """What is said at each line of two good nodes and one that takes so long."""
    watch = SlowNodes()
    return [watch.notice(compare(nodes(a=[1.6], b=[1.6], c=[value]))) for value in slow_s]


def test_node_is_named_once_at_its_third_slow_line() -> None:
    said = lines([2.1] * (LINES_IN_A_ROW + 2))
    assert said == [
        [],
        [],
        [
            "node c takes 1.31 times the median of all nodes (forward and backward 2.1 s, "
            "others 1.6 s)"
        ],
        [],
        [],
    ]


def test_good_line_in_between_begins_the_count_anew() -> None:
    said = lines([2.1, 2.1, 1.6, 2.1, 2.1, 2.1])
    assert [len(each) for each in said] == [0, 0, 0, 0, 0, 1]
    assert not any(lines([1.8] * 5)), "12 % more is no straggler"


def within(seconds: float, question: Callable[[], object]) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError("did not come")


def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, 1, True, datetime.timedelta(seconds=20))


def test_first_rank_learns_the_line_before_from_those_that_sent_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = store()
    ranks = [Stragglers(server, rank=rank, world_size=3) for rank in range(3)]
    compared: list[Comparison] = []
    monkeypatch.setattr(
        stragglers, "compare", lambda times: compared.append(compare(times)) or compared[-1]
    )
    # The last rank never sends: nobody waits for it.
    for step, seconds in ((10, 2.0), (20, 5.0)):
        ranks[1].put(step, forward_backward_s=seconds, data_wait_s=0.0)
        within(10, lambda step=step: server.check([f"dsr_scale/step_times/{step // 10 - 1}/1"]))
        ranks[0].put(step, forward_backward_s=1.0, data_wait_s=0.0)
    metrics, sentences = within(10, lambda: _new(ranks[0]))  # type: ignore[misc]
    assert metrics["slowest_rank"] == 1
    assert sentences == []
    assert [(each.step, each.node_s) for each in compared] == [
        (10, {stragglers.own_node(): pytest.approx(1.5)})
    ]
    assert ranks[0].take() == ({}, []), "handed out once"


def _new(first: Stragglers) -> tuple[dict[str, int | float | str], list[str]] | None:
    taken = first.take()
    return taken if taken[0] else None


def test_times_of_another_line_are_left_out() -> None:
    server = store()
    ranks = [Stragglers(server, rank=rank, world_size=2) for rank in range(2)]
    # This rank has gone on for two lines, and overwrote the one that is read.
    ranks[1].put(30, forward_backward_s=9.0, data_wait_s=0.0)
    within(10, lambda: server.check(["dsr_scale/step_times/0/1"]))
    for step in (10, 20):
        ranks[0].put(step, forward_backward_s=1.0, data_wait_s=0.0)
        within(10, lambda step=step: server.check([f"dsr_scale/step_times/{step // 10 - 1}/0"]))
    metrics, _ = within(10, lambda: _new(ranks[0]))  # type: ignore[misc]
    assert metrics["slowest_rank"] == 0


def test_single_process_compares_nothing() -> None:
    alone = Stragglers(None, rank=0, world_size=1)
    alone.put(10, forward_backward_s=1.0, data_wait_s=0.0)
    assert alone.take() == ({}, [])
