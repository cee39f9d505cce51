"""The shipped pack is complete, is what its manifest says, and starts with distinct objects."""

from __future__ import annotations

from pathlib import Path

from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.manifest import fingerprint
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
