"""`plan`: its figures against arithmetic written here, without torch, for every shipped file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsr_scale
from dsr_scale.base.errors import InputError
from dsr_scale.cli.main import app
from dsr_scale.cli.plan import plan_report
from dsr_scale.cli.plan_decoder import decoder_report
from dsr_scale.config.checks import check_run
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.load import load_any_run, load_run
from dsr_scale.config.presets import with_preset

ROOT = Path(dsr_scale.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in CONFIGS]
XL = ROOT / "configs" / "published" / "dit_xl.yaml"


def devices_of(path: Path) -> int:
    """The number of GPUs that the file's opening comment speaks of."""
    found = re.search(r"each of (\d+) GPUs", path.read_text())
    return int(found.group(1)) if found else 1


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_shipped_file_loads_checks_and_plans(path: Path) -> None:
    devices = devices_of(path)
    run = load_any_run(path)
    check_run(run, devices=devices)
    if isinstance(run, DecoderRun):
        report = decoder_report(run, devices=devices)
    else:
        report = plan_report(run, devices=devices)
    opening = path.read_text().split("\n\n")[0]
    assert opening.startswith("# "), "a file opens with what it is"
    assert f"dsr-scale train {path.relative_to(ROOT)}" in opening or "make " in opening
    cost = re.search(
        r"Costs: ([\d.]+) M parameters, ([\d.]+) training GFLOPs per image, ([\d.]+) GiB", opening
    )
    if cost is not None:
        assert cost.group(1) == f"{report['parameters']['total'] / 1e6:.1f}"
        assert cost.group(2) == f"{report['training_flops_per_image'] / 1e9:.1f}"
        assert cost.group(3) == f"{report['memory_bytes_per_gpu']['total'] / 2**30:.1f}"


def test_figures_of_the_published_xl() -> None:
    report = plan_report(load_run(XL), devices=8)
    assert f"{report['forward_flops_per_image']['total'] / 1e9:.1f}" == "262.9"
    assert f"{report['training_flops_per_image'] / 1e9:.0f}" == "789"
    assert round(report["parameters"]["total"] / 1e6) == 677
    assert report["parameters"]["registers"] == 36 * 1152
    assert report["tokens"] == {
        "image": 256,
        "text": 0,
        "registers": 36,
        "register_start": 8,
        "longest_sequence": 292,
    }
    assert f"{report['timestep_shift']:.3f}" == "6.928"
    assert report["latent"] == {"channels": 768, "grid": [16, 16]}
    assert report["batch"] == {
        "global_images": 1024,
        "data_parallel": 8,
        "per_rank_images": 128,
        "microbatch_images": 32,
        "accumulation_steps": 4,
    }
    assert report["images_seen"] == 80 * 1251 * 1024
    assert report["config"]["model"]["width"] == 1152


def test_the_published_recipe_has_its_precision() -> None:
    for path in CONFIGS:
        if path.parent.name == "published":
            assert load_run(path).training.precision == "tf32"


def test_the_emoji_run_divides_over_the_usual_numbers_of_devices() -> None:
    run = load_run(ROOT / "configs" / "emoji_64.yaml")
    for devices in (1, 2, 4, 8):
        check_run(run, devices=devices)


def test_sums_are_sums() -> None:
    report = plan_report(load_run(XL), devices=8)
    for block in ("forward_flops_per_image", "memory_bytes_per_gpu"):
        values = dict(report[block])
        assert values.pop("total") == sum(values.values())
    parts = dict(report["parameters"])
    del parts["total_unpadded"]
    assert parts.pop("total") == sum(parts.values())


def test_images_per_second_only_where_there_is_ground_for_it() -> None:
    run = load_run(XL)
    assert plan_report(run, devices=8)["predicted_images_per_s"] == {}, "tf32"
    fast = load_run(XL, ["training.precision=bf16"])
    report = plan_report(fast, devices=8)
    expected = 8 * 0.5 * 790e12 / report["training_flops_per_image"]
    assert report["predicted_images_per_s"] == {"H200": pytest.approx(expected)}
    for override in ("training.compile=false", "model.preset=DiT-B"):
        slow = load_run(XL, ["training.precision=bf16", override])
        assert plan_report(slow, devices=8)["predicted_images_per_s"] == {}


