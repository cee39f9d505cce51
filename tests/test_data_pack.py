"""Packing: every source gives the same samples, interruptions change nothing, errors say why."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import encoded, picture, row, write_list, write_tar

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data import pack_unit
from dsr_scale.data.pack import PackProgress, pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.samples import Caption, Sample
from dsr_scale.data.shards import ShardStore
from dsr_scale.data.sources import SourceOptions

COUNT = 23
SMALL_UNITS = PackOptions(source=SourceOptions(unit_samples=5), shard_mib=0.005)


def read_all(directory: Path) -> list[Sample]:
    store = ShardStore(DataConfig(shards=str(directory)))
    samples = [store.read(number) for number in range(len(store))]
    assert store.sizes.tolist() == [[sample.height, sample.width] for sample in samples]
    return samples


def dropped_keys(directory: Path) -> dict[str, str]:
    """The reason for each key in `dropped.jsonl`."""
    lines = (directory / "dropped.jsonl").read_text().splitlines()
    return {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}


def expected_samples(images: list[bytes]) -> list[Sample]:
    return [
        Sample(
            image=image,
            captions=tuple(Caption(**caption) for caption in row(number)["captions"]),
            width=32,
            height=24,
            key=f"k{number:04d}",
            metadata={"label": number % 7},
        )
        for number, image in enumerate(images)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow stream", "arrow file"])
def test_lists_and_tables_give_the_samples_they_were_made_of(tmp_path: Path, kind: str) -> None:
    images = [encoded(number) for number in range(COUNT)]
    if kind == "jsonl":
        source = write_list(tmp_path, COUNT)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            row(number) | {"image": {"bytes": image, "path": f"{number}.png"}}
            for number, image in enumerate(images)
        ]
        table = pa.Table.from_pylist(rows)
        source = tmp_path / "dataset"
        source.mkdir()
        if kind == "parquet":
            pq.write_table(table, source / "train-00000-of-00001.parquet", row_group_size=6)
        else:
            path = str(source / "data-00000-of-00001.arrow")
            open_file = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
            with open_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
            (source / "dataset_info.json").write_text("{}")
            (source / "state.json").write_text("{}")
    report = pack(str(source), tmp_path / "out", SMALL_UNITS)
    assert read_all(tmp_path / "out") == expected_samples(images)
    assert report.kept == COUNT and report.dropped == {} and report.shards > 5


def test_csv_with_line_breaks_in_captions(tmp_path: Path) -> None:
    write_list(tmp_path, COUNT)
    path = tmp_path / "list.csv"
    texts = [f'line one of {n},\nline "two"\r\n' if n % 3 else f"só {n}" for n in range(COUNT)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "note"])
        for number, text in enumerate(texts):
            writer.writerow([f"images/{number:04d}.png", text, number])
    pack(str(path), tmp_path / "out", SMALL_UNITS)
    samples = read_all(tmp_path / "out")
    assert [sample.captions[0].text for sample in samples] == [text.strip() for text in texts]
    assert [sample.metadata for sample in samples] == [{"note": str(n)} for n in range(COUNT)]
    assert [sample.image for sample in samples] == [encoded(n) for n in range(COUNT)]


def test_folder_with_sidecar_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "nested"
    folder.mkdir(parents=True)
    for number in range(7):
        (folder / f"{number}.png").write_bytes(encoded(number))
        (folder / f"{number}.txt").write_text(f"first {number}\n\n second \n")
    (folder / "3.json").write_text('{"label": 4}')
    for name, text, description in (("8", "é", "{}"), ("9", "whole", "[1]"), ("91", "too", "{")):
        (folder / f"{name}.png").write_bytes(encoded(8))
        (folder / f"{name}.txt").write_bytes(text.encode("latin-1"))
        (folder / f"{name}.json").write_text(description)
    report = pack(str(tmp_path / "folder"), tmp_path / "out", SMALL_UNITS)
    assert report.dropped == {"bad caption": 1, "bad metadata": 2}
    assert dropped_keys(tmp_path / "out") == {
        "nested/8": "bad caption",
        "nested/9": "bad metadata",
        "nested/91": "bad metadata",
    }
    samples = read_all(tmp_path / "out")
    assert [sample.key for sample in samples] == [f"nested/{number}" for number in range(7)]
    assert [c.text for c in samples[2].captions] == ["first 2", "second"]
    assert [sample.metadata for sample in samples] == [{}, {}, {}, {"label": 4}, {}, {}, {}]


def test_tars_in_img2dataset_layout(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    write_tar(source / "00000.tar", range(10))
    write_tar(source / "00001.tar", range(10, COUNT))
    (source / "00000_stats.json").write_text("{}")
    (source / "00000.parquet").write_bytes(b"statistics that are not read")
    pack(str(source), tmp_path / "out")
    samples = read_all(tmp_path / "out")
    assert [sample.image for sample in samples] == [encoded(n, kind="JPEG") for n in range(COUNT)]
    assert [c.text for s in samples for c in s.captions] == [f"picture {n}" for n in range(COUNT)]
    assert [sample.metadata["label"] for sample in samples] == [n % 7 for n in range(COUNT)]


def test_workers_and_unit_sizes_do_not_change_the_contents(tmp_path: Path) -> None:
    source = str(write_list(tmp_path, COUNT))
    ticks: list[PackProgress] = []
    one = pack(source, tmp_path / "one", SMALL_UNITS)
    two = pack(source, tmp_path / "two", dataclasses.replace(SMALL_UNITS, workers=2), ticks.append)
    whole = pack(source, tmp_path / "whole")
    assert one == two
    assert one.fingerprint == whole.fingerprint
    for name in ("index.json", "sizes.npy", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert read_all(tmp_path / "two") == read_all(tmp_path / "whole")
    assert ticks[-1] == PackProgress(units_done=5, units=5, samples=COUNT)
    changed = (tmp_path / "list.jsonl").read_text().replace("picture 9", "picture nine")
    (tmp_path / "list.jsonl").write_text(changed)
    assert pack(source, tmp_path / "changed").fingerprint != one.fingerprint


def pack_until_killed(source: str, out: Path) -> None:
    def stop(progress: PackProgress) -> None:
        if progress.units_done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    pack(source, out, dataclasses.replace(SMALL_UNITS, workers=2), stop)


def test_killed_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    source = str(write_list(tmp_path, COUNT))
    out = tmp_path / "out"
    # Forked, not started anew: importing everything again takes seconds.
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=pack_until_killed, args=(source, out))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match=r"has no index\.json"):
        ShardStore(DataConfig(shards=str(out)))
    finished = sorted(out.glob("part-*"))
    assert 2 <= len(finished) < 5
    times = {part: part.stat().st_mtime_ns for part in finished}
    left = out / f"{pack_unit.TEMPORARY_PREFIX}part-00004-1"
    left.mkdir(exist_ok=True)
    with pytest.raises(InputError, match="unfinished pack of another source"):
        pack(source, out)
    inodes = {part: (part / "shard.00000.mds").stat().st_ino for part in times}
    report = pack(source, out, SMALL_UNITS)
    assert report == pack(source, tmp_path / "uninterrupted", SMALL_UNITS)
    assert {part: (part / "shard.00000.mds").stat().st_ino for part in times} == inodes
    assert read_all(out) == read_all(tmp_path / "uninterrupted")
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("part-"))
    assert names == ["dropped.jsonl", "index.json", "manifest.json", "sizes.npy"]
    assert pack(source, out, SMALL_UNITS) == report  # nothing left to do
    with pytest.raises(InputError, match="finished pack of another source"):
        pack(source, out)


def test_dropped_samples_are_counted_and_named(tmp_path: Path) -> None:
    source = write_list(tmp_path, 11)
    images = tmp_path / "images"
    (images / "0001.png").write_bytes(encoded(1)[:90])
    (images / "0002.png").write_bytes(encoded(2, 9, 40))
    (images / "0003.png").unlink()
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[4]["captions"] = [" "]
    rows[8]["captions"] = [{"text": "no weight", "weight": 0}]
    rows[9]["captions"] = "half a pair: \ud83d"
    rows[10]["note"] = "half a pair: \ud83d"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    options = PackOptions(allow_missing=True, min_side=10)
    report = pack(str(source), tmp_path / "out", options)
    reasons = {
        "bad caption": 2,
        "bad metadata": 1,
        "missing caption": 1,
        "missing image": 1,
        "too small": 1,
        "unreadable image": 1,
    }
    assert report.kept == 4 and report.dropped == reasons
    assert dropped_keys(tmp_path / "out") == {
        "k0001": "unreadable image",
        "k0002": "too small",
        "k0003": "missing image",
        "k0004": "missing caption",
        "k0008": "bad caption",
        "k0009": "bad caption",
        "k0010": "bad metadata",
    }
    assert [sample.key for sample in read_all(tmp_path / "out")] == [
        "k0000",
        "k0005",
        "k0006",
        "k0007",
    ]
    lengths = [len(c["text"]) for n in (0, 5, 6, 7) for c in row(n)["captions"]]
    assert report.caption_characters["mean"] == np.mean(lengths)
    assert report.caption_characters["p50"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert report.short_side_pixels["min"] == report.short_side_pixels["max"] == 24


def test_missing_images_are_listed_before_anything_is_written(tmp_path: Path) -> None:
    source = write_list(tmp_path, 30)
    for number in range(12):
        (tmp_path / "images" / f"{number:04d}.png").unlink()
    with pytest.raises(InputError, match=r"12 images.*0000\.png.* and 2 more"):
        pack(str(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(1))
    (folder / "a.txt").write_text("here")
    (folder / "b.txt").write_text("not here")
    with pytest.raises(InputError, match=r"b\.txt"):
        pack(str(folder), tmp_path / "out2")
    report = pack(str(folder), tmp_path / "out2", PackOptions(allow_missing=True))
    assert report.kept == 1 and report.dropped == {"missing image": 1}


def test_unusable_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text("{}\nnot json\n")
    (tmp_path / "blank.csv").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    (tmp_path / "two").mkdir()
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / "two" / name).write_text("{}")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    (tmp_path / "splits" / "train").mkdir()
    for name, message in {
        "absent": "does not exist",
        "empty": "is empty",
        "text.jsonl": "has columns none",
        "blank.csv": "no records",
        "broken.parquet": "cannot be read as parquet",
        "broken.tar": "no whole, uncompressed tar",
        "two": "csv or jsonl",
        "splits": "several splits: train",
    }.items():
        with pytest.raises(InputError, match=message):
            pack(str(tmp_path / name), tmp_path / f"out {name}")


def test_nothing_kept_is_an_error(tmp_path: Path) -> None:
    source = write_list(tmp_path, 3)
    with pytest.raises(InputError, match=r"nothing was kept: .*too small.*3") as raised:
        pack(str(source), tmp_path / "out", PackOptions(min_side=100))
    assert "--captions-optional" not in raised.value.remedy
    options = PackOptions(source=SourceOptions(caption_columns=("label_text",)))
    rows = [json.loads(line) | {"label_text": ""} for line in source.read_text().splitlines()]
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(InputError, match="missing caption") as raised:
        pack(str(source), tmp_path / "without captions", options)
    assert "--captions-optional" in raised.value.remedy


def test_a_source_that_changed_is_not_taken_for_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    for name in ("0", "a/1", "a/2"):
        (folder / f"{name}.png").write_bytes(encoded(1))
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "0.json").write_text('{"label": 1}')
    (folder / "unrelated.json").write_text("{}")
    report = pack(str(folder), tmp_path / "out")
    (folder / "unrelated.json").write_text("[]")
    assert pack(str(folder), tmp_path / "out") == report
    for name, text in (("a/2.txt", "A caption"), ("0.json", '{"label": 2}')):
        path = folder / name
        old, times = path.read_text(), path.stat()
        path.write_text(text)
        with pytest.raises(InputError, match=r"finished pack of .* files that changed"):
            pack(str(folder), tmp_path / "out")
        out = tmp_path / f"after {Path(name).name}"
        assert pack(str(folder), out).fingerprint != report.fingerprint
        path.write_text(old)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert pack(str(folder), tmp_path / "out") == report


@pytest.mark.parametrize("refused", ["list.jsonl", "0001.png"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    source = write_list(tmp_path, 3)
    whole = Path.open

    def guarded(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(InputError, match=f"no permission to read .*{refused}"):
        pack(str(source), tmp_path / "out")


def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "shut"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "0.png").write_bytes(encoded(1))
        (tmp_path / "source" / name / "0.txt").write_text("text")
    whole = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputError, match=r"no permission to read .*shut"):
        pack(str(tmp_path / "source"), tmp_path / "out")


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    source = write_list(tmp_path, 3)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        pack(str(source), out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_an_error_for_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_list(tmp_path, COUNT)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_unit, "_flush_to_disk", full)
    with pytest.raises(InputError, match="no space left"):
        pack(str(source), tmp_path / "out", SMALL_UNITS)
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "out").iterdir() if "part" in path.name]
    assert pack(str(source), tmp_path / "out", SMALL_UNITS).kept == COUNT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(tmp_path: Path) -> None:
    source = write_list(tmp_path, 3)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="no permission"):
        pack(str(source), tmp_path / "locked" / "out")


def test_a_sample_larger_than_a_shard_is_kept(tmp_path: Path) -> None:
    source = write_list(tmp_path, 3, height=120, width=160)
    pack(str(source), tmp_path / "out", PackOptions(shard_mib=0.001))
    images = [sample.image for sample in read_all(tmp_path / "out")]
    assert images == [encoded(number, 120, 160) for number in range(3)]
    assert picture(0).any()
