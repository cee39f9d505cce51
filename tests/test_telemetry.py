"""Outlier statistics against planted outliers; metrics files; grids that remember how they were made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dsr_scale.evaluate.nearest import nearest_match
from dsr_scale.model.layout import TokenLayout
from dsr_scale.telemetry.metrics import METRICS_FILE, MetricsLog, read_metrics
from dsr_scale.telemetry.pictures import image_grid
from dsr_scale.telemetry.token_norms import NormProbe, outliers

LAYOUT = TokenLayout(registers=2, text=3, grid=(8, 8), start=1, depth=2)


def planted(block: int) -> torch.Tensor:
    """Two images whose token norms are about 8; image 0 has one image token of norm 40."""
    tokens = torch.randn(
        2, LAYOUT.inside(block).total, 64, generator=torch.Generator().manual_seed(0)
    )
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    tokens = tokens * torch.linspace(7.5, 8.5, tokens.shape[1])[None, :, None]
    image = LAYOUT.inside(block).image_slice.start
    tokens[0, image + 5] *= 5
    return tokens


def test_planted_outlier_is_found_in_its_block() -> None:
    probe = NormProbe()
    for block in (0, 1):
        tokens = planted(block)
        if block == 1:
            tokens[:, 0] *= 10  # a register may be large: it is no image token
        probe(f"blocks.{block}", tokens, LAYOUT)
    for norms in probe.blocks.values():
        assert norms.outlier_ratio == pytest.approx(1 / 128)
        found = outliers(norms.image_norms)
        assert found.nonzero().tolist() == [[0, 5]]
        assert norms.max_over_median == pytest.approx((5 + 1) / 2, rel=0.1)
    assert probe.blocks["blocks.0"].register_over_median is None
    assert probe.blocks["blocks.1"].register_over_median == pytest.approx(10, rel=0.1)


def test_smooth_norms_have_no_outliers() -> None:
    norms = torch.linspace(5, 9.9, 64)[None]
    assert not outliers(norms).any()


KILLED_TRACKER = """
import sys
from pathlib import Path

import psutil

from dsr_scale.telemetry.metrics import MetricsLog

log = MetricsLog(
    Path(sys.argv[1]), wandb_mode="offline", project="p", name="n", config={}, run_id=None
)
log.log(1, {"loss": 2.0})
trackers = psutil.Process().children(recursive=True)
assert trackers
for process in trackers:
    process.terminate()
psutil.wait_procs(trackers, timeout=20)
for step in (2, 3):
    log.log(step, {"loss": 1.0})
log.close()
"""


def test_a_tracker_that_a_signal_ended_does_not_end_the_run(tmp_path: Path) -> None:
    # Not in this process, where wandb would be of no use to other tests.
    done = subprocess.run(
        [sys.executable, "-c", KILLED_TRACKER, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert "wandb is gone" in done.stderr


def test_resumed_metrics_take_the_last_record_of_a_step(tmp_path: Path) -> None:
    for losses in ({1: 3.0, 2: 2.0, 3: 9.0}, {3: 1.0, 4: 0.5}):
        log = MetricsLog(tmp_path, wandb_mode="off", project="p", name="n", config={}, run_id=None)
        for step, loss in losses.items():
            log.log(step, {"loss": loss})
        log.close()
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 5
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
        (4, 0.5),
    ]


def test_torn_lines_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    def write(step: int, loss: float) -> None:
        log = MetricsLog(tmp_path, wandb_mode="off", project="p", name="n", config={}, run_id=None)
        log.log(step, {"loss": loss})
        log.close()

    write(1, float("nan"))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    write(3, 0.5)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}, {"step": 3, "loss": 0.5}]


def test_wandb_offline_keeps_one_run_id_over_a_resume(tmp_path: Path) -> None:
    ids: list[str | None] = [None]
    for step in (1, 2):
        log = MetricsLog(
            tmp_path, wandb_mode="offline", project="p", name="n", config={"a": 1}, run_id=ids[-1]
        )
        log.log(step, {"loss": 1.0, "corrupt_keys": ["x"]})
        log.close()
        ids.append(log.run_id)
    assert ids[1] is not None and ids[1] == ids[2]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[1]}"))) >= 1


def test_grid_holds_images_and_metadata(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    for i in range(3):
        images[i, i] = 255
    path = tmp_path / "grid.png"
    image_grid([("", images)], ["red", "green", "blue"], path, side=40, metadata={"seed": "7"})
    sheet = Image.open(path)
    assert sheet.info["seed"] == "7"  # type: ignore[index]
    pixels = sheet.convert("RGB")
    centres = [pixels.getpixel((12 + 46 * i + 20, 26)) for i in range(3)]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_nearest_match_counts_captions_not_positions() -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    for i in range(4):
        images[i] = 60 * i
    captions = ["a", "b", "b", "c"]
    samples = torch.stack([images[0] + 5, images[2], images[0]])
    match = nearest_match(samples, ["a", "b", "c"], images, captions)
    assert (match.matches, match.nearest) == (2, (0, 2, 0))
    assert match.chance == pytest.approx((1 + 2 + 1) / 4 / 3)
    assert json.dumps(match.rate)
