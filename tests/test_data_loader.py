"""Batches: the same for any number of workers, ranks and restarts; corrupt slots refilled alike."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import encoded, row, write_list

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.captions import choose_caption, drop_condition
from dsr_scale.data.corruption import check_rate
from dsr_scale.data.encoded import Encoded, Row, RowEncoder
from dsr_scale.data.loader import Batch, BatchStream, open_samples
from dsr_scale.data.order import SampleOrder
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.samples import Caption, Sample
from dsr_scale.data.shards import ShardStore
from dsr_scale.data.sources import SourceOptions
from dsr_scale.data.transforms import (
    UnreadableImage,
    choose_view,
    cover_and_crop,
    decode_rgb,
)

COUNT = 30
GLOBAL = 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    source = write_list(directory / "source", COUNT)
    options = PackOptions(source=SourceOptions(unit_samples=7), shard_mib=0.005)
    pack(str(source), directory / "out", options)
    return directory / "out"


def make_config(packed: Path, **changes: object) -> DataConfig:
    settings = {
        "shards": str(packed),
        "resolution": 16,
        "workers": 0,
        "crop": "random",
        "shuffle_block_samples": 9,
        "condition_dropout": 0.3,
    }
    return DataConfig.model_validate(settings | changes)


def run_steps(
    config: DataConfig, first: int, count: int, ranks: int = 1, micro: int = 3, **options: object
) -> list[list[Batch]]:
    """Per step, the micro-batches of all ranks in order."""
    steps: list[list[Batch]] = [[] for _ in range(count)]
    samples = open_samples(config)
    for rank in range(ranks):
        stream = BatchStream(
            samples,
            config,
            seed=5,
            global_batch_images=GLOBAL,
            microbatch_images=micro,
            rank=rank,
            world_size=ranks,
            **options,  # type: ignore[arg-type]
        )
        iterator = stream.steps(first)
        for step in steps:
            step += next(iterator)
        stream.close()
    return steps


def pixels_of(batch: Batch) -> torch.Tensor:
    """[B,3,H,W]; `Decoding` gives pixels in the place of latents."""
    pixels = batch.images if batch.encoded is None else batch.encoded.latents
    assert pixels is not None
    return pixels


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Everything a step trains on, sample by sample."""
    return [
        (
            pixels_of(batch)[i].numpy().tobytes(),
            batch.captions[i],
            bool(batch.null[i]),
            int(batch.epochs[i]),
            int(batch.sample_ids[i]),
            batch.keys[i],
        )
        for batch in batches
        for i in range(len(batch.keys))
    ]


def test_batches_equal_a_plain_loop(packed: Path) -> None:
    config = make_config(packed)
    store = ShardStore(config)
    order = SampleOrder(store.shard_sizes, seed=5, block_samples=9)
    epochs, ids = order.take(0, 4 * GLOBAL)
    expected = []
    for epoch, sample_id in zip(epochs.tolist(), ids.tolist(), strict=True):
        identity = {"seed": 5, "epoch": epoch, "sample_id": sample_id}
        image = decode_rgb(encoded(sample_id), config.background)
        pixels = cover_and_crop(image, (16, 16), choose_view("random", 0.5, **identity))
        captions = tuple(Caption(**caption) for caption in row(sample_id)["captions"])
        expected.append(
            (
                pixels.tobytes(),
                choose_caption(captions, "weighted", **identity),
                drop_condition(0.3, **identity),
                epoch,
                sample_id,
                f"k{sample_id:04d}",
            )
        )
    steps = run_steps(config, 0, 4)
    assert [each for step in steps for each in rows(step)] == expected
    images = pixels_of(steps[0][0])
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("buckets", [(), ((16, 16), (12, 20))])
def test_resuming_mid_epoch_on_other_ranks_and_workers_is_exact(
    packed: Path, buckets: tuple[tuple[int, int], ...]
) -> None:
    config = make_config(packed, buckets=buckets)
    whole = [rows(step) for step in run_steps(config, 0, 7)]
    assert [rows(step) for step in run_steps(config, 3, 4, ranks=4)] == whole[3:]
    assert [rows(step) for step in run_steps(config, 3, 4, ranks=2, micro=6)] == whole[3:]
    parallel = make_config(packed, buckets=buckets, workers=2, prefetch_batches=2)
    assert [rows(step) for step in run_steps(parallel, 4, 3, ranks=2)] == whole[4:]


