"""Everything a person can get wrong ends with status 2 and three readable parts, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rank_processes import ForkedCommand
from tiny_runs import CONFIG, run_training, write_config

from dsr_scale.cli import main as command_line
from dsr_scale.data.streaming_parts import streaming_part


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs `dsr-scale words…`, requires a readable refusal, returns it on one line."""
    arguments = ["dsr-scale", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", arguments)
        command_line.run()
    text = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2, text
    for part in ("found:", "required:", "what to do:"):
        assert part in text
    assert "Traceback" not in text
    return text


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, "train", write_config(tmp_path), f"data.shards={tmp_path / 'nowhere'}")
    assert "nowhere" in text


def test_empty_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    text = fails(capsys, "train", write_config(tmp_path), f"data.shards={tmp_path / 'shards'}")
    assert "is empty" in text and "dsr-scale pack" in text


def test_shards_of_another_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer_of = streaming_part("format.mds.writer").MDSWriter
    with writer_of(out=str(tmp_path / "shards"), columns={"jpg": "bytes", "txt": "str"}) as writer:
        writer.write({"jpg": b"x", "txt": "a"})
    text = fails(capsys, "train", write_config(tmp_path), f"data.shards={tmp_path / 'shards'}")
    assert "jpg" in text and "captions" in text


def test_captions_naming_missing_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "a"}, {"image": "gone.png", "caption": "b"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = fails(capsys, "pack", tmp_path / "list.jsonl", tmp_path / "out")
    assert "gone.png" in text


def test_config_typo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, "train", write_config(tmp_path), "training.stepps=3")
    assert "training.stepps" in text and "training.steps" in text


def test_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml" in fails(capsys, "train", tmp_path / "nothing.yaml")


def test_batch_that_does_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, "train", write_config(tmp_path), "training.microbatch_images=3")
    assert "training.microbatch_images" in text


def test_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    text = fails(capsys, "train", write_config(tmp_path))
    assert "0.0 GiB free" in text and "checkpoint.keep_last" in text


def test_no_write_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Root may write anywhere but into the kernel's own file systems.
    locked = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        locked.mkdir(mode=0o500)
    text = fails(capsys, "train", write_config(tmp_path), f"directory={locked / 'run'}")
    assert "no permission to write" in text


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    run_training(tmp_path, "training.steps=3")
    for override, named in (("model.width=64", "width"), ("seed=4", "seed was 3, now 4")):
        process = ForkedCommand("train", str(write_config(tmp_path)), override)
        printed = process.finish(100)
        assert process.returncode == 2, printed
        assert "checkpoint of another run" in printed and named in printed
        assert "Traceback" not in printed


def test_unknown_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = fails(capsys, "sample", tmp_path, "--prompts-file", tmp_path / "prompts.txt")
    assert "prompts.txt" in text
    assert "no prompt" in fails(capsys, "sample", tmp_path)


def test_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no complete checkpoint" in fails(capsys, "export", tmp_path, tmp_path / "out")


def test_grid_of_class_numbers_that_do_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        **CONFIG,
        "directory": str(tmp_path / "run"),
        "encoders": {"image": {"kind": "pixels", "patch": 8}, "text": {"kind": "none"}},
        "grid": {"every_steps": 1, "prompts": ["12"]},
    }
    config["model"] = {**CONFIG["model"], "conditioning": {"kind": "class", "num_classes": 10}}
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(config))
    assert "grid.prompts" in fails(capsys, "train", path)
