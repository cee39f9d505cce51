"""Filling a latent cache: each sample once, whatever dies, whoever helps; and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cached_runs import BROKEN, COUNT, contents, fill_cache, make_run, write_pack
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.cli.main import app
from dsr_scale.config.load import dump_run
from dsr_scale.data.shares import Share
from dsr_scale.encode_service import fill as filling
from dsr_scale.encode_service import fill_unit
from dsr_scale.encode_service.cache import open_cache
from dsr_scale.encode_service.fill import FillProgress

UNITS = 5
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("cache")
    fill_cache(make_run(packed), out)
    return contents(out)


def test_what_is_stored_has_the_planned_size(undisturbed: dict[str, bytes]) -> None:
    manifest = json.loads(undisturbed["cache.json"])
    usable = COUNT - len(BROKEN)
    counts = manifest["counts"]
    assert counts["samples"] == COUNT and counts["unusable"] == len(BROKEN)
    assert counts["captions"] == 2 * usable
    shards = [name for name in undisturbed if name.endswith(".mds")]
    assert len(shards) == UNITS and not any(name.startswith(".") for name in undisturbed)
    stored = sum(len(undisturbed[name]) for name in shards)
    payload = usable * 2 * (48 * 4 * 4) * 4 + 2 * counts["tokens"]
    assert payload < stored <= counts["bytes"] < payload + 700 * COUNT


def _fill_and_die(packed: Path, out: Path, after_images: int) -> None:
    def die(progress: FillProgress) -> None:
        if progress.images_done >= after_images:
            os.kill(os.getpid(), signal.SIGKILL)

    fill_cache(make_run(packed), out, progress=die)


def test_killed_in_the_middle_it_encodes_nothing_twice(
    packed: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    worker = FORK.Process(target=_fill_and_die, args=(packed, tmp_path, 25))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    finished = sorted(path.name for path in tmp_path.glob("unit-*"))
    assert 0 < len(finished) < UNITS and list(tmp_path.glob(".filling-*"))
    before = {name: (tmp_path / name).stat().st_ino for name in finished}
    with pytest.raises(InputError, match=f"{UNITS - len(finished)} of {UNITS} units are missing"):
        open_cache(make_run(packed, encoder={"mode": "cache", "cache": str(tmp_path)}))
    report = fill_cache(make_run(packed), tmp_path)
    assert report.images == COUNT - sum(2 if name == "unit-00004" else 7 for name in finished)
    assert {name: (tmp_path / name).stat().st_ino for name in finished} == before
    assert contents(tmp_path) == undisturbed
    assert fill_cache(make_run(packed), tmp_path).images == 0
    assert contents(tmp_path) == undisturbed


def _fill_share(packed: Path, out: Path, share: Share, answers: Any) -> None:
    torch.set_num_threads(1)
    report = fill_cache(make_run(packed), out, share=share)
    answers.put((share.index, report.images))


def test_shares_side_by_side_give_what_one_gives(
    packed: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    answers = FORK.SimpleQueue()
    workers = [
        FORK.Process(target=_fill_share, args=(packed, tmp_path, Share(index, 2), answers))
        for index in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted([answers.get(), answers.get()]) == [(0, 16), (1, 14)]
    assert contents(tmp_path) == undisturbed


def test_a_unit_that_another_process_is_at_is_left_to_it(
    packed: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fill_cache(make_run(packed), tmp_path, share=Share(0, UNITS))
    other = fill_unit.UnitWriter.open(tmp_path, 2)
    assert other is not None
    report = fill_cache(make_run(packed), tmp_path)
    assert (report.images, report.missing_units) == (COUNT - 7 - 7, 1)
    assert not (tmp_path / "index.json").exists()
    other.abandon()
    assert fill_cache(make_run(packed), tmp_path).images == 7
    assert contents(tmp_path) == undisturbed


def test_a_failing_encoder_leaves_finished_units_and_nothing_else(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    calls = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return fill_unit.encode(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(filling, "encode", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            fill_cache(make_run(packed), tmp_path)
    assert not list(tmp_path.glob(".filling-*"))
    assert fill_cache(make_run(packed), tmp_path).images >= 9
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"resolution": 32}}, "resolution is 16, wanted 32"),
        ({"data": {"max_samples": 9}}, r"the data is .* \(30 samples\), wanted .* \(9 samples\)"),
        ({"encoders": {"latent_dtype": "bf16"}}, "latent_dtype is fp32, wanted bf16"),
        ({"data": {"crop": "random"}}, "crop = random.*the same in every epoch"),
        ({"data": {"buckets": [[16, 16]]}}, "1 data.buckets.*left over from their bucket"),
    ],
)
def test_it_is_not_filled_from_something_else(
    packed: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    fill_cache(make_run(packed), tmp_path, share=Share(0, UNITS))
    before = contents(tmp_path)
    changes = {name: dict(values) for name, values in changes.items()}
    run = make_run(packed, **{k: _whole_section(packed, k) | v for k, v in changes.items()})
    with pytest.raises(InputError, match=f"(?s){says}"):
        fill_cache(run, tmp_path)
    assert contents(tmp_path) == before


def _whole_section(packed: Path, name: str) -> dict[str, Any]:
    return json.loads(make_run(packed).model_dump_json())[name]


def test_foreign_files_and_full_disks_are_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match=r"other files: thesis\.tex"):
        fill_cache(make_run(packed), tmp_path / "mine")

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100_000))
    with pytest.raises(InputError, match=r"30 images of 6 KiB \(2 × 3 KiB of latents") as refused:
        fill_cache(make_run(packed), tmp_path / "full")
    assert "data.horizontal_flip=0" in refused.value.remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(250_000))
    assert fill_cache(make_run(packed), tmp_path / "full").missing_units == 0


def test_the_command(packed: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_run(make_run("elsewhere")))
    out = tmp_path / "cache"
    command = ["encode", str(packed), str(out), "--config", str(config), "--device", "cpu"]
    for index in range(2):
        done = CliRunner().invoke(app, [*command, "--share", f"{index}/2", "--workers", "1"])
        assert done.exit_code == 0, done.output
        if index == 0:
            assert "2 units of other shares" in done.output
    assert f"unusable             │ {len(BROKEN)}" in done.output
    assert contents(out) == undisturbed
    other = CliRunner().invoke(app, [*command, "encoders.image.patch=8"])
    assert isinstance(other.exception, InputError)
    assert "image.patch is 4, wanted 8" in str(other.exception)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--share", "2/2", "0 ≤ i < n"),
        ("--share", "one", "0 ≤ i < n"),
        ("--device", "cuda:99", "CUDA devices"),
        ("--device", "tpu", "CUDA devices"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, option: str, value: str, says: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_run(make_run("elsewhere")))
    command = ["encode", "package:emoji", str(tmp_path / "out"), "--config", str(config)]
    done = CliRunner().invoke(app, [*command, option, value])
    assert isinstance(done.exception, InputError)
    assert value in done.exception.found and says in str(done.exception)
