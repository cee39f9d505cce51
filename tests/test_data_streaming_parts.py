"""Parts of mosaicml-streaming come without the packages above them, and leave nothing half imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


def answers(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["format", "format.mds.writer", "hashing", "storage.download"])
def test_every_part_loads_first_without_what_the_package_loads(first: str) -> None:
    program = f"""
import sys
from dsr_scale.data.streaming_parts import streaming_part
for name in ({first!r}, "format", "format.mds.writer", "hashing", "storage.download"):
    streaming_part(name)
streaming_part("storage.download").CloudDownloader.get("s3://bucket/shards")
print(sorted({{"streaming", "transformers", "sklearn", "torchvision"}} & set(sys.modules)))
"""
    assert answers(program) == "[]"


def test_the_whole_package_can_be_imported_afterwards() -> None:
    program = """
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.data.streaming_parts import streaming_part
reader = streaming_part("format").reader_from_json
declare_torchvision_operators()
import streaming
import streaming.base.format as formats
print(streaming.MDSWriter.__name__, formats.reader_from_json is reader)
print(streaming_part("format.mds.writer").MDSWriter is streaming.MDSWriter)
"""
    assert answers(program).split() == ["MDSWriter", "True", "True"]
