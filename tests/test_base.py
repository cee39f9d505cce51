"""Keys, atomic files and errors."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from dsr_scale.base import atomic_files, random_keys
from dsr_scale.base.errors import InputError


def test_keys_are_fixed_across_versions() -> None:
    # A change here would make every resumed run draw other noise.
    assert random_keys.key(0, "noise", 3, 17) == 5109838351862533259
    assert random_keys.key(0, "noise", 31, 7) != random_keys.key(0, "noise", 3, 17)
    draws = {random_keys.key(0, "noise", 0, i) for i in range(10_000)}
    assert len(draws) == 10_000


def test_generators_of_neighbouring_samples_are_independent() -> None:
    a = random_keys.generator(0, "crop", 0, 1).random(1000)
    b = random_keys.generator(0, "crop", 0, 2).random(1000)
    assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 0.1


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    atomic_files.write_json(path, {"step": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"no space left while writing .*state\.json"):
        atomic_files.write_json(path, {"step": 2})
    assert path.read_text() == '{\n  "step": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out is a file"):
        atomic_files.require_writable_directory(tmp_path / "out")


def test_a_file_among_the_parents_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is in the way of"):
        atomic_files.write_json(tmp_path / "file" / "deeper" / "state.json", {})


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_files.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_refused_writes_name_the_path() -> None:
    with (
        pytest.raises(InputError, match="no permission to write /x"),
        atomic_files.storage_errors(Path("/x")),
    ):
        raise PermissionError(errno.EACCES, "denied")


def test_input_errors_cross_processes() -> None:
    error = InputError(found="a", required="b", remedy="c")
    again = pickle.loads(pickle.dumps(error))
    assert (again.found, again.required, again.remedy) == ("a", "b", "c")
    assert str(again) == "found: a\nrequired: b\nwhat to do: c"
