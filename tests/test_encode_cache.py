"""Reading a latent cache: the bits of a run that encodes, over an epoch, whatever went wrong with samples."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_runs import BROKEN, COUNT, CPU, fill_cache, make_run, write_odd_tar, write_pack
from tiny_language_models import WIDTH as TEXT_WIDTH
from tiny_language_models import save_tiny
from tiny_vision_transformers import RESOLUTION, save_vit, vit_config

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import RunConfig
from dsr_scale.data.encoded import Row
from dsr_scale.data.loader import BatchStream, open_samples
from dsr_scale.data.samples import Samples
from dsr_scale.data.shards import shard_reader
from dsr_scale.data.transforms import CENTRE, View, choose_view
from dsr_scale.encode_service.cache import null_caption, open_cache
from dsr_scale.encode_service.cache_format import read_manifest
from dsr_scale.encode_service.local import build_local


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def filled(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    fill_cache(make_run(packed), out)
    return out


def cached(run: RunConfig, directory: Path, **data: Any) -> RunConfig:
    """The same run reading the cache in `directory`."""
    access = run.encoder.model_copy(update={"mode": "cache", "cache": str(directory)})
    changed = run.data.model_copy(update=data)
    return run.model_copy(update={"encoder": access, "data": changed})


def stream(run: RunConfig, samples: Samples, rows: Any, classes: int | None) -> BatchStream:
    return BatchStream(
        samples,
        run.data,
        seed=run.seed,
        global_batch_images=6,
        microbatch_images=3,
        rank=0,
        world_size=1,
        num_classes=classes,
        encoder=rows,
    )


def assert_epochs_equal(
    run: RunConfig, cache: Path, steps: int, classes: int | None = None
) -> set[str]:
    """Compares `steps` steps with inline encoding, bit by bit; returns why samples were replaced."""
    encoders = build_local(run, CPU)
    inline = stream(run, open_samples(run.data), None, classes)
    samples, rows = pickle.loads(pickle.dumps(open_cache(cached(run, cache))))
    looked_up = stream(cached(run, cache), samples, rows, classes)
    reasons = set()
    views: list[bool] = []
    for _, expected_step, found_step in zip(
        range(steps), inline.steps(0), looked_up.steps(0), strict=False
    ):
        for expected, found in zip(expected_step, found_step, strict=True):
            assert expected.images is not None and found.encoded is not None
            made = encoders.encode(expected.images, expected.captions)
            for wanted, got in zip(
                (made.latents, made.tokens, made.mask),
                (found.encoded.latents, found.encoded.tokens, found.encoded.mask),
                strict=True,
            ):
                assert (wanted is None) == (got is None)
                if wanted is not None and got is not None:
                    assert wanted.dtype == got.dtype and torch.equal(wanted, got)
            for field in ("captions", "keys", "corrupt"):
                assert getattr(expected, field) == getattr(found, field)
            for field in ("null", "epochs", "sample_ids"):
                assert torch.equal(getattr(expected, field), getattr(found, field))
            assert (expected.labels is None) == (found.labels is None)
            if expected.labels is not None and found.labels is not None:
                assert torch.equal(expected.labels, found.labels)
            reasons |= {record.error for record in found.corrupt}
            for epoch, sample_id in zip(
                found.epochs.tolist(), found.sample_ids.tolist(), strict=True
            ):
                view = choose_view("center", 0.5, seed=5, epoch=epoch, sample_id=sample_id)
                views.append(view.mirrored)
    assert any(views) and not all(views)
    return reasons


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_epoch_on_pixels_and_bytes_is_bit_equal(
    packed: Path, tmp_path: Path, dtype: str
) -> None:
    run = make_run(packed)
    run = run.model_copy(
        update={"encoders": run.encoders.model_copy(update={"latent_dtype": dtype})}
    )
    report = fill_cache(run, tmp_path)
    assert report.counts["samples"] == COUNT and report.counts["unusable"] == len(BROKEN)
    assert report.counts["captions"] == 2 * (COUNT - len(BROKEN))
    reasons = assert_epochs_equal(run, tmp_path, steps=2 * COUNT // 6)
    assert len(reasons) == 1 and "not an image" in reasons.pop()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_epoch_on_transformers_is_bit_equal(packed: Path, tmp_path: Path, dtype: str) -> None:
    save_vit(tmp_path / "vit", "dinov2 with registers")
    save_tiny(tmp_path / "text", "qwen3")
    text = {
        "kind": "transformers",
        "model": str(tmp_path / "text"),
        "max_length": 12,
        "channels": TEXT_WIDTH,
        "dtype": dtype,
    }
    run = make_run(
        packed,
        data={"resolution": RESOLUTION, "max_samples": 18},
        encoders={
            "image": vit_config(tmp_path / "vit").model_dump(mode="json"),
            "text": text,
            "latent_dtype": dtype,
        },
    )
    fill_cache(run, tmp_path / "cache")
    assert_epochs_equal(run, tmp_path / "cache", steps=3)
    null = null_caption(tmp_path / "cache")
    encoder = build_local(run, CPU).text
    assert null is not None and encoder is not None
    expected = encoder.encode([""])
    assert torch.equal(null.tokens, expected.tokens) and torch.equal(null.mask, expected.mask)


@pytest.mark.parametrize("by_class", [False, True])
def test_odd_samples_of_tars_are_replaced_for_the_same_reasons(
    tmp_path: Path, by_class: bool
) -> None:
    (tmp_path / "tars").mkdir()
    write_odd_tar(tmp_path / "tars" / "0.tar")
    changes: dict[str, Any] = {"data": {"format": "webdataset"}}
    if by_class:
        changes["encoders"] = {"text": {"kind": "none"}}
    run = make_run(tmp_path / "tars", **changes)
    fill_cache(run, tmp_path / "cache")
    reasons = assert_epochs_equal(run, tmp_path / "cache", 6, classes=3 if by_class else None)
    assert any("bad metadata" in reason for reason in reasons)
    assert ("no caption" in reasons) == (not by_class)
    assert len(reasons) == (3 if not by_class else 2)


def test_workers_and_resuming_change_nothing(packed: Path, filled: Path) -> None:
    run = cached(make_run(packed), filled)
    straight = stream(run, *open_cache(run), None).steps(0)
    batches = [next(straight) for _ in range(4)]
    workers = cached(run, filled, workers=1)
    resumed = stream(workers, *open_cache(workers), None)
    for expected, found in zip(batches[2:], resumed.steps(2), strict=False):
        for one, other in zip(expected, found, strict=True):
            assert one.encoded is not None and other.encoded is not None
            assert torch.equal(one.encoded.latents, other.encoded.latents)
            assert one.captions == other.captions
    resumed.close()


def test_it_answers_as_its_source(packed: Path, filled: Path) -> None:
    run = make_run(packed)
    source = open_samples(run.data)
    for shards in (packed, filled):  # the cache stands in for data that is not at hand
        samples, _ = open_cache(cached(run, filled, shards=str(shards)))
        assert samples.fingerprint == source.fingerprint and len(samples) == COUNT
        assert samples.shard_sizes.tolist() == source.shard_sizes.tolist()
        assert (samples.sizes == source.sizes).all()
        read, original = samples.read(3), source.read(3)
        assert read.image == b"" and read.metadata == original.metadata
        assert (read.key, read.captions) == (original.key, original.captions)
        assert (read.width, read.height) == (original.width, original.height)
        with pytest.raises(IndexError):
            samples.read(COUNT)


def test_a_part_of_the_data_is_read_from_a_cache_of_all(packed: Path, filled: Path) -> None:
    run = make_run(packed, data={"max_samples": 10})
    for shards in (packed, filled):
        samples, _ = open_cache(cached(run, filled, shards=str(shards)))
        assert len(samples) == 10 == len(samples.sizes)
        assert samples.fingerprint == open_samples(run.data).fingerprint


def test_the_shards_are_plain_mds(filled: Path) -> None:
    table = json.loads((filled / "index.json").read_text())["shards"]
    assert len(table) == 5
    row = shard_reader(str(filled), table[1])[0]
    about = json.loads(row["about"])
    assert about["key"] == "k0007" and [c["weight"] for c in about["captions"]] == [3.0, 1.0]
    ids = torch.frombuffer(bytearray(row["tokens"]), dtype=torch.int16).tolist()
    assert bytes(ids) == b"picture 7" + b"a long text about pi" and about["token_counts"] == [9, 20]
    assert len(row["latents"]) == len(row["mirrored"]) == 48 * 4 * 4 * 4


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"data": {"resolution": 32}}, ["resolution is 16, wanted 32"]),
        (
            {"encoders": {"image": {"kind": "pixels", "patch": 8}, "latent_dtype": "bf16"}},
            ["image.patch is 4, wanted 8", "latent_dtype is fp32, wanted bf16"],
        ),
        ({"data": {"background": [0, 0, 0]}}, ["background is (255, 255, 255), wanted (0, 0, 0)"]),
        ({"data": {"shards": "package:emoji", "max_samples": 9}}, ["the data is", "(9 samples)"]),
        ({"data": {"crop": "random"}}, ["crop", "the same in every epoch"]),
        (
            {"data": {"buckets": [[16, 16], [16, 32]]}},
            ["2 data.buckets", "left over from their bucket"],
        ),
        ({"encoders": {"text": {"kind": "none"}}}, ["text.kind is bytes, wanted none"]),
    ],
)
def test_another_run_is_refused_naming_every_difference(
    packed: Path, filled: Path, changes: dict[str, Any], names: list[str]
) -> None:
    data = changes.get("data", {})
    run = make_run(data.get("shards", packed), **changes)
    with pytest.raises(InputError) as refused:
        open_cache(cached(run, filled))
    for name in names:
        assert name in str(refused.value)


def test_flips_need_mirrored_latents(packed: Path, tmp_path: Path) -> None:
    without = make_run(packed, data={"horizontal_flip": 0.0})
    fill_cache(without, tmp_path)
    open_cache(cached(without, tmp_path))
    with pytest.raises(InputError, match="no mirrored latents"):
        open_cache(cached(make_run(packed), tmp_path))
    with pytest.raises(InputError, match="no mirrored latents"):
        fill_cache(make_run(packed), tmp_path)


def test_the_device_and_the_protocol_do_not_matter_to_a_reader(
    packed: Path, filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled, tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    content = json.loads(path.read_text())
    content["contract"] |= {"device": "cuda 9.0", "protocol": "0"}
    path.write_text(json.dumps(content))
    _, rows = open_cache(cached(make_run(packed), tmp_path / "cache"))
    assert rows.contract.values["device"] == "cuda 9.0"
    (tmp_path / "cache" / "unit-00002").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"device is cuda 9\.0, wanted cpu"):
        fill_cache(make_run(packed), tmp_path / "cache")


def test_an_unfinished_cache_says_how_to_finish_it(
    packed: Path, filled: Path, tmp_path: Path
) -> None:
    run = cached(make_run(packed), tmp_path / "cache")
    with pytest.raises(InputError, match=r"no cache\.json") as refused:
        open_cache(run)
    assert f"dsr-scale encode {packed} {tmp_path / 'cache'} --config" in refused.value.remedy
    shutil.copytree(filled, tmp_path / "cache")
    (tmp_path / "cache" / "index.json").unlink()
    shutil.rmtree(tmp_path / "cache" / "unit-00003")
    with pytest.raises(InputError, match="1 of 5 units are missing") as refused:
        open_cache(run)
    assert f"dsr-scale encode {packed} {tmp_path / 'cache'} --config" in refused.value.remedy
    with pytest.raises(InputError, match=r"no encoder\.cache"):
        open_cache(make_run(packed, encoder={"mode": "cache"}))


def _flip(position: int) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        place = position % len(content)
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flipped


def _position(filled: Path, column: str) -> int:
    """Where a byte of `column` of the first sample of unit 1 lies."""
    content = (filled / "unit-00001" / "shard.00000.mds").read_bytes()
    begin = int.from_bytes(content[4:8], "little")
    sizes = [int.from_bytes(content[begin + 4 * n :][:4], "little") for n in range(5)]
    columns = ["about", "checksums", "latents", "mirrored", "tokens"]
    return begin + 20 + sum(sizes[: columns.index(column)]) + sizes[columns.index(column)] // 2


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("about", "about that do not fit"),
        ("checksums", "do not fit their checksum"),
        ("latents", "latents that do not fit"),
        ("mirrored", "mirrored that do not fit"),
        ("tokens", "tokens that do not fit"),
        ("sizes", "sizes of sample 0"),
        ("table", "a table that is not one"),
    ],
)
def test_damage_is_found_and_named_and_one_unit_repaired(
    packed: Path, filled: Path, tmp_path: Path, column: str, says: str
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(filled, out)
    shard = out / "unit-00001" / "shard.00000.mds"
    whole = shard.read_bytes()
    first = int.from_bytes(whole[4:8], "little")
    places = {"sizes": first, "table": 0}
    place = places[column] if column in places else _position(filled, column)
    shard.write_bytes(_flip(place)(whole))
    run = cached(make_run(packed), out)
    samples, rows = open_cache(run)
    with pytest.raises(InputError, match=says) as refused:
        _look_up_all(samples, rows, 7)
    assert str(shard) in refused.value.found and "dsr-scale encode" in refused.value.remedy
    shutil.rmtree(shard.parent)
    with pytest.raises(InputError, match="cannot be read"):
        _look_up_all(*open_cache(run), 7)
    assert fill_cache(make_run(packed), out).images == 7
    assert shard.read_bytes() == whole
    _look_up_all(*open_cache(run), 7)


def _look_up_all(samples: Any, rows: Any, sample_id: int) -> None:
    captions = [caption.text for caption in samples.read(sample_id).captions]
    wanted = [
        Row(sample_id, b"", View(mirrored=mirrored), caption)
        for mirrored in (False, True)
        for caption in captions
    ]
    rows.encode(wanted, (16, 16))


def test_cut_shards_are_refused_when_read_or_filled_again_and_broken_tables_when_opened(
    packed: Path, filled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    run = cached(make_run(packed), out)
    shutil.copytree(filled, out)
    shard = out / "unit-00001" / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    manifest = read_manifest(out)
    assert manifest is not None
    first = manifest.shard_sizes[0]
    says = f"{len(whole) - 1} bytes instead of {len(whole)}"
    samples, rows = open_cache(run)
    _look_up_all(samples, rows, first - 1)
    with pytest.raises(InputError, match=says):
        samples.read(first)
    with pytest.raises(InputError, match=says):
        fill_cache(make_run(packed), out)
    shard.write_bytes(whole)
    for name in ("index.json", "cache.json"):
        content = (out / name).read_bytes()
        for broken in (b"", b"{}", b"[1]", content[:-9]):
            (out / name).write_bytes(broken)
            with pytest.raises(InputError, match=name):
                open_cache(run)
        (out / name).write_bytes(content)
    open_cache(run)


def test_a_caption_that_was_not_stored_is_an_error(packed: Path, filled: Path) -> None:
    _, rows = open_cache(cached(make_run(packed), filled))
    with pytest.raises(InputError, match="k0003 has no caption 'new'"):
        rows.encode([Row(3, b"", CENTRE, "new")], (16, 16))