def test_spawned_workers_give_the_same_batches(packed: Path) -> None:
    config = make_config(packed, workers=1)
    spawned = run_steps(config, 2, 1, start_method="spawn")
    assert rows(spawned[0]) == rows(run_steps(make_config(packed), 2, 1)[0])


def test_a_stream_can_be_started_again(packed: Path) -> None:
    config = make_config(packed, workers=1)
    stream = BatchStream(
        open_samples(config),
        config,
        seed=5,
        global_batch_images=GLOBAL,
        microbatch_images=GLOBAL,
        rank=0,
        world_size=1,
    )
    first = stream.steps(0)
    next(first)
    again = stream.steps(1)
    assert rows(next(again)) == rows(run_steps(make_config(packed), 1, 1)[0])
    assert list(first) == []  # the older iterator has ended
    stream.close()


def test_max_samples_takes_the_first_and_changes_the_fingerprint(packed: Path) -> None:
    few = open_samples(make_config(packed, max_samples=10))
    assert len(few) == 10 and int(few.shard_sizes.sum()) == 10 and len(few.sizes) == 10
    assert few.fingerprint != open_samples(make_config(packed)).fingerprint
    seen = {
        int(i)
        for step in run_steps(make_config(packed, max_samples=10), 0, 5)
        for b in step
        for i in b.sample_ids
    }
    assert seen == set(range(10))


def test_labels_come_from_the_metadata(packed: Path) -> None:
    [step] = run_steps(make_config(packed), 0, 1, num_classes=7)
    for batch in step:
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(i) % 7 for i in batch.sample_ids]
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"k\d{4} has class = None"):
            run_steps(
                make_config(packed, label_field="class", workers=workers), 0, 1, num_classes=7
            )


def test_a_label_beyond_the_classes_is_refused(packed: Path) -> None:
    # Labels are 0 to 6. With 6 classes, 6 would be the null class.
    with pytest.raises(InputError, match=r"(?s)k\d{4} has label = 6 .*from 0 to 5"):
        run_steps(make_config(packed), 0, 3, num_classes=6)


def test_uneven_batches_are_refused(packed: Path) -> None:
    with pytest.raises(InputError, match="divisible"):
        run_steps(make_config(packed), 0, 1, ranks=5)


class Damaged:
    """Samples of which every third image is broken and one has no caption."""

    def __init__(self, whole: ShardStore, broken: range | list[int]) -> None:
        self.whole, self.broken = whole, broken
        self.fingerprint, self.shard_sizes, self.sizes = whole.fingerprint, whole.shard_sizes, None

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, sample_id: int) -> Sample:
        sample = self.whole.read(sample_id)
        if sample_id == 1:
            return Sample(sample.image, (), sample.width, sample.height, sample.key)
        if sample_id in self.broken:
            return Sample(b"broken", sample.captions, 1, 1, sample.key)
        return sample


def damaged_rows(
    packed: Path, workers: int, ranks: int, encoder: RowEncoder | None = None
) -> tuple[list[Any], list[Any]]:
    config = make_config(packed, workers=workers)
    seen: list[Any] = []
    corrupt: list[Any] = []
    for rank in range(ranks):
        stream = BatchStream(
            Damaged(ShardStore(config), range(0, COUNT, 3)),  # type: ignore[arg-type]
            config,
            seed=5,
            global_batch_images=COUNT,
            microbatch_images=5,
            rank=rank,
            world_size=ranks,
            encoder=encoder,
        )
        for batch in next(stream.steps(0)):
            seen += rows([batch])
            corrupt += batch.corrupt
        stream.close()
    return seen, corrupt


def test_corrupt_images_are_named_and_replaced_alike_everywhere(packed: Path) -> None:
    seen, corrupt = damaged_rows(packed, workers=0, ranks=1)
    assert (seen, corrupt) == damaged_rows(packed, workers=2, ranks=1)
    assert (seen, corrupt) == damaged_rows(packed, workers=0, ranks=2)
    broken = {*range(0, COUNT, 3), 1}
    assert {record.sample_id for record in corrupt} == broken
    assert {record.key for record in corrupt} == {f"k{n:04d}" for n in broken}
    assert {r.error for r in corrupt if r.sample_id == 1} == {"no caption"}
    ids = [sample_id for *_, sample_id, _ in seen]
    assert len(ids) == COUNT and not broken & set(ids)
    assert {record.replacement_id for record in corrupt} <= set(ids)
    # A replacement looks as that sample does in its own right: same crop, flip and caption.
    by_id: dict[object, set[object]] = {}
    for pixels, caption, *_, sample_id, _ in seen:
        by_id.setdefault(sample_id, set()).add((pixels, caption))
    assert all(len(looks) == 1 for looks in by_id.values())


