"""A damaged checkpoint is found whichever byte is damaged, and never the one a run goes on from."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import read, save
from typer.testing import CliRunner, Result

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.checkpoint.directory import complete_steps, step_directory
from dsr_scale.checkpoint.verification import newest_verified, verify, verify_shared
from dsr_scale.cli.main import app

FLIPS_PER_FILE = 60
CONTENT = {"weights.a": torch.arange(2000.0).reshape(40, 50), "ema.a": torch.ones(40, 50)}


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def names(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


def test_intact_is_intact_and_read_once(tmp_path: Path) -> None:
    target = save(tmp_path, 1, CONTENT)
    read_bytes = 0

    def progress(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count

    assert verify(target, progress) == []
    assert read_bytes == sum((target / name).stat().st_size for name in names(target)[:-1])
    assert names(target) == [".metadata", "__0_0.distcp", "run_state.json"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run_state.json"])
def test_one_flipped_byte_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, CONTENT) / name
    chooser = random.Random(0)
    last = path.stat().st_size - 1
    for offset in [0, last, *(chooser.randint(0, last) for _ in range(FLIPS_PER_FILE))]:
        # Also a bit of which text would make a capital, and any change of the byte.
        for mask in (1 << chooser.randrange(8), 0x20, chooser.randrange(1, 256)):
            flip(path, offset, mask)
            problems = verify(path.parent)
            assert len(problems) == 1 and name in problems[0], (offset, mask, problems)
            flip(path, offset, mask)
    assert verify(path.parent) == []


def test_a_blank_that_became_another_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "run_state.json"
    path.write_bytes(path.read_bytes().replace(b'": ', b'":\t', 1))
    assert "run_state.json is damaged" in verify(path.parent)[0]


def test_missing_short_long_and_unlisted_files(tmp_path: Path) -> None:
    target = save(tmp_path, 1)
    shard = target / "__0_0.distcp"
    content = shard.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"x"):
        shard.write_bytes(changed)
        assert verify(target) == [f"__0_0.distcp has {len(changed)} bytes, not {len(content)}"]
    shard.unlink()
    assert verify(target) == ["__0_0.distcp is missing"]
    shard.write_bytes(content)
    (target / "__1_0.distcp").write_bytes(content)
    assert verify(target) == ["__1_0.distcp is not listed in the run state"]
    (target / "__1_0.distcp").unlink()
    (target / ".metadata").unlink()
    assert verify(target) == [".metadata is missing"]
    (target / "run_state.json").unlink()
    assert "run_state.json is damaged: it is missing" in verify(target)[0]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    target = save(tmp_path, 1)
    state = directory.read_run_state(target)
    (target / "__0_0.distcp").unlink()
    (target / ".metadata").unlink()
    shares = [verify_shared(target, state, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0]


def test_the_newest_undamaged_wins_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {"weights.a": torch.full((3,), float(step))})
    flip(step_directory(tmp_path, 4) / "__0_0.distcp", 900)
    flip(step_directory(tmp_path, 3) / "run_state.json", 9)
    step_directory(tmp_path, 5).with_suffix(".partial").mkdir()
    said: list[str] = []
    found = newest_verified(tmp_path, None, said.append)
    assert found is not None
    assert (found[0], found[1]["step"]) == (step_directory(tmp_path, 2), 2)
    assert torch.equal(read(found[0])["weights.a"], torch.full((3,), 2.0))
    assert len(said) == 3
    assert "step_00000005.partial" in said[0]
    assert "step_00000004" in said[1] and "__0_0.distcp has a wrong checksum" in said[1]
    assert "step_00000003" in said[2] and "run_state.json is damaged" in said[2]
    # Set aside: they neither count among those to keep nor are they lost.
    assert complete_steps(tmp_path) == [1, 2]
    assert directory.remove_old(tmp_path, keep_last=1, keep_every_steps=None) == [1]
    entries = directory.checkpoints_directory(tmp_path).iterdir()
    assert sorted(path.name for path in entries) == [
        "step_00000002",
        "step_00000003.damaged",
        "step_00000004.damaged",
    ]


def test_nothing_saved_is_a_start_but_nothing_intact_is_an_error(tmp_path: Path) -> None:
    assert newest_verified(tmp_path, None, pytest.fail) is None
    for step in (1, 2):
        flip(save(tmp_path, step) / ".metadata", 3)
    said: list[str] = []
    with pytest.raises(InputError, match=r"2 checkpoints .* all of them damaged"):
        newest_verified(tmp_path, None, said.append)
    assert len(said) == 2
    assert complete_steps(tmp_path) == [1, 2]


def test_another_format_is_refused_not_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1)
    target = step_directory(tmp_path, 2)
    shutil.copytree(step_directory(tmp_path, 1), target)
    (target / "run_state.json").write_text('{"format": 1, "step": 2}')
    with pytest.raises(InputError, match="format 1"):
        newest_verified(tmp_path, None, pytest.fail)


def test_command_lists(tmp_path: Path) -> None:
    save(tmp_path, 20, CONTENT)
    save(tmp_path, 100)
    directory.set_aside(save(tmp_path, 30))
    step_directory(tmp_path, 101).with_suffix(".partial").mkdir()
    flip(step_directory(tmp_path, 100) / "run_state.json", 9)
    layout = {"tp": 2, "pp": 4, "dp": 8, "zero": 1}
    directory.write_run_state(step_directory(tmp_path, 20), {"step": 20, "layout": layout}, {})
    done = CliRunner().invoke(app, ["checkpoint", "ls", str(tmp_path)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if "│" in line]
    cells = {row[0].strip(): (row[2].strip(), row[4].strip()) for row in rows}
    assert cells == {
        "20": ("complete", "2×4×8 · 1"),
        "30": ("damaged, set aside", ""),
        "100": ("damaged", ""),
        "101": ("unfinished", ""),
    }


def test_command_verifies(tmp_path: Path) -> None:
    def command(path: Path) -> Result:
        return CliRunner().invoke(app, ["checkpoint", "verify", str(path)])

    for step in (1, 2):
        save(tmp_path, step)
    done = command(tmp_path)
    assert (done.exit_code, done.stdout) == (0, "2 of 2 checkpoints intact\n"), done.output
    damaged = step_directory(tmp_path, 2)
    flip(damaged / "__0_0.distcp", 900)
    step_directory(tmp_path, 3).with_suffix(".partial").mkdir()
    done = command(tmp_path)
    assert (done.exit_code, done.stdout) == (1, "1 of 2 checkpoints intact\n")
    assert f"{damaged}: __0_0.distcp has a wrong checksum" in done.output
    assert "step_00000003.partial: an unfinished save" in done.output
    assert command(step_directory(tmp_path, 1)).exit_code == 0
    (damaged / "run_state.json").unlink()
    assert command(damaged).exit_code == 1
    nothing = command(tmp_path / "nowhere").exception
    assert isinstance(nothing, InputError) and "no checkpoint in" in nothing.found
