"""The rolling cache: what comes back is what went in or nothing, within its budget, for all processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
from pathlib import Path
from typing import Any

import diskcache
import pytest

from dsr_scale.encode_service import rolling
from dsr_scale.encode_service.rolling import RollingCache

VALUE = 10_000
ROOM = 200_000
"""For the table itself."""


def _key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _value(number: int, size: int = VALUE) -> bytes:
    return bytes([number % 256]) * size


def _files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.val"))


def test_a_hit_has_the_bytes_that_were_put(tmp_path: Path) -> None:
    cache = RollingCache(tmp_path / "cache", 1 << 30)
    values = [os.urandom(size) for size in (0, 1, 100_000)]
    assert cache.get([_key(0)]) == [None]
    cache.put([_key(n) for n in range(3)], values)
    assert cache.get([_key(2), _key(7), _key(0), _key(1)]) == [
        values[2],
        None,
        values[0],
        values[1],
    ]
    cache.put([_key(1)], [b"another"])
    cache.close()
    assert RollingCache(tmp_path / "cache", 1 << 30).get([_key(1)]) == [b"another"]


def test_the_budget_is_held_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    limit = 60 * VALUE + ROOM
    cache = RollingCache(tmp_path, limit)
    for number in range(50):
        cache.put([_key(number)], [_value(number)])
    assert None not in cache.get([_key(number) for number in range(10)])
    for number in range(50, 90):
        cache.put([_key(number)], [_value(number)])
        assert cache._cache.volume() <= limit
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.val")) <= limit
    found = [number for number in range(90) if cache.get([_key(number)]) != [None]]
    oldest = 90 - (len(found) - 10)
    # What was used stayed; of what was not, the last ones.
    assert found == [*range(10), *range(oldest, 90)] and 10 < oldest < 50
    big = _value(1, 30 * VALUE)
    cache.put([_key(100)], [big])
    assert cache._cache.volume() <= limit and cache.get([_key(100)]) == [big]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path, damage: str) -> None:
    cache = RollingCache(tmp_path, 1 << 30)
    cache.put([_key(1)], [_value(1)])
    (file,) = _files(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(content), "cut": content[:-1], "empty": b""}[damage])
    assert cache.get([_key(1)]) == [None]
    cache.put([_key(1)], [_value(1)])
    assert cache.get([_key(1)]) == [_value(1)]
    assert len(_files(tmp_path)) == 1


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


def test_pickles_of_others_are_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    foreign = diskcache.Cache(str(tmp_path / "cache"))
    foreign.set(_key(1), _Bomb())
    foreign.set(_key(2), [_Bomb()] * 5000)
    foreign.set(_Bomb(), b"value")
    foreign.close()
    table = sqlite3.connect(tmp_path / "cache" / "cache.db")
    table.execute("UPDATE Cache SET raw = 1")
    table.commit()
    table.close()
    cache = RollingCache(tmp_path / "cache", 1 << 30)
    assert cache.get([_key(1), _key(2)]) == [None, None]
    assert not (tmp_path / "exploded").exists()
    # The bomb is live: diskcache on its own sets it off.
    diskcache.Cache(str(tmp_path / "cache")).get(_key(1))
    assert (tmp_path / "exploded").exists()


def test_a_full_disk_stops_writing_once_and_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = RollingCache(tmp_path, 1 << 30)
    cache.put([_key(1)], [_value(1)])

    def full(self: Any, path: str, *_: Any) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rolling._BytesOnly, "_write", full)
    for number in range(2, 5):
        cache.put([_key(number)], [_value(number)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and str(tmp_path) in said
    assert cache.get([_key(1), _key(2)]) == [_value(1), None]
    assert len(_files(tmp_path)) == 1


def test_a_broken_table_ends_its_use_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache.db").write_bytes(b"not a table" * 1000)
    cache = RollingCache(tmp_path, 1 << 30)
    cache.put([_key(1)], [_value(1)])
    assert cache.get([_key(1)]) == [None]
    assert capsys.readouterr().err.count("not used by this process") == 1
    cache.close()


def _use(directory: Path, offset: int, failures: Any) -> None:
    cache = RollingCache(directory, 40 * VALUE + ROOM)
    for turn in range(60):
        number = (turn + offset) % 50
        (found,) = cache.get([_key(number)])
        if found is None:
            cache.put([_key(number)], [_value(number)])
        elif found != _value(number):
            failures.put((number, found[:4]))
    failures.put(cache._cache.volume())


def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [
        context.Process(target=_use, args=(tmp_path, offset, failures)) for offset in (0, 25)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    limit = 40 * VALUE + ROOM
    volumes = [failures.get(), failures.get()]
    assert failures.empty() and all(0 < volume <= limit + VALUE for volume in volumes)
    cache = RollingCache(tmp_path, limit)
    found = cache.get([_key(number) for number in range(50)])
    kept = [value for value in found if value is not None]
    assert len(kept) > 20 and len(kept) == len(_files(tmp_path))
    assert all(value in (None, _value(number)) for number, value in enumerate(found))
