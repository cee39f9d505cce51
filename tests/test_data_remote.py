"""Remote shards and tars, served on the loopback: equal to local reading, in a bounded cache."""

from __future__ import annotations

import functools
import http.server
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import encoded, write_list, write_tar

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data import remote_files, tar_index
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.remote_files import CACHE_NAME, FileStore
from dsr_scale.data.samples import Sample, Samples
from dsr_scale.data.sources import SourceOptions

COUNT = 40


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


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_FIRST_PAUSE_S", 0.0)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    source = write_list(tmp_path / "source", COUNT)
    options = PackOptions(source=SourceOptions(unit_samples=10), shard_mib=0.005)
    pack(str(source), tmp_path / "packed", options)
    return tmp_path / "packed"


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


def test_remote_equals_local_and_each_shard_is_fetched_once(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    local = open_samples(DataConfig(shards=str(packed)))
    config = DataConfig(shards=f"{server.url}/packed", cache_directory=str(tmp_path / "cache"))
    remote = open_samples(config)
    assert remote.fingerprint == local.fingerprint
    assert read_all(remote) == read_all(local) == read_all(open_samples(config))
    np.testing.assert_array_equal(remote.sizes, local.sizes)
    shards = {path: n for path, n in server.requests.items() if path.endswith(".mds")}
    assert len(shards) == len(local.shard_sizes) and set(shards.values()) == {1}


def test_the_cache_stays_within_its_limit(packed: Path, server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "of the user").write_text("never evicted")
    largest = max(path.stat().st_size for path in packed.rglob("*.mds"))
    limit = int(largest * 3.5)
    config = DataConfig(
        shards=f"{server.url}/packed",
        cache_directory=str(cache),
        cache_limit_gib=limit / 2**30,
    )
    local, remote = open_samples(DataConfig(shards=str(packed))), open_samples(config)
    for number in np.random.default_rng(0).permutation(COUNT).tolist():
        assert remote.read(number) == local.read(number)
        assert cached_bytes(cache / CACHE_NAME) <= limit
    assert (cache / "of the user").exists()
    shards = [n for path, n in server.requests.items() if path.endswith(".mds")]
    assert max(shards) > 1  # some were evicted and fetched again
    too_small = config.model_copy(update={"cache_limit_gib": (largest - 1) / 2**30})
    with pytest.raises(InputError, match="room for the largest shard"):
        open_samples(too_small)


def read_in_process(config: DataConfig, seed: int) -> list[int]:
    """Reads everything in an order of its own; returns the ids whose sample differs."""
    remote = open_samples(config)
    order = np.random.default_rng(seed).permutation(COUNT).tolist()
    return [n for n in order if remote.read(n).key != f"k{n:04d}"]


def test_processes_share_one_cache_under_eviction(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in packed.rglob("*.mds"))
    config = DataConfig(
        shards=f"{server.url}/packed",
        cache_directory=str(tmp_path / "cache"),
        cache_limit_gib=largest * 4 / 2**30,
    )
    open_samples(config)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        jobs = [pool.apply_async(read_in_process, (config, seed)) for seed in range(4)]
        assert [job.get(60) for job in jobs] == [[], [], [], []]


def test_processes_without_a_limit_fetch_each_shard_once(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    config = DataConfig(shards=f"{server.url}/packed", cache_directory=str(tmp_path / "cache"))
    open_samples(config)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        jobs = [pool.apply_async(read_in_process, (config, seed)) for seed in range(3)]
        assert [job.get(60) for job in jobs] == [[], [], []]
    shards = [n for path, n in server.requests.items() if path.endswith(".mds")]
    assert set(shards) == {1}


def test_batches_from_a_remote_equal_local_ones(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    local = DataConfig(shards=str(packed), resolution=16, workers=0, buckets=((16, 16), (12, 20)))
    remote = local.model_copy(
        update={
            "shards": f"{server.url}/packed",
            "cache_directory": str(tmp_path / "cache"),
            "workers": 2,
        }
    )
    taken = []
    for config in (local, remote):
        stream = BatchStream(
            open_samples(config),
            config,
            seed=1,
            global_batch_images=8,
            microbatch_images=4,
            rank=0,
            world_size=1,
        )
        steps = stream.steps(2)
        taken.append([batch for _ in range(3) for batch in next(steps)])
        stream.close()
    for ours, theirs in zip(*taken, strict=True):
        assert ours.keys == theirs.keys and ours.captions == theirs.captions
        assert bool((ours.images == theirs.images).all())


def test_a_repacked_remote_is_not_mixed_with_the_old_cache(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    config = DataConfig(shards=f"{server.url}/packed", cache_directory=str(tmp_path / "cache"))
    before = open_samples(config).read(0)
    listing = tmp_path / "source" / "list.jsonl"
    listing.write_text(listing.read_text().replace("picture 0", "another text"))
    packed.rename(tmp_path / "old")
    options = PackOptions(source=SourceOptions(unit_samples=10), shard_mib=0.005)
    pack(str(listing), packed, options)
    after = open_samples(config).read(0)
    assert before.captions[0].text == "picture 0" and after.captions[0].text == "another text"


def test_damaged_and_unreachable_remotes(packed: Path, server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    shard = next(packed.rglob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    remote = open_samples(DataConfig(shards=f"{server.url}/packed", cache_directory=cache))
    with pytest.raises(InputError, match="another xxh3_64 hash, in the last of several attempts"):
        read_all(remote)
    address = f"/{shard.relative_to(tmp_path).as_posix()}"
    assert server.requests[address] == 4
    with pytest.raises(InputError, match=r"index\.json could not be fetched.*404"):
        open_samples(DataConfig(shards=f"{server.url}/nothing", cache_directory=cache))
    with pytest.raises(InputError, match="without a cache directory"):
        open_samples(DataConfig(shards=f"{server.url}/packed"))
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(InputError, match="could not be fetched"):
        open_samples(DataConfig(shards=f"{server.url}/packed", cache_directory=cache))


def test_a_shard_damaged_on_its_way_is_fetched_again(
    packed: Path, server: Server, tmp_path: Path
) -> None:
    remote = open_samples(
        DataConfig(shards=f"{server.url}/packed", cache_directory=str(tmp_path / "cache"))
    )
    server.damaged_replies = 2
    assert remote.read(0) == open_samples(DataConfig(shards=str(packed))).read(0)
    assert server.damaged_replies == 0


def read_and_die(config: DataConfig, sample_id: int) -> None:
    """Is killed in the middle of a download."""

    def half(url: str, path: Path) -> None:
        path.write_bytes(b"half a shard" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    samples = open_samples(config)
    remote_files._download_once = half
    samples.read(sample_id)


@pytest.mark.parametrize("then", [0, COUNT - 1])
def test_what_a_killed_download_left_is_removed(
    packed: Path, server: Server, tmp_path: Path, then: int
) -> None:
    cache = tmp_path / "cache" / CACHE_NAME
    largest = max(path.stat().st_size for path in packed.rglob("*.mds"))
    config = DataConfig(
        shards=f"{server.url}/packed",
        cache_directory=str(cache.parent),
        # Evicting looks at the whole cache; without it, the next fetch of the same shard does.
        cache_limit_gib=None if then == 0 else 3.5 * largest / 2**30,
    )
    dying = multiprocessing.get_context("fork").Process(target=read_and_die, args=(config, 0))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL
    assert cached_bytes(cache) == 12000
    sample = open_samples(config).read(then)
    assert sample == open_samples(DataConfig(shards=str(packed))).read(then)
    assert cached_bytes(cache) <= largest


def test_a_download_at_work_counts_and_is_not_removed(
    packed: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(packed.rglob("*.mds"))
    names = [path.relative_to(packed).as_posix() for path in shards]
    limit = sum(path.stat().st_size for path in shards[:3])
    store = FileStore(
        f"{server.url}/packed",
        cache_directory=str(tmp_path / "cache"),
        cache_limit_gib=limit / 2**30,
    )
    store.path(names[0])
    fetch, sizes = remote_files._download_once, []

    def meanwhile(url: str, path: Path) -> None:
        fetch(url, path)
        monkeypatch.setattr(remote_files, "_download_once", fetch)
        store.path(names[2])
        store.path(names[3])
        sizes.append(cached_bytes(tmp_path / "cache" / CACHE_NAME))

    monkeypatch.setattr(remote_files, "_download_once", meanwhile)
    assert store.path(names[1]).read_bytes() == shards[1].read_bytes()
    assert sizes[0] <= limit


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
    elsewhere = {"cache_directory": str(tmp_path / "other")}
    with pytest.raises(InputError, match="room for the largest shard"):
        open_samples(too_small.model_copy(update=elsewhere))
    assert server.requests.total() - requests < 12


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
