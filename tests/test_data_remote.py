"""Remote shards and tars, served on the loopback: equal to local reading, in a bounded cache."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import write_list, write_tar

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.remote_files import CACHE_NAME
from dsr_scale.data.samples import Sample, Samples
from dsr_scale.data.sources import SourceOptions

COUNT = 40


class Server:
    """Serves one directory and counts what was asked for."""

    def __init__(self, directory: Path) -> None:
        self.requests: Counter[str] = Counter()
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, *_: object) -> None:
                requests[self.path] += 1

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(directory))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


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
    with pytest.raises(InputError, match="another xxh3_64 hash"):
        read_all(remote)
    with pytest.raises(InputError, match=r"index\.json could not be fetched.*404"):
        open_samples(DataConfig(shards=f"{server.url}/nothing", cache_directory=cache))
    with pytest.raises(InputError, match="without a cache directory"):
        open_samples(DataConfig(shards=f"{server.url}/packed"))
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(InputError, match="could not be fetched"):
        open_samples(DataConfig(shards=f"{server.url}/packed", cache_directory=cache))


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


def test_a_tar_sample_without_image_is_counted_as_corrupt(tars: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tars / "04.tar", "w") as archive:
        for name, content in (("a.txt", b"no image"), ("b.jpg", b"broken"), ("b.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
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
