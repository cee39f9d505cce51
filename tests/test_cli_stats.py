"""`dsr-scale stats`: the file whitens what training sees, shares join to the whole, nothing mixes."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from planted_vit import FIRST, SIDE, write_run
from safetensors import safe_open
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.cli.main import app
from dsr_scale.config.data import DataConfig
from dsr_scale.config.encoders import VitImage
from dsr_scale.config.load import load_run
from dsr_scale.data.plain_images import plain_images
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.register_file import RegisterFile, encoder_identity, save_register_file
from dsr_scale.encoders.whitening import load_whitening

TREATED = "encoders.image.outliers={kind: registers, neurons: registers.json}"


def _stats(*words: object) -> str:
    """Runs the command in this process; returns what it printed. Raises what it raises."""
    done = CliRunner().invoke(app, ["stats", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def _contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("mean", "variance")}
        return tensors, file.metadata()


def _assert_same(ours: Path, whole: Path) -> None:
    (tensors, metadata), (expected, wanted) = _contents(ours), _contents(whole)
    assert metadata == wanted
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run file and a folder of images, in a folder of their own that is the current one."""
    monkeypatch.chdir(tmp_path)
    run, pictures = write_run(tmp_path, statistics="statistics/vit.safetensors")
    image = load_run(run).encoders.image
    assert isinstance(image, VitImage)
    neurons = RegisterFile(*encoder_identity(image), neurons=FIRST, source="planted")
    save_register_file(tmp_path / "registers.json", neurons)
    return run, pictures


def test_whitened_latents_are_standard(run: tuple[Path, Path]) -> None:
    output = _stats(run[0])
    config = load_run(run[0])
    encoder = build_image_encoder(config.encoders.image, resolution=SIDE, device="cpu")
    images = plain_images(config.data)
    latents = torch.cat([encoder.encode(batch) for batch in images.batches(16)]).double()
    assert len(latents) == 40
    torch.testing.assert_close(latents.mean(dim=0), torch.zeros_like(latents[0]), rtol=0, atol=1e-3)
    # Whitening adds 1e-5 to variances, the smallest of which are below 1e-3 here.
    variance = latents.var(dim=0, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=4e-2)
    _, metadata = _contents(Path("statistics/vit.safetensors"))
    assert metadata["treatment"] == "none"
    assert metadata["fingerprint"] == images.fingerprint
    assert images.fingerprint in output


def test_shares_merge_to_the_whole(run: tuple[Path, Path]) -> None:
    config, pictures = run
    _stats(config, "--images", pictures, "--out", "whole.safetensors")
    for number in range(3):
        _stats(config, "--images", pictures, "--share", f"{number}/3")
    made = sorted(path.name for path in Path("statistics").iterdir())
    assert made == [f"vit.{number}-of-3.safetensors" for number in range(3)]
    with pytest.raises(InputError, match="of share 0/3"):
        load_whitening(
            load_run(config).encoders.image.model_copy(  # type: ignore[arg-type]
                update={"statistics": f"statistics/{made[0]}"}
            ),
            resolution=SIDE,
            device=torch.device("cpu"),
        )
    _stats(config, "--merge", "statistics")
    _assert_same(Path("statistics/vit.safetensors"), Path("whole.safetensors"))
    _stats(config, "--merge", "statistics", "--out", "again.safetensors")
    _assert_same(Path("again.safetensors"), Path("whole.safetensors"))


def test_incomplete_or_foreign_shares_are_refused(run: tuple[Path, Path]) -> None:
    config, pictures = run
    _stats(config, "--images", pictures, "--share", "1/2")
    with pytest.raises(InputError, match="also 0/2"):
        _stats(config, "--merge", "statistics")
    _stats(config, "--images", pictures, "--count", 8, "--share", "0/2")
    with pytest.raises(InputError, match="one data set"):
        _stats(config, "--merge", "statistics")
    _stats(config, TREATED, "--images", pictures, "--share", "0/2")
    with pytest.raises(InputError, match="registers shared"):
        _stats(config, "--merge", "statistics")
    with pytest.raises(InputError, match="i/n with 0 ≤ i < n"):
        _stats(config, "--share", "2/2")


