"""`dsr-scale outliers`: its numbers against a network walked through by hand, and what it refuses."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from planted_vit import FIRST, GRID, SECOND, coloured_images, planted_config, write_run
from tiny_bundles import PATCH, SIDE, TEXT_LENGTH, write_tiny_bundle
from tiny_runs import run_training, write_config
from torch import Tensor
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.cli.outliers import outliers
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.pack import pack
from dsr_scale.data.transforms import cover_and_crop, decode_rgb
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.register_file import RegisterFile, encoder_identity, save_register_file
from dsr_scale.evaluate.outlier_findings import Findings, load_findings
from dsr_scale.export.bundle import export_run, read_description, read_model
from dsr_scale.model.block import Block
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import rotate

app = typer.Typer()
app.command()(outliers)
SHIFT = 1.5
"""Of the tiny bundle."""


def measured(*words: object) -> tuple[list[Findings], str]:
    """Runs the command in this process, into `report`; raises what it raises."""
    arguments = [*map(str, words), "--device", "cpu", "--out", "report"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return load_findings(Path("report")), done.output


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Findings], Path]]:
    """What reports were asked for; they are drawn, and tested, elsewhere."""
    asked: list[tuple[list[Findings], Path]] = []

    def note(findings: list[Findings], out: Path) -> Path:
        asked.append((findings, out))
        return out / "report.html"

    monkeypatch.setattr("dsr_scale.evaluate.outlier_report.write_report", note)
    return asked


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bundle conditioned on captions, one on classes, a run file and nothing else."""
    folder = tmp_path_factory.mktemp("places")
    write_tiny_bundle(folder / "bundle")
    write_tiny_bundle(folder / "classes", classes=True)
    write_config(folder)
    (folder / "empty").mkdir()
    return folder


# A diffusion transformer.


