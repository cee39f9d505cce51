"""The shipped pack is complete and starts with distinct objects; its builder destroys nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from data_fixtures import write_list

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.manifest import fingerprint
from dsr_scale.data.pack import pack
from dsr_scale.data.samples import digest
from dsr_scale.data.shards import resolve_location
from dsr_scale.data.transforms import verified_size


def test_shipped_pack() -> None:
    samples = open_samples(DataConfig(shards="package:emoji"))
    everything = [samples.read(number) for number in range(len(samples))]
    assert len(everything) == 3374
    assert fingerprint(digest(sample) for sample in everything) == samples.fingerprint
    assert len({sample.key for sample in everything}) == 3374
    assert [verified_size(sample.image) for sample in everything] == [
        (height, width) for height, width in samples.sizes.tolist()
    ]
    plain = [
        not sample.metadata["skin_tone"] and sample.metadata.get("group") != "flags"
        for sample in everything
    ]
    assert plain == sorted(plain, reverse=True) and sum(plain) > 1500
    first = [sample.captions[0] for sample in everything[:500]]
    assert len({caption.text for caption in first}) >= 499
    assert {caption.source for caption in first} == {"label"}
    shipped = Path(resolve_location("package:emoji"))
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5.5e6
    assert "Permission is hereby granted, free of charge" in (shipped / "NOTICE").read_text()


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    path = Path(__file__).parent.parent / "tools" / "build_emoji_pack.py"
    spec = importlib.util.spec_from_file_location("build_emoji_pack", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_building_replaces_its_own_pack_and_nothing_else(
    builder: ModuleType, tmp_path: Path
) -> None:
    source = write_list(tmp_path / "source", 2)
    pack(str(source), tmp_path / "another pack")
    (tmp_path / "a web page").mkdir()
    (tmp_path / "a web page" / "manifest.json").write_text("{}")
    (tmp_path / "a file").write_text("mine")
    for name in ("source", "another pack", "a web page", "a file"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=f"{name} holds something else"):
            builder.build(tmp_path, tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    for replaceable in ("empty", "absent", resolve_location("package:emoji")):
        with pytest.raises(InputError, match=r"lacks .*tgz"):  # so it came past that check
            builder.build(tmp_path, tmp_path / replaceable)


def test_without_npm(builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no npm"):
        builder.fetch(tmp_path)
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(InputError, match="npm could not fetch"):
        builder.fetch(tmp_path)