def test_a_treated_run_refuses_untreated_statistics_and_the_reverse(
    run: tuple[Path, Path],
) -> None:
    config, pictures = run
    device = torch.device("cpu")
    untreated = load_run(config).encoders.image
    treated = load_run(config, [TREATED]).encoders.image
    assert isinstance(untreated, VitImage) and isinstance(treated, VitImage)

    _stats(config, "--images", pictures)
    assert load_whitening(untreated, resolution=SIDE, device=device) is not None
    with pytest.raises(InputError) as refused:
        load_whitening(treated, resolution=SIDE, device=device)
    assert "'treatment': 'none'" in refused.value.found
    assert "'treatment': 'registers shared" in refused.value.required

    plain, _ = _contents(Path("statistics/vit.safetensors"))
    _stats(config, TREATED, "--images", pictures)
    cleaned, _ = _contents(Path("statistics/vit.safetensors"))
    assert not torch.allclose(plain["mean"], cleaned["mean"], atol=1e-2)
    assert load_whitening(treated, resolution=SIDE, device=device) is not None
    with pytest.raises(InputError, match="'treatment': 'registers shared"):
        load_whitening(untreated, resolution=SIDE, device=device)


def test_what_cannot_work_is_refused(run: tuple[Path, Path], tmp_path: Path) -> None:
    config, pictures = run
    with pytest.raises(InputError, match="kind = pixels"):
        _stats(config, "encoders={image: {kind: pixels, patch: 8}, decoder: {kind: pixels}}")
    with pytest.raises(InputError, match="found: neither --out nor"):
        _stats(config, "encoders.image.statistics=null")
    with pytest.raises(InputError, match="required: 17 images"):
        _stats(config, "--images", pictures, "--count", 17)
    with pytest.raises(InputError, match="17 shares of 16 images"):
        _stats(config, "--images", pictures, "--share", "0/17")
    with pytest.raises(InputError, match="no folder that holds images"):
        _stats(config, "--images", tmp_path / "nowhere")
    with pytest.raises(InputError, match="a directory"):
        _stats(config, "--out", pictures)
    with pytest.raises(InputError, match="--device tpu"):
        _stats(config, "--device", "tpu")


def test_unusable_images_are_counted_and_named(run: tuple[Path, Path]) -> None:
    config, pictures = run
    _stats(config, "--images", pictures, "--out", "whole.safetensors")
    (pictures / "05a.png").write_bytes(b"no image")
    (pictures / "notes.txt").write_text("not among the images")
    output = " ".join(_stats(config, "--images", pictures, "--out", "rest.safetensors").split())
    assert "1 of 17 images unusable: 05a.png (not an image of a known format)" in output
    (rest, metadata), (whole, _) = map(
        _contents, (Path("rest.safetensors"), Path("whole.safetensors"))
    )
    assert metadata["count"] == "16"
    torch.testing.assert_close(rest["mean"], whole["mean"])
    for file in pictures.glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="no usable image among 17"):
        _stats(config, "--images", pictures, "--out", "none.safetensors")


def test_plain_images_are_spread_in_order_and_know_their_bytes(run: tuple[Path, Path]) -> None:
    _, pictures = run
    data = DataConfig(shards="package:emoji", resolution=SIDE)
    images = plain_images(data, folder=pictures, count=4)
    (batch,) = images.batches(10)
    for pixels, name in zip(batch, ("00", "04", "08", "12"), strict=True):
        stored = torch.tensor(Image.open(pictures / f"{name}.png").getdata(), dtype=torch.uint8)
        assert torch.equal(pixels.flatten(1).T, stored)
    before = images.fingerprint
    (same,) = images.batches(10)
    assert images.fingerprint == before and torch.equal(same, batch)
    shutil.copy(pictures / "01.png", pictures / "04.png")
    list(images.batches(3))
    assert images.fingerprint != before


def test_the_commands_in_the_documentation_run(run: tuple[Path, Path]) -> None:
    """Every `dsr-scale stats` of docs/encoders.md, on a small run file in place of the published."""
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    dsr-scale stats (.*)$", page, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = [str(run[0]) if word.endswith(".yaml") else word for word in shlex.split(command)]
        _stats(*words)
    assert Path("statistics/vit.safetensors").is_file()
