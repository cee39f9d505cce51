"""Locks of a run directory, between processes that live, die and are elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.job import run_lock
from dsr_scale.job.run_lock import LOCK_FILE, _held, _Timing

# Times of files are whole seconds here, so a lock moves once a second at most.
FAST = _Timing(lifetime_s=4.0, refresh_s=1.0, look_s=0.1)


def never(error: InputError) -> None:
    raise AssertionError(error)


def hold(directory: Path, pipe: Connection) -> None:
    """Sends what was told once the lock is held, or the refusal; lets go when told to."""
    told: list[str] = []
    try:
        with _held(directory, FAST, never, told.append):
            pipe.send(("held", told))
            pipe.recv()
    except InputError as error:
        pipe.send(("refused", str(error)))


class Holder:
    """Another process that takes the lock."""

    def __init__(self, directory: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=hold, args=(directory, theirs), daemon=True)
        self.process.start()

    def answer(self) -> tuple[str, Any]:
        assert self.pipe.poll(30)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join(10)
        assert self.process.exitcode == 0

    def kill(self, *, bury: bool = True) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        if bury:
            self.process.join(10)


def of_another_host(directory: Path, expires_in_s: float) -> Path:
    """Leaves the lock of a process of another machine; returns the claim file."""
    claim = directory / f"{LOCK_FILE}|elsewhere|12|34"
    claim.write_text(f"/mounted/otherwise/{claim.name}")
    os.link(claim, directory / LOCK_FILE)
    expire(claim, expires_in_s)
    return claim


def expire(claim: Path, in_s: float) -> None:
    time_s = time.time() + in_s
    os.utime(claim, (time_s, time_s))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_second_run_is_refused_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    assert first.answer() == ("held", [])
    with (
        pytest.raises(
            InputError, match=f"by process {first.process.pid} on {socket.gethostname()}"
        ),
        _held(tmp_path, FAST, never, never_told),
    ):
        pass
    first.end()
    assert names(tmp_path) == []
    again = Holder(tmp_path)
    assert again.answer() == ("held", [])
    again.end()


def never_told(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize("bury", [True, False])
def test_holder_that_was_killed_here_is_followed_at_once(tmp_path: Path, bury: bool) -> None:
    first = Holder(tmp_path)
    first.answer()
    first.kill(bury=bury)
    began = time.monotonic()
    second = Holder(tmp_path)
    outcome, told = second.answer()
    assert outcome == "held"
    assert time.monotonic() - began < FAST.refresh_s
    assert told == [
        f"took over {tmp_path / LOCK_FILE}: its holder, process {first.process.pid} on "
        f"{socket.gethostname()}, is gone"
    ]
    second.end()
    assert names(tmp_path) == []


def test_only_one_of_several_takers_wins(tmp_path: Path) -> None:
    for _ in range(5):
        first = Holder(tmp_path)
        first.answer()
        first.kill()
        takers = [Holder(tmp_path) for _ in range(4)]
        answers = [taker.answer()[0] for taker in takers]
        assert sorted(answers) == ["held", "refused", "refused", "refused"]
        takers[answers.index("held")].end()
        assert names(tmp_path) == []


def test_lock_of_another_machine_that_expired_long_ago(tmp_path: Path) -> None:
    of_another_host(tmp_path, -1000)
    began = time.monotonic()
    second = Holder(tmp_path)
    assert second.answer() == (
        "held",
        [f"took over {tmp_path / LOCK_FILE}: the lock of process 12 on elsewhere ran out"],
    )
    # It is watched all the same: clocks of machines differ.
    assert 2 * FAST.refresh_s < time.monotonic() - began < FAST.lifetime_s
    second.end()
    assert names(tmp_path) == []


def test_lock_of_another_machine_that_stays_silent_is_waited_for(tmp_path: Path) -> None:
    of_another_host(tmp_path, 1000)
    began = time.monotonic()
    second = Holder(tmp_path)
    assert second.answer()[0] == "held"
    assert time.monotonic() - began > FAST.lifetime_s + FAST.refresh_s
    second.end()


def test_lock_of_another_machine_that_moves_is_respected_whatever_its_clock(tmp_path: Path) -> None:
    claim = of_another_host(tmp_path, -1000)
    second = Holder(tmp_path)
    time.sleep(0.5)
    expire(claim, -999)
    outcome, message = second.answer()
    assert outcome == "refused"
    assert "by process 12 on elsewhere" in message
    assert names(tmp_path) == [LOCK_FILE, claim.name]


def test_holder_refreshes_for_longer_than_a_lifetime(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.answer()
    time.sleep(FAST.lifetime_s + FAST.refresh_s)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > time.time()
    first.end()


def test_lost_lock_ends_the_run_and_spares_the_new_owner(tmp_path: Path) -> None:
    lost: list[InputError] = []
    with _held(tmp_path, FAST, lost.append, never_told):
        for path in tmp_path.iterdir():
            path.unlink()
        claim = of_another_host(tmp_path, 1000)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "belongs to process 12 on elsewhere now" in str(lost[0])
    assert names(tmp_path) == [LOCK_FILE, claim.name]


def test_taker_that_died_in_between_does_not_lock_the_directory_for_ever(tmp_path: Path) -> None:
    of_another_host(tmp_path, -1000).rename(tmp_path / f"{LOCK_FILE}|here|1|2|broken")
    second = Holder(tmp_path)
    assert second.answer()[0] == "held"
    second.end()


def test_empty_lock_file_is_silent_as_well(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    expire(tmp_path / LOCK_FILE, -1000)
    second = Holder(tmp_path)
    assert second.answer()[0] == "held"
    second.end()
    assert names(tmp_path) == []


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="is in the way of"),
        run_lock.held(tmp_path / "file" / "run", on_lost=never, tell=never_told),
    ):
        pass
