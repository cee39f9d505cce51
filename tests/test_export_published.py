"""Released checkpoints become bundles and training checkpoints that compute the same, and come back."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published_forward import Published, Stack, forward, random_state
from test_encoders_autoencoders import GRID, RESOLUTION, WIDTH, _rae
from torch import Tensor
from typer.testing import CliRunner

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import VitImage
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.whitening import load_whitening
from dsr_scale.export.bundle import read_description, read_model
from dsr_scale.export.pipeline import load
from dsr_scale.export.published import (
    Unstated,
    check_published,
    from_published,
    infer_shape,
    to_published,
)
from dsr_scale.export.published_settings import SETTINGS, Setting
from dsr_scale.model.conditioning import Condition
from tools.import_published import app

BODY = Stack(width=56, depth=5, heads=2)
HEAD = Stack(width=80, depth=2, heads=4)
SAME = Stack(width=56, depth=2, heads=7)
"""Hidden widths of the SwiGLU: 149 and 213."""
RULE = 2
"""ceil(2·5/7)."""

NETWORKS = {
    "DiT": Published(BODY),
    "DiT, registers": Published(BODY, registers=4, start=RULE),
    "DiT, registers from the first block": Published(BODY, registers=9, start=0),
    "DiT, patch 2": Published(BODY, registers=4, start=RULE, patch=2, side=8),
    "DiT, q and k normed": Published(BODY, registers=4, start=RULE, qk_norm=True),
    "DDT": Published(BODY, HEAD),
    "DDT, registers": Published(BODY, HEAD, registers=4, start=RULE),
    "DDT, registers from the fourth block": Published(BODY, HEAD, registers=9, start=3),
    "DDT, patch 2": Published(BODY, HEAD, registers=4, start=RULE, patch=2, side=8),
    "DDT, q and k normed": Published(BODY, HEAD, registers=4, start=RULE, qk_norm=True),
    "DDT, head as wide as the body": Published(BODY, SAME, registers=4, start=RULE),
    "DDT, one wide block in the head": Published(
        BODY, Stack(width=56, depth=1, heads=7), registers=4, start=RULE
    ),
}


def options_of(net: Published) -> list[str]:
    """What the file of this network does not say."""
    options = []
    if net.registers and net.start != RULE:
        options += ["--register-start", str(net.start)]
    if net.head is not None and net.head.width == net.body.width and net.head.depth != 2:
        options += ["--head-depth", str(net.head.depth)]
    return options


def run_tool(*arguments: object) -> str:
    """What it said; raises what it raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def given_encoder(
    net: Published, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Path:
    """Adds the encoder `tiny` that fits the network; returns the file of its statistics."""
    image = VitImage(model="a/vit", channels=net.channels, patch=4, input_size=4 * net.side)
    setting = Setting(image, "a/decoder", "data", **changes)
    monkeypatch.setitem(SETTINGS, "tiny", setting)
    return statistics_for(folder, (net.channels, net.side, net.side))


def statistics_for(folder: Path, sizes: tuple[int, int, int]) -> Path:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(1, *sizes, generator=generator)
    torch.save({"mean": mean, "var": mean[0].square() * 3}, folder / "stat.pt")
    out = folder / "statistics.safetensors"
    run_tool("statistics", folder / "stat.pt", out, "--encoder", "tiny", "--images", 100)
    return out


def inputs(net: Published) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(3, net.channels, net.side, net.side, generator=generator)
    return latents, torch.tensor([0.05, 0.6, 1.0]), torch.tensor([2, net.classes, 0])


def assert_computes(model: Any, net: Published, state: dict[str, Tensor]) -> None:
    """The network gives what the released one gives, null class included."""
    latents, t, rows = inputs(net)
    null = rows == net.classes
    with torch.no_grad():
        ours = model(latents, t, Condition(null=null, labels=rows.where(~null, 1)))
    expected = forward(state, net, latents, t, rows)
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def assert_same_state(ours: dict[str, Tensor], released: dict[str, Tensor]) -> None:
    """Bit for bit what was learned; positions as exactly as two programs compute them."""
    assert ours.keys() == released.keys()
    for name, value in released.items():
        if "pos_embed" in name or "freqs_" in name:
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
        else:
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bundle_computes_as_released_and_comes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = NETWORKS[name]
    model, ema = random_state(net, 0), random_state(net, 1)
    statistics = given_encoder(net, tmp_path, monkeypatch)
    torch.save({"model": model, "ema": ema, "step": 12, "epoch": 3}, tmp_path / "ep-3.pt")
    options = ["--encoder", "tiny", "--statistics", statistics, *options_of(net)]
    kinds = {"ema": ema}
    if name == "DDT, registers":
        kinds["model"] = model
    for kind, state in kinds.items():
        out = tmp_path / kind
        wanted = [] if kind == "ema" else ["--weights", kind]
        run_tool("bundle", tmp_path / "ep-3.pt", out, *options, *wanted)
        description = read_description(out)
        network = read_model(out, description, torch.device("cpu"))
        assert description.shape.register_start == (net.start if net.registers else RULE)
        assert_computes(network, net, state)
        run_tool("export", out, tmp_path / f"{kind}.pt")
        released = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert released["step"] == 12
        assert_same_state(released["model"], state)
        assert_same_state(released["ema"], state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_and_bare_state_dicts(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = NETWORKS["DDT, registers"]
    state = random_state(net, 0)
    statistics = given_encoder(net, tmp_path, monkeypatch)
    wrapped = {prefix + name: value for name, value in state.items()}
    for number, content in enumerate((wrapped, {"ema": wrapped})):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=number == 0)
        run_tool(
            *("bundle", tmp_path / "file.pt", tmp_path / "out"),
            *("--encoder", "tiny", "--statistics", statistics),
        )
        description = read_description(tmp_path / "out")
        assert description.provenance.weights == ("raw" if number == 0 else "ema")
        network = read_model(tmp_path / "out", description, torch.device("cpu"))
        assert_computes(network, net, state)


def test_every_key_that_does_not_fit_is_named() -> None:
    net = NETWORKS["DDT, registers"]
    state = random_state(net, 0)
    shape = infer_shape(state, Unstated())
    assert check_published(state, shape, "a file") < 1e-6
    wrong = copy.copy(state)
    del wrong["blocks.3.mlp.w12.bias"], wrong["final_layer.linear.bias"]
    wrong["blocks.1.attn.k_bias"] = torch.zeros(1)
    wrong["blocks.6.mlp.w3.weight"] = state["blocks.6.mlp.w3.weight"].T
    wrong["y_embedder.embedding_table.weight"] = torch.zeros(8, 56, dtype=torch.int64)
    wrong["pos_embed"] = state["pos_embed"].roll(28, dims=2)
    wrong["dec_register_pos_embed"] = state["dec_register_pos_embed"] * math.nan
    wrong["enc_feat_rope.freqs_cos"] = state["enc_feat_rope.freqs_cos"] + 2e-5
    with pytest.raises(InputError) as refused:
        check_published(wrong, shape, "a file")
    for part in [
        "a file: ",
        "blocks.3.mlp.w12.bias is missing",
        "final_layer.linear.bias is missing",
        "blocks.1.attn.k_bias is unknown",
        "blocks.6.mlp.w3.weight is torch.float32 [213, 80], not floating [80, 213]",
        "y_embedder.embedding_table.weight is torch.int64",
        "pos_embed differs by up to",
        "dec_register_pos_embed differs by up to nan",
        "enc_feat_rope.freqs_cos differs by up to 2e-05",
    ]:
        assert part in refused.value.found
    assert refused.value.found.count(";") == 7


def test_sizes_that_cannot_be_told_are_refused() -> None:
    state = random_state(NETWORKS["DiT, registers"], 0)
    for missing, message in [
        ("x_embedder.proj.weight", "no x_embedder.proj.weight"),
        ("pos_embed", "no pos_embed"),
        ("y_embedder.embedding_table.weight", "no y_embedder"),
        ("feat_rope.freqs_cos", "give it: --heads"),
    ]:
        with pytest.raises(InputError, match=message):
            infer_shape({k: v for k, v in state.items() if k != missing}, Unstated())
    with pytest.raises(InputError, match=r"registers\.start = 5 in a body of 5"):
        infer_shape(state, Unstated(register_start=5))
    # Another number of heads is another rotary table.
    with pytest.raises(InputError, match=r"freqs_cos is .*\[16, 28\], not floating \[16, 8\]"):
        check_published(state, infer_shape(state, Unstated(heads=7)), "a file")


def test_rotary_tables_may_be_left_out_when_the_heads_are_known() -> None:
    net = NETWORKS["DDT, registers"]
    state = random_state(net, 0)
    bare = {name: value for name, value in state.items() if "freqs_" not in name}
    shape = infer_shape(bare, Unstated(heads=2, head_heads=4))
    assert shape == infer_shape(state, Unstated())
    check_published(bare, shape, "a file")
    bare["enc_feat_rope.freqs_cos"] = state["enc_feat_rope.freqs_cos"]
    with pytest.raises(InputError, match=r"enc_feat_rope\.freqs_sin is missing"):
        check_published(bare, shape, "a file")


def test_networks_without_a_released_form_are_not_exported() -> None:
    state = random_state(NETWORKS["DiT, registers"], 0)
    shape = infer_shape(state, Unstated())
    ours = from_published(state, shape)
    for changes, message in [
        ({"registers": 6}, "a square number of registers"),
        ({"grid": (4, 8)}, "a square latent grid"),
        ({"registers_masked": True}, "registers that all tokens see"),
        ({"attention_variant": "gated"}, "plain attention"),
    ]:
        with pytest.raises(InputError, match=f"without {message}"):
            to_published(ours, shape.model_copy(update=changes))
    for name in ("blocks.0.mlp.w12.bias", "blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"):
        touched = ours[name].clone()
        touched[149 if "w12" in name else (slice(None), 149)] = 1e-3
        with pytest.raises(InputError, match=f"{name} with values in its padding"):
            to_published({**ours, name: touched}, shape)


def test_averages_of_fixed_positions_have_drifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the released trainer does to its average in every step, until it rests."""
    net = NETWORKS["DiT, registers"]
    ema = random_state(net, 0)
    exact = ema["pos_embed"]
    for _ in range(4000):
        ema["pos_embed"] = ema["pos_embed"].mul(0.9999).add_(exact, alpha=1 - 0.9999)
    statistics = given_encoder(net, tmp_path, monkeypatch)
    torch.save({"ema": ema}, tmp_path / "file.pt")
    options = ["--encoder", "tiny", "--statistics", statistics]
    said = run_tool("bundle", tmp_path / "file.pt", tmp_path / "out", *options)
    drift = float((ema["pos_embed"] - exact).abs().max())
    assert 1e-5 < drift < 2e-4
    assert f"differ by up to {drift:.1g} from exact ones" in " ".join(said.split())
    ema["pos_embed"] = exact * 0.999
    with pytest.raises(InputError, match=r"pos_embed differs by up to 0\.001"):
        check_published(ema, infer_shape(ema, Unstated()), "a file")


def test_statistics_whiten_as_the_released_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = NETWORKS["DiT"]
    path = given_encoder(net, tmp_path, monkeypatch)
    image = SETTINGS["tiny"].image.model_copy(update={"statistics": str(path)})
    whitening = load_whitening(image, resolution=256, device=torch.device("cpu"))
    assert whitening is not None
    stat = torch.load(tmp_path / "stat.pt", weights_only=True)
    latents = inputs(net)[0]
    released = (latents - stat["mean"]) / torch.sqrt(stat["var"] + 1e-5)
    torch.testing.assert_close(whitening.apply(latents), released, atol=1e-5, rtol=1e-5)
    for content, message in [
        ({"mean": stat["mean"]}, "var is NoneType"),
        ({"mean": stat["mean"][0, :2], "var": stat["var"]}, r"mean is \[2, 4, 4\]"),
        ({"mean": stat["mean"], "var": -stat["var"]}, "var below 0"),
    ]:
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(InputError, match=message):
            run_tool("statistics", tmp_path / "wrong.pt", tmp_path / "o", "--encoder", "tiny")
    # Statistics of another encoder do not get into a bundle.
    torch.save(random_state(net, 0), tmp_path / "file.pt")
    other = image.model_copy(update={"model": "another/vit"})
    monkeypatch.setitem(SETTINGS, "tiny", Setting(other, None, "data"))
    with pytest.raises(InputError, match="another/vit"):
        run_tool(
            *("bundle", tmp_path / "file.pt", tmp_path / "out"),
            *("--encoder", "tiny", "--statistics", path),
        )
    assert not (tmp_path / "out").exists()


def test_images_of_a_class_through_a_released_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A released network, statistics and an `AutoencoderRAE` draw what the three do by hand."""
    rae = _rae(tmp_path)
    net = Published(BODY, HEAD, registers=4, start=RULE, channels=WIDTH, side=GRID)
    image = VitImage(model="a/vit", channels=WIDTH, patch=14, input_size=14 * GRID)
    decoder = str(tmp_path / "rae")
    monkeypatch.setitem(SETTINGS, "tiny", Setting(image, decoder, "velocity", RESOLUTION))
    statistics = statistics_for(tmp_path, (WIDTH, GRID, GRID))
    state = random_state(net, 0)
    torch.save(state, tmp_path / "stage2_model.pt")
    run_tool(
        *("bundle", tmp_path / "stage2_model.pt", tmp_path / "out"),
        *("--encoder", "tiny", "--statistics", statistics),
    )
    description = read_description(tmp_path / "out")
    assert description.diffusion.prediction == "velocity"
    shift = math.sqrt(WIDTH * GRID * GRID / 4096)
    assert description.timestep_shift == pytest.approx(shift)
    sampling = description.sampling.model_copy(update={"steps": 3})
    pipeline = load(tmp_path / "out", device="cpu")
    latents = pipeline.latents(["3"], seed=0, sampling=sampling)

    stat = torch.load(tmp_path / "stat.pt", weights_only=True)
    x = draw_noise((WIDTH, GRID, GRID), 0, [0], [0], torch.device("cpu"), purpose="sample").double()
    grid = [u * shift / (1 + (shift - 1) * u) for u in (1, 2 / 3, 1 / 3, 0)]
    for t, after in itertools.pairwise(grid):
        v = forward(state, net, x, torch.tensor([t]), torch.tensor([3]))
        x = x + (after - t) * v
    scale = x.abs().max()
    torch.testing.assert_close(latents.double() / scale, x / scale, atol=1e-4, rtol=0)
    tokens = latents * torch.sqrt(stat["var"] + 1e-5) + stat["mean"]
    with torch.no_grad():
        patches = rae.decoder(tokens.flatten(2).transpose(1, 2)).logits
    images = rae.decoder.unpatchify(patches) * rae.encoder_std + rae.encoder_mean
    drawn = pipeline.sample(["3"], seed=0, sampling=sampling)
    expected = (images * 255).round().clamp(0, 255)
    assert (drawn.float() - expected).abs().max() <= 1


def test_released_settings() -> None:
    """Facts of the released recipes: latents, shift, output, registers of the encoder."""
    facts = {
        "siglip2-b": ((768, 16, 16), 6.928, "data", "none"),
        "siglip2-b-registers": ((768, 16, 16), 6.928, "data", "registers"),
        "siglip2-so400m": ((1152, 16, 16), 6.928, "data", "none"),
        "siglip2-so400m-registers": ((1152, 16, 16), 6.928, "data", "registers"),
        "dinov2-b": ((768, 16, 16), 6.928, "velocity", "none"),
        "dinov2-b-512": ((768, 32, 32), 13.856, "velocity", "none"),
    }
    assert {
        name: (s.latents, round(s.timestep_shift(), 3), s.prediction, s.image.outliers.kind)
        for name, s in SETTINGS.items()
    } == facts


def test_the_command_on_files(tmp_path: Path) -> None:
    """A published encoder's sizes; and the program itself, where mistakes end with status 2."""
    net = Published(Stack(24, 2, 2), channels=768, side=16)
    state = random_state(net, 0)
    torch.save({"ema": state}, tmp_path / "file.pt")
    stat = {"mean": torch.zeros(768, 16, 16), "var": torch.ones(768, 16, 16)}
    torch.save(stat, tmp_path / "stat.pt")
    statistics = tmp_path / "statistics.safetensors"
    run_tool("statistics", tmp_path / "stat.pt", statistics, "--encoder", "dinov2-b")
    options = ["--encoder", "dinov2-b", "--statistics", statistics]
    run_tool("bundle", tmp_path / "file.pt", tmp_path / "out", *options)
    description = read_description(tmp_path / "out")
    assert description.encoders.decoder.model == "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"  # type: ignore[union-attr]
    assert_computes(read_model(tmp_path / "out", description, torch.device("cpu")), net, state)
    program = Path(__file__).parent.parent / "tools" / "import_published.py"
    arguments = ["bundle", tmp_path / "stat.pt", tmp_path / "other", *options]
    command = [sys.executable, str(program), *map(str, arguments)]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert wrong.returncode == 2
    assert "found: no x_embedder.proj.weight" in wrong.stderr
    assert "Traceback" not in wrong.stderr