class Walk:
    """Norms and attention of a tiny bundle's network at one time, image by image, in float64."""

    def __init__(self, bundle: Path, count: int, time: float, seed: int) -> None:
        description = read_description(bundle)
        model = read_model(bundle, description, torch.device("cpu"))
        assert isinstance(model, DiT)
        data = DataConfig(shards="package:emoji", resolution=SIDE)
        samples = open_samples(data)
        self.norms: dict[str, list[np.ndarray]] = {"blocks.0": [], "blocks.1": [], "output": []}
        self.attention: dict[str, list[np.ndarray]] = {"blocks.0": [], "blocks.1": []}
        for sample_id in (number * len(samples) // count for number in range(count)):
            sample = samples.read(sample_id)
            pixels = cover_and_crop(
                decode_rgb(sample.image, (255, 255, 255), (SIDE, SIDE)), (SIDE, SIDE)
            )
            x = torch.from_numpy(pixels).double() / 127.5 - 1
            self._walk(model, sample.captions[0].text, x, sample_id, time, seed)

    def _walk(
        self, model: DiT, caption: str, pixels: Tensor, sample_id: int, time: float, seed: int
    ) -> None:
        patches = torch.nn.functional.pixel_unshuffle(pixels[None], PATCH).float()
        noise = draw_noise(
            (3 * PATCH**2, SIDE // PATCH, SIDE // PATCH),
            seed,
            [0],
            [sample_id],
            "cpu",
            purpose="outliers",
        )
        letters = torch.tensor([list(caption.encode()[:TEXT_LENGTH])])
        condition = Condition(
            null=torch.tensor([False]), tokens=letters, mask=torch.ones_like(letters).bool()
        )
        handles = []
        for index in range(2):
            block = model.blocks[str(index)]
            assert isinstance(block, Block)
            handles.append(
                block.register_forward_hook(self._keep_norms(f"blocks.{index}", 4 * index))
            )
            handles.append(block.attn.register_forward_pre_hook(self._keep_attention(index)))
        handles.append(model.final_layer.register_forward_hook(self._keep_norms("output", 0)))
        model((1 - time) * patches + time * noise, torch.tensor([time]), condition)
        for handle in handles:
            handle.remove()

    def _keep_norms(self, name: str, registers: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.norms[name].append(output[0].double().norm(dim=-1).numpy()[registers:])

        return hook

    def _keep_attention(self, index: int) -> Any:
        def hook(attention: Any, inputs: Any) -> None:
            x, cos, sin, _mask = inputs
            heads = []
            q, k, _ = attention.qkv(x[0]).reshape(len(x[0]), 3, 2, 16).permute(1, 2, 0, 3)
            for head in range(2):
                turned_q = rotate(q[head][None, None], cos, sin)[0, 0].double()
                turned_k = rotate(k[head][None, None], cos, sin)[0, 0].double()
                heads.append((turned_q @ turned_k.T / math.sqrt(16)).softmax(-1).numpy())
            self.attention[f"blocks.{index}"].append(np.stack(heads))

        return hook


def test_a_bundle_is_measured_as_a_walk_through_it(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    (found,), output = measured(
        bundle, "--data", "package:emoji", "--images", 6, "--batch", 4, "--seed", 5,
        "--timesteps", "0.25,0.75", "--threshold", 7,
    )  # fmt: skip
    assert found.blocks == ("blocks.0", "blocks.1", "output")
    assert found.settings["step"] == 1 and found.settings["weights"] == "raw"
    for step, time in enumerate((0.25, 0.75)):
        assert found.timesteps[step].model == time
        preshift = time / (SHIFT - (SHIFT - 1) * time)
        assert found.timesteps[step].preshift == pytest.approx(preshift)
        walk = Walk(bundle, 6, time, seed=5)
        for place, block in enumerate(found.blocks):
            norms = np.stack(walk.norms[block])
            median = np.sort(norms, axis=1)[:, (norms.shape[1] - 1) // 2]

            def value(name: str, place: int = place, step: int = step) -> float:
                return float(found.measures[name][place, step])

            assert value("median_norm") == pytest.approx(median.mean(), rel=1e-4)
            ratio = norms.max(axis=1) / median
            assert value("max_over_median") == pytest.approx(ratio.mean(), rel=1e-4)
            error = ratio.std(ddof=1) / math.sqrt(6)
            assert found.errors["max_over_median"][place, step] == pytest.approx(error, rel=1e-3)
            assert value("outlier_ratio_absolute") == pytest.approx((norms > 7).mean())
        # Registers are in the second block alone, where image tokens are the queries.
        attention = np.stack(walk.attention["blocks.1"])[:, :, 4:]
        assert attention.shape == (6, 2, 16, 20)
        share = found.measures["attention_registers"]
        to_registers = attention[..., :4].sum(-1).mean()
        assert share[1, step] == pytest.approx(to_registers, rel=1e-4)
        assert np.isnan(share[[0, 2], step]).all()
        entropy = -(attention * np.log(attention)).sum(-1).mean() / math.log(20)
        assert found.measures["attention_entropy"][1, step] == pytest.approx(entropy, rel=1e-4)
        received = np.stack(walk.attention["blocks.0"]).mean(axis=(1, 2)) * 16
        for kept in found.received_maps[0, step].reshape(-1, 16):
            assert np.abs(received - kept).max(axis=1).min() < 1e-4
    assert "0.75" in output and "blocks.1" in output


def test_times_before_the_shift_and_two_targets(
    tmp_path: Path, reports: list[tuple[list[Findings], Path]]
) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    same = write_tiny_bundle(tmp_path / "same")
    found, output = measured(
        bundle, "--against", same, "--data", "package:emoji", "--images", 3,
        "--time", "preshift", "--timesteps", "0.5",
    )  # fmt: skip
    assert [one.name for one in found] == ["bundle", "same"]
    for one in found:
        assert one.timesteps[0].preshift == 0.5
        assert one.timesteps[0].model == pytest.approx(SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5))
    # The same weights, images and noise.
    np.testing.assert_array_equal(found[0].norm_maps, found[1].norm_maps)
    assert "same" in output and "→ report/report.html" in output
    [(asked, out)] = reports
    assert [one.name for one in asked] == ["bundle", "same"] and out == Path("report")


def test_targets_of_one_name_are_told_apart(places: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bundle").symlink_to(write_tiny_bundle(tmp_path / "kept" / "bundle"))
    words = ("--data", "package:emoji", "--images", 2, "--timesteps", "0.5")
    found, _ = measured(places / "bundle", "--against", "other/bundle", *words)
    assert [one.name for one in found] == ["bundle", "bundle (other/bundle)"]


def test_a_network_that_puts_out_nan_has_no_outlier_ratio(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> torch.nn.Module:
        model = read_model(*arguments)
        with torch.no_grad():
            model.get_parameter("blocks.1.mlp.w3.bias")[0] = math.nan
        return model

    monkeypatch.setattr("dsr_scale.evaluate.outlier_targets.read_model", broken)
    words = ("--data", "package:emoji", "--images", 2, "--timesteps", "0.5")
    with pytest.raises(InputError, match=r"in 2 of 2 images after blocks\.1, timestep 1"):
        measured(places / "bundle", *words)
    assert not (tmp_path / "report" / "outliers.json").exists()


def test_a_run_its_checkpoint_and_its_export_agree(tmp_path: Path) -> None:
    run = run_training(tmp_path)
    export_run(run, tmp_path / "bundle")
    words = ("--images", 4, "--timesteps", "0.3")
    (newest, first), _ = measured(run, "--against", run / "checkpoints" / "step_00000003", *words)
    assert [newest.settings["step"], first.settings["step"]] == [6, 3]
    assert newest.settings["weights"] == "ema_9"
    assert newest.settings["data"] == "package:emoji"
    (bundle,), _ = measured(tmp_path / "bundle", "--data", "package:emoji", *words)
    assert bundle.timesteps == newest.timesteps
    # The run reads 20 samples of the pack, the bundle all of it.
    assert bundle.settings["data_fingerprint"] != newest.settings["data_fingerprint"]
    (again,), _ = measured(run, "--data", "package:emoji", *words)
    for name, grid in bundle.measures.items():
        np.testing.assert_allclose(again.measures[name], grid, rtol=1e-6, err_msg=name)
    assert not np.array_equal(newest.norm_maps, first.norm_maps)


# An encoder.


def test_an_encoder_is_measured_before_and_after_its_treatment(tmp_path: Path) -> None:
    neurons = tmp_path / "neurons.json"
    vit = planted_config(tmp_path / "vit")
    file = RegisterFile(*encoder_identity(vit), {**FIRST, **SECOND}, source="planted")
    save_register_file(neurons, file)
    run, pictures = write_run(tmp_path, outliers={"kind": "registers", "neurons": str(neurons)})
    for picture in pictures.glob("*.png"):
        picture.with_suffix(".txt").write_text("a picture")
    pack(str(pictures), tmp_path / "shards")
    (before, after), _ = measured(run, "--data", tmp_path / "shards", "--images", 16)

    assert [before.name, after.name] == ["vit, untreated", "vit, registers"]
    assert before.timesteps == () and before.measures["outlier_ratio"].shape == (7, 1)
    assert before.grid == (GRID, GRID)
    _, red, blue = coloured_images(16)
    ratio = before.measures["outlier_ratio"][:, 0]
    np.testing.assert_allclose(ratio[0], 0, atol=1e-9)
    np.testing.assert_allclose(ratio[1:4], float(red.float().mean()), rtol=1e-5)
    np.testing.assert_allclose(ratio[4:6], float((red | blue).float().mean()), rtol=1e-5)
    assert after.measures["outlier_ratio"].max() == 0
    assert np.isnan(before.measures["register_over_median"]).all()
    assert after.measures["register_over_median"][5, 0] > 3
    assert np.isfinite(after.measures["attention_registers"][:6, 0]).all()
    # Where outliers were, image by image: the maps are of the first images in the seed's order.
    shares = before.position_shares[5, 0].ravel()
    np.testing.assert_allclose(shares, (red | blue).float().mean(0).numpy(), atol=1e-6)
    # An outlier forgot its place and its pixels.
    probe = before.measures
    assert probe["neighbour_cosine_outliers"][5, 0] < probe["neighbour_cosine_normal"][5, 0]


def test_a_directory_of_weights_is_an_encoder_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path)
    (found,), output = measured(tmp_path / "vit", "--data", "package:emoji", "--images", 4)
    assert found.name == "vit, untreated" and found.kind == "encoder"
    assert found.grid == (GRID, GRID)
    assert "attention" in output and "blocks.5" in output


# What it refuses, before any weights are read.


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for name in ("read_model", "load_checkpoint_weights", "VitEncoder"):
        monkeypatch.setattr(f"dsr_scale.evaluate.outlier_targets.{name}", refuse)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bundle",), "no --data"),
        (("bundle", "--data", "package:emoji", "--images", "99999"), "99999 samples"),
        (("bundle", "--data", "package:emoji", "--timesteps", "0.1,2"), "--timesteps 0.1,2"),
        (("bundle", "--data", "package:emoji", "--timesteps", "half"), "--timesteps half"),
        (("bundle", "--data", "package:emoji", "--timesteps", "0.5,0.5"), "different numbers"),
        (("classes", "--data", "package:emoji"), "no class"),
        (("empty", "--data", "package:emoji"), "nothing that can be measured"),
        (("missing/place/of/something", "--data", "package:emoji"), "missing/place"),
        (("tiny.yaml",), "kind is pixels"),
        (("bundle", "--against", "empty", "--data", "package:emoji"), "nothing that can be"),
        (("bundle", "--data", "package:emoji", "--device", "tpu"), "--device tpu"),
    ],
)
def test_bad_input_is_refused_at_once(
    words: tuple[str, ...], message: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    device = () if "--device" in words else ("--device", "cpu")
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, [*words, *device], catch_exceptions=False)


@pytest.mark.usefixtures("unread")
def test_without_matplotlib_it_is_refused_at_once(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what makes its import fail
    for name in ("report", "sections", "maps", "figures"):
        monkeypatch.delitem(sys.modules, f"dsr_scale.evaluate.outlier_{name}", raising=False)
    words = [str(places / "bundle"), "--data", "package:emoji", "--device", "cpu"]
    with pytest.raises(InputError, match=r"pip install 'dsr-scale\[train\]'") as refused:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert refused.value.found == "no package matplotlib"
    assert not (tmp_path / "outliers").exists()
