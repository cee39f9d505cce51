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
from dsr_scale.cli.plan import plan_report, sample_count
from dsr_scale.config.checks import check_run
from dsr_scale.config.load import load_run
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
    run = load_run(path)
    check_run(run, data_parallel=devices)
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
        check_run(run, data_parallel=devices)


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


def test_epochs_from_a_manifest_or_an_index(tmp_path: Path) -> None:
    run = load_run(XL, [f"data.shards={tmp_path}"])
    assert sample_count(run) is None
    index = {"version": 2, "shards": [{"samples": 600}, {"samples": 681}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert sample_count(run) == 1281
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": 2562}))
    assert sample_count(run) == 2562
    assert plan_report(run, devices=1)["epochs"] == run.training.steps * 1024 / 2562
    some = load_run(XL, [f"data.shards={tmp_path}", "data.max_samples=1000"])
    assert sample_count(some) == 1000
    (tmp_path / "manifest.json").write_text("{broken")
    assert sample_count(run) is None


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
        "8 ranks × 32 per micro-batch × 4 accumulated (128 per rank)",
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
        f"sys.argv = ['dsr-scale', 'plan', {str(XL)!r}, '--devices', '8', *{flags!r}]\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "676,994,688" in done.stdout or '"total": 676994688' in done.stdout, done.stdout
