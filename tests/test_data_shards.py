"""Packs that are damaged, cut off or something else: each is named, none is read as if whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import write_list

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.pack import pack
from dsr_scale.data.pack_unit import PackOptions
from dsr_scale.data.shards import ShardStore
from dsr_scale.data.sources import SourceOptions


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    source = write_list(directory / "source", 30)
    options = PackOptions(source=SourceOptions(unit_samples=7), shard_mib=0.005)
    pack(str(source), directory / "out", options)
    return directory / "out"


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index["shards"][1].pop("raw_data"),
        lambda index: index["shards"][1].pop("samples"),
        lambda index: index["shards"][1]["raw_data"].pop("bytes"),
        lambda index: index["shards"][1]["raw_data"].update(hashes=None),
        lambda index: index["shards"][1].update(samples="many"),
        lambda index: index["shards"][1]["column_names"].pop(),
        lambda index: index["shards"].append(None),
        lambda index: index.update(shards=7),
        lambda index: index["shards"][0].pop("column_sizes"),
        lambda index: index["shards"][0].update(version=3),
    ],
)
def test_a_damaged_index_is_an_error_for_people(
    packed: Path, tmp_path: Path, damage: Callable[[Any], object]
) -> None:
    index = json.loads((packed / "index.json").read_text())
    damage(index)
    shutil.copytree(packed, tmp_path / "damaged")
    (tmp_path / "damaged" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json is no shard index"):
        ShardStore(DataConfig(shards=str(tmp_path / "damaged"))).read(0)


def test_errors_of_a_wrong_directory(packed: Path, tmp_path: Path) -> None:
    def opened(directory: Path) -> None:
        ShardStore(DataConfig(shards=str(directory)))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(packed, tmp_path / name))

    with pytest.raises(InputError, match="is no directory"):
        opened(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        opened(tmp_path / "empty")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.format: webdataset"):
        opened(tmp_path / "tars")
    other = copy("other schema")
    index = json.loads((other / "index.json").read_text())
    index["shards"][0]["column_names"][0] = "text"
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"text: json.*\n.*captions: json"):
        opened(other)
    count = copy("other count")
    manifest = json.loads((count / "manifest.json").read_text())
    (count / "manifest.json").write_text(json.dumps(manifest | {"samples": 31}))
    with pytest.raises(InputError, match=r"lists 30 samples, manifest\.json 31"):
        opened(count)
    (count / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(InputError, match="has schema 99"):
        opened(count)
    cut = copy("cut off")
    shard = next(cut.glob("part-00001/*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"part-00001/shard\.00000\.mds has \d+ bytes"):
        opened(cut)
    shard.unlink()
    with pytest.raises(InputError, match="is missing"):
        opened(cut)
    sizes = copy("other sizes")
    np.save(sizes / "sizes.npy", np.ones((30, 2), dtype=np.uint16))
    with pytest.raises(InputError, match="differs from what"):
        _ = ShardStore(DataConfig(shards=str(sizes))).sizes
    with pytest.raises(InputError, match="package:emoji"):
        ShardStore(DataConfig(shards="package:photos"))
