"""Remote shards, served on the loopback: equal to local reading, in a bounded cache."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import write_list
from data_server import Server, cached_bytes, read_all, server

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data import remote_files
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.remote_files import CACHE_NAME, FileStore
from dsr_scale.data.sources import SourceOptions

__all__ = ["server"]

COUNT = 40


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "_FIRST_PAUSE_S", 0.0)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    source = write_list(tmp_path / "source", COUNT)
    options = PackOptions(source=SourceOptions(unit_samples=10), shard_mib=0.005)
    pack(str(source), tmp_path / "packed", options)
    return tmp_path / "packed"


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


def with_separate_locks(
    url: str, names: list[str], folder: Path, limit: int
) -> tuple[FileStore, Path]:
    """A store, and its cache, in which no two of `names` share a lock file: one process fetches
    inside its own fetch below, which would wait for itself."""
    for attempt in range(100):
        cache = folder / f"cache{attempt}"
        store = FileStore(url, cache_directory=str(cache), cache_limit_gib=limit / 2**30)
        if len({store._lock_path(store._cache / name) for name in names}) == len(names):
            return store, cache
    raise AssertionError("a hundred caches all share locks")


def test_a_download_at_work_counts_and_is_not_removed(
    packed: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(packed.rglob("*.mds"))
    names = [path.relative_to(packed).as_posix() for path in shards]
    limit = sum(path.stat().st_size for path in shards[:3])
    store, cache = with_separate_locks(f"{server.url}/packed", names[1:4], tmp_path, limit)
    store.path(names[0])
    fetch, sizes = remote_files._download_once, []

    def meanwhile(url: str, path: Path) -> None:
        fetch(url, path)
        monkeypatch.setattr(remote_files, "_download_once", fetch)
        store.path(names[2])
        store.path(names[3])
        sizes.append(cached_bytes(cache / CACHE_NAME))

    monkeypatch.setattr(remote_files, "_download_once", meanwhile)
    assert store.path(names[1]).read_bytes() == shards[1].read_bytes()
    assert sizes[0] <= limit