class Decoding:
    """Encodes files to their pixels, as an encoder server decodes them: failures are told, not raised."""

    wants_pixels = False

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        pixels = torch.zeros(len(rows), 3, *target, dtype=torch.uint8)
        failures = {}
        for place, each in enumerate(rows):
            assert isinstance(each.image, bytes)
            try:
                image = decode_rgb(each.image, self.config.background, target)
            except UnreadableImage as error:
                failures[place] = str(error)
            else:
                pixels[place] = torch.from_numpy(cover_and_crop(image, target, each.view))
        return Encoded(pixels, None, None, failures)


def test_what_is_decoded_elsewhere_is_replaced_as_what_is_decoded_here(packed: Path) -> None:
    here = damaged_rows(packed, workers=0, ranks=1)
    elsewhere = Decoding(make_config(packed))
    assert damaged_rows(packed, workers=0, ranks=1, encoder=elsewhere) == here
    assert damaged_rows(packed, workers=2, ranks=1, encoder=elsewhere) == here


def test_only_broken_images_end_with_an_error(packed: Path) -> None:
    config = make_config(packed)
    stream = BatchStream(
        Damaged(ShardStore(config), range(COUNT)),  # type: ignore[arg-type]
        config,
        seed=5,
        global_batch_images=2,
        microbatch_images=2,
        rank=0,
        world_size=1,
    )
    with pytest.raises(InputError, match="and so are 16 others"):
        next(stream.steps(0))


def test_corruption_rate() -> None:
    check_rate(0, 10**6, 0.0, [])
    check_rate(3, 999, 0.001, ["a"])  # too early to judge
    check_rate(1, 1000, 0.001, ["a"])
    with pytest.raises(InputError, match=r"2 of 1000 .*a, b"):
        check_rate(2, 1000, 0.001, ["a", "b"])
    with pytest.raises(InputError, match="16 of 64"):
        check_rate(16, 64, 0.001, ["a"])


def answer_with_steps(packed: Path, pipe: Connection) -> None:
    """For each message, the number of micro-batches in the next step."""
    config = make_config(packed, resolution=256, workers=2, prefetch_batches=4)
    stream = BatchStream(
        open_samples(config),
        config,
        seed=0,
        global_batch_images=16,
        microbatch_images=8,
        rank=0,
        world_size=1,
    )
    steps = stream.steps(0)
    while True:
        pipe.recv()
        pipe.send(len(next(steps)))


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def wait_until_idle(pids: list[int]) -> None:
    """Until the processes have used no processor time for a while: all they may prefetch is made."""

    def used() -> list[list[str]]:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
        return [stat.rpartition(")")[2].split()[11:13] for stat in stats]

    before = None
    while before != (now := used()):
        before = now
        time.sleep(0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")
def test_workers_ignore_foreign_signals_and_die_with_their_parent(packed: Path) -> None:
    # Forked, not started anew: importing everything again takes seconds.
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=answer_with_steps, args=(packed, theirs))
    process.start()
    assert process.pid is not None

    def step() -> int:
        ours.send("next")
        assert ours.poll(60)
        return ours.recv()

    try:
        assert step() == 2
        workers = children(process.pid)
        assert len(workers) == 2
        for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            for worker in workers:
                os.kill(worker, name)
        for _ in range(12):  # more than was ready before the signals
            assert step() == 2
        assert children(process.pid) == workers
        # Killed at the instant when it makes a segment of shared memory, a worker leaves that one.
        wait_until_idle(workers)
    finally:
        process.kill()
        process.join()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.05)
    pids = [str(pid) for pid in (process.pid, *workers)]
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [name for name in shared if any(pid in name for pid in pids)]


def test_workers_end_when_the_stream_is_closed(packed: Path) -> None:
    config = make_config(packed, workers=2)
    stream = BatchStream(
        open_samples(config),
        config,
        seed=0,
        global_batch_images=4,
        microbatch_images=2,
        rank=0,
        world_size=1,
    )
    before = set(children(os.getpid()))
    steps = stream.steps(0)
    next(steps)
    assert len(set(children(os.getpid())) - before) == 2
    stream.close()
    assert set(children(os.getpid())) <= before
