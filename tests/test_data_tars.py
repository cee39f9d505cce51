"""Tars read as they are: equal to the same tars packed, local or remote, and never damaged silently."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import encoded, write_tar
from data_server import Server, cached_bytes, read_all, server

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data import tar_index
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.remote_files import CACHE_NAME, FileStore

__all__ = ["server"]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    directory = tmp_path / "tars"
    directory.mkdir()
    for number in range(4):
        write_tar(directory / f"{number:02d}.tar", range(number * 10, number * 10 + 10))
    return directory


def test_tars_equal_the_same_tars_packed(tars: Path, tmp_path: Path) -> None:
    pack(str(tars), tmp_path / "packed")
    direct = open_samples(DataConfig(shards=str(tars), format="webdataset"))
    assert read_all(direct) == read_all(open_samples(DataConfig(shards=str(tmp_path / "packed"))))
    assert direct.shard_sizes.tolist() == [10, 10, 10, 10]
    again = open_samples(
        DataConfig(shards=f"{tars}/{{00..03}}.tar", format="webdataset", max_samples=25)
    )
    assert read_all(again) == read_all(direct)[:25]
    fingerprint = direct.fingerprint
    write_tar(tars / "03.tar", range(31, 41))
    changed = open_samples(DataConfig(shards=str(tars), format="webdataset"))
    assert changed.fingerprint != fingerprint
    assert changed.read(39).captions[0].text == "picture 40"


def test_remote_tars_equal_local_ones_under_eviction(
    tars: Path, server: Server, tmp_path: Path
) -> None:
    local = open_samples(DataConfig(shards=str(tars), format="webdataset"))
    cache = tmp_path / "cache"
    limit = int(max(path.stat().st_size for path in tars.glob("*.tar")) * 2.5)
    config = DataConfig(
        shards=f"{server.url}/tars/{{00..03}}.tar",
        format="webdataset",
        cache_directory=str(cache),
        cache_limit_gib=limit / 2**30,
    )
    remote = open_samples(config)
    assert remote.fingerprint == local.fingerprint
    assert read_all(remote) == read_all(local)
    assert cached_bytes(cache / CACHE_NAME) <= limit


def add_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_small_caches_do_not_disturb_indexing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(12):
        write_tar(tmp_path / "many" / f"{number:02d}.tar", range(number, number + 1))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    largest = max(path.stat().st_size for path in (tmp_path / "many").iterdir())
    config = DataConfig(
        shards=f"{server.url}/many/{{00..11}}.tar",
        format="webdataset",
        cache_directory=str(tmp_path / "cache"),
        cache_limit_gib=largest / 2**30,
    )
    local = open_samples(DataConfig(shards=str(tmp_path / "many"), format="webdataset"))
    assert open_samples(config).fingerprint == local.fingerprint
    too_small = config.model_copy(update={"cache_limit_gib": (largest - 1) / 2**30})
    with pytest.raises(InputError, match="room for the largest shard"):
        open_samples(too_small)  # indexed already
    requests = server.requests.total()
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    nothing = {"cache_directory": str(tmp_path / "other"), "cache_limit_gib": 1 / 2**30}
    with pytest.raises(InputError, match="room for the largest shard"):
        open_samples(config.model_copy(update=nothing))
    assert server.requests.total() - requests == 1  # the first tar tells, not the last


def test_an_open_file_outlives_its_eviction(tars: Path, server: Server, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in tars.iterdir())
    store = FileStore(
        f"{server.url}/tars",
        cache_directory=str(tmp_path / "cache"),
        cache_limit_gib=1.5 * largest / 2**30,
    )
    with store.open("00.tar") as first, store.open("01.tar") as second:
        assert not list(tmp_path.glob("cache/**/00.tar"))
        assert first.read() == (tars / "00.tar").read_bytes()
        assert second.read() == (tars / "01.tar").read_bytes()


def test_indexes_of_another_version_are_made_again(
    tars: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(
        shards=f"{server.url}/tars/{{00..03}}.tar",
        format="webdataset",
        cache_directory=str(tmp_path / "cache"),
    )
    monkeypatch.setattr(tar_index, "_VERSION", tar_index._VERSION + 1)
    open_samples(config)
    monkeypatch.undo()
    open_samples(config)
    for path in tmp_path.glob("cache/dsr_scale_tar_index/*/*.npz"):
        assert np.load(path)["stamp"][0] == tar_index._VERSION


def test_a_broken_tar_record_is_replaced_in_training_and_dropped_in_packing(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "tars"
    directory.mkdir()
    write_tar(directory / "00.tar", range(30))
    image = encoded(0, kind="JPEG")
    broken = {
        "broken": b'{"caption": ',
        "deep": b"[" * 100_000,
        "latin": "é".encode("latin-1"),
        "list": b"[]",
        "number": b'{"caption": 7}',
        "half": b'{"caption": "\\ud83d"}',
    }
    members = {}
    for key, content in broken.items():
        members |= {f"{key}.jpg": image, f"{key}.{'txt' if key == 'latin' else 'json'}": content}
    add_tar(directory / "01.tar", members)
    config = DataConfig(shards=str(directory), format="webdataset", workers=0, resolution=8)
    reasons = {
        "broken": "bad metadata",
        "deep": "bad metadata",
        "half": "bad caption",
        "latin": "bad caption",
        "list": "bad metadata",
        "number": "bad caption",
    }
    stream = BatchStream(
        open_samples(config),
        config,
        seed=0,
        global_batch_images=36,
        microbatch_images=36,
        rank=0,
        world_size=1,
    )
    [batch] = next(stream.steps(0))
    named = {record.key: record.error.partition(":")[0] for record in batch.corrupt}
    assert named == reasons
    assert pack(str(directory), tmp_path / "out").kept == 30
    lines = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert {each["key"]: each["reason"] for each in map(json.loads, lines)} == reasons


def test_a_tar_sample_without_image_is_counted_as_corrupt(tars: Path) -> None:
    add_tar(tars / "04.tar", {"a.txt": b"no image", "b.jpg": b"broken", "b.txt": b"text"})
    config = DataConfig(shards=str(tars), format="webdataset", workers=0, resolution=8)
    stream = BatchStream(
        open_samples(config),
        config,
        seed=0,
        global_batch_images=42,
        microbatch_images=42,
        rank=0,
        world_size=1,
    )
    [batch] = next(stream.steps(0))
    assert {record.key for record in batch.corrupt} == {"a", "b"}


def test_wrong_tar_locations(tars: Path, tmp_path: Path) -> None:
    for shards, message in {
        str(tmp_path / "absent"): "no .*absent",
        f"{tars}/{{00..05}}.tar": r"do not exist: 04\.tar, 05\.tar",
        "http://127.0.0.1:9/tars": "cannot be listed",
    }.items():
        with pytest.raises(InputError, match=message):
            open_samples(DataConfig(shards=shards, format="webdataset"))
    (tars / "01.tar").write_bytes((tars / "01.tar").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"01\.tar is no whole"):
        open_samples(DataConfig(shards=str(tars), format="webdataset"))
