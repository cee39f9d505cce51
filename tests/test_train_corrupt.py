"""Unreadable images are named whichever rank met them, and stop the run above the allowed rate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rank_processes import ForkedCommand
from tiny_runs import consumed, run_training, write_config

from dsr_scale.telemetry.metrics import read_metrics


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs, of which two were broken on the disk after packing."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(20):
        Image.new("RGB", (32, 32), (10 * i, 0, 99)).save(folder / f"{i:02d}.png")
        rows.append({"key": f"pair{i:02d}", "image": f"{i:02d}.png", "caption": f"number {i}"})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(Path(sys.executable).with_name("dsr-scale")), "pack"]
    out = folder / "shards"
    subprocess.run([*command, str(folder / "list.jsonl"), str(out), "--workers", "1"], check=True)
    (shard,) = out.rglob("*.mds")
    content = shard.read_bytes()
    for i in (4, 11):
        image = (folder / f"{i:02d}.png").read_bytes()
        assert content.count(image) == 1
        content = content.replace(image, b"\0" * len(image))
    shard.write_bytes(content)
    return out


@pytest.mark.slow
def test_named_by_all_ranks_and_replaced_alike(shards: Path, tmp_path: Path) -> None:
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        folder.mkdir()
        run_training(
            folder,
            f"data.shards={shards}",
            "data.max_corrupt_rate=1.0",
            "training.steps=3",
            ranks=ranks,
        )
    assert consumed(folders[1]) == consumed(folders[2])
    for folder in folders.values():
        last = read_metrics(folder / "run")[-1]
        assert last["corrupt_seen"] == len(last["corrupt_keys"]) >= 2
        assert set(last["corrupt_keys"]) == {"pair04", "pair11"}


def test_too_many_stop_the_run(shards: Path, tmp_path: Path) -> None:
    overrides = [f"data.shards={shards}", "data.max_corrupt_rate=0.01", "training.steps=1000"]
    process = ForkedCommand("train", str(write_config(tmp_path)), *overrides)
    printed = process.finish(200)
    assert process.returncode == 2, printed
    assert "pair04" in printed and "data.max_corrupt_rate" in printed
    assert "Traceback" not in printed