@pytest.mark.parametrize("size", ["0_5b", "2_4b", "5_5b", "9_8b"])
def test_the_text_to_image_sizes_fit_eight_nodes_of_eight(size: str) -> None:
    path = ROOT / "configs" / "t2i" / f"query_adaln_{size}.yaml"
    run = load_run(path)
    assert devices_of(path) == 64
    assert f"srun --nodes 8 --ntasks-per-node 8 dsr-scale train {path.relative_to(ROOT)}" in (
        path.read_text()
    )
    check_run(run, devices=64)
    report = plan_report(run, devices=64)
    assert report["batch"]["global_images"] == 2048
    assert report["memory_bytes_per_gpu"]["total"] < 60 * 2**30, "room on 80 GB for the encoders"
    assert run.training.skip.spike_deviations == 6


def test_a_layout_is_told_in_full() -> None:
    dh = ROOT / "configs" / "published" / "dit_dh_xl.yaml"
    settings = ["parallel.tp=2", "parallel.sp=true", "parallel.pp=4", "parallel.offload=true"]
    report = plan_report(load_run(dh, settings), devices=16)
    assert report["layout"] == {
        "tp": 2,
        "pp": 4,
        "dp": 2,
        "sp": True,
        "virtual_stages": 1,
        "zero": 1,
        "offload": True,
        "recompute": "none",
    }
    stages = report["pipeline"]["stages"]
    assert [stage["blocks"] for stage in stages] == [[0, 10], [10, 19], [19, 28], [28, 30]]
    assert sum(stage["share"] for stage in stages) == pytest.approx(1)
    assert report["pipeline"]["bubble"] == 3 / (16 + 3)
    assert report["batch"]["accumulation_steps"] == 16
    assert report["memory_bytes_per_gpu"]["optimizer"] == 0 < report["host_memory_bytes_per_rank"]
    wire = dict(report["wire_bytes_per_step"])
    assert wire.pop("total") == sum(wire.values())
    assert report["predicted_images_per_s"] == {}
    assert json.loads(json.dumps(report)) == report
    printed = CliRunner().invoke(
        app, ["plan", str(dh), *settings, "--devices", "16"], env={"COLUMNS": "200"}
    )
    assert printed.exit_code == 0, printed.output
    for text in (
        "2 tensor × 4 pipeline × 2 data = 16 ranks, ZeRO-1, sequence parallel, optimizer on the host",
        "blocks 28 to 29 (2)",
        f"bubble {3 / 19:.1%}",
        "which needs the most",
        "wire per step: pipeline sent",
        f"{report['host_memory_bytes_per_rank'] / 2**30:,.3f} GiB of optimizer",
    ):
        assert text in printed.output, text


def test_figures_of_the_page_on_parallelism() -> None:
    """`# …: X GiB, balance B, bubble C %` above a command is what that command prints."""
    page = (ROOT / "docs" / "parallelism.md").read_text().replace("\\\n", " ")
    found = re.findall(r"# [^\n]*?: ([^\n]*GiB[^\n]*)\n +dsr-scale plan ([^\n]+)\n", page)
    assert len(found) == 4
    for figures, command in found:
        path, *settings = command.replace("--devices ", "--devices=").split()
        (devices,) = (int(s.split("=")[1]) for s in settings if s.startswith("--devices="))
        run = load_run(ROOT / path, [s for s in settings if not s.startswith("--")])
        check_run(run, devices=devices)
        report = plan_report(run, devices=devices)
        gib = [f"{report['memory_bytes_per_gpu']['total'] / 2**30:.1f}"]
        if report["host_memory_bytes_per_rank"]:
            gib.append(f"{report['host_memory_bytes_per_rank'] / 2**30:.1f}")
        assert re.findall(r"([\d.]+) GiB", figures) == gib
        if report["pipeline"]:
            assert f"balance {report['pipeline']['balance']:.3f}" in figures
            assert f"bubble {100 * report['pipeline']['bubble']:.1f} %" in figures


def test_a_pipeline_s_waiting_lowers_the_prediction() -> None:
    whole = plan_report(load_run(XL, ["training.precision=bf16"]), devices=8)
    parted = plan_report(load_run(XL, ["training.precision=bf16", "parallel.pp=4"]), devices=8)
    pipeline = parted["pipeline"]
    assert parted["predicted_images_per_s"]["H200"] == pytest.approx(
        whole["predicted_images_per_s"]["H200"] * pipeline["balance"] * (1 - pipeline["bubble"])
    )
    for override in ("parallel.tp=2", "parallel.offload=true"):
        run = load_run(XL, ["training.precision=bf16", override])
        assert plan_report(run, devices=8)["predicted_images_per_s"] == {}
    full = load_run(XL, ["training.precision=bf16", "training.recompute=full"])
    assert plan_report(full, devices=8)["predicted_images_per_s"]["H200"] == pytest.approx(
        whole["predicted_images_per_s"]["H200"] * 3 / 4
    )


def test_epochs_from_a_manifest_or_an_index(tmp_path: Path) -> None:
    def samples_of(*settings: str) -> int | None:
        run = load_run(XL, [f"data.shards={tmp_path}", *settings])
        return plan_report(run, devices=1)["samples"]

    assert samples_of() is None
    index = {"version": 2, "shards": [{"samples": 600}, {"samples": 681}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert samples_of() == 1281
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": 2562}))
    assert samples_of() == 2562
    assert samples_of("data.max_samples=1000") == 1000
    run = load_run(XL, [f"data.shards={tmp_path}"])
    assert plan_report(run, devices=1)["epochs"] == run.training.steps * 1024 / 2562
    (tmp_path / "manifest.json").write_text("{broken")
    assert samples_of() is None


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="data-parallel ranks = 3"):
        plan_report(load_run(XL), devices=3)


def test_the_note_on_narrow_models() -> None:
    narrow = load_run(ROOT / "configs" / "published" / "dit_s.yaml")
    assert any("384 wide" in note for note in plan_report(narrow, devices=8)["notes"])
    wide = load_run(XL, ["model.preset=DiT-DH-S"])
    assert not any("narrower" in note for note in plan_report(wide, devices=8)["notes"])


def test_printed_text_and_json_agree() -> None:
    arguments = ["plan", str(XL), "training.precision=bf16", "--devices", "8"]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    parsed = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(parsed.output)
    assert report["config"]["training"]["precision"] == "bf16"
    for number in (
        f"{report['parameters']['total']:,}",
        f"{report['parameters']['AdaLN']:,}",
        f"{report['forward_flops_per_image']['total'] / 1e9:.1f} GFLOPs",
        f"{report['memory_bytes_per_gpu']['total'] / 2**30:,.3f} GiB",
        "8 data-parallel ranks × 32 per micro-batch × 4 accumulated (128 per rank)",
        "36 registers from block 8",
        f"{report['images_seen']:,}",
        "predicted on 8 × H200",
        f"width={with_preset(load_run(XL).model).width}",
    ):
        assert number in printed.output, number


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_plan_runs_where_torch_cannot_be_imported(flags: list[str]) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'diffusers'):\n"
        "            raise ImportError(f'{name} is not to be imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from dsr_scale.cli.main import run\n"
        f"sys.argv = ['dsr-scale', 'plan', {str(XL)!r}, 'parallel.pp=2', '--devices', '8', "
        f"*{flags!r}]\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "676,994,688" in done.stdout or '"total": 676994688' in done.stdout, done.stdout
