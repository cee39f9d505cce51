"""What the page of `sample --serve` draws and says, against the sampler, hooks and matplotlib's colours."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from drawn_bundles import small_shape, write_drawn_bundle
from tiny_bundles import write_tiny_bundle

from dsr_scale.base.errors import InputError
from dsr_scale.cli import main as command_line
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.model import HeadConfig
from dsr_scale.evaluate.norm_overlay import SIDE, norm_overlay
from dsr_scale.evaluate.sampling_norms import SampledNorms, sample_with_norms
from dsr_scale.export.pipeline import Pipeline, load

pytest.importorskip("gradio", reason="needs the extra web")

from dsr_scale.evaluate.demo import HOST, Demo, sampling_of

WAIT_S = 120
INTERVAL = SamplingConfig(steps=5, guidance=3.0, guidance_interval=(0.3, 0.8))
HEUN = SamplingConfig(steps=4, solver="heun", guidance=2.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Four blocks, registers from block 2 on, and a head of one block."""
    shape = small_shape(head=HeadConfig(width=48, depth=1, heads=2))
    return load(
        write_drawn_bundle(tmp_path_factory.mktemp("drawn") / "b", shape=shape), device="cpu"
    )


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "b", classes=True)


def block_outputs(pipeline: Pipeline, sampling: SamplingConfig) -> list[dict[str, np.ndarray]]:
    """What hooks see of the first row of every forward of a plain sampling: block → tokens [N,D]."""
    forwards: list[dict[str, np.ndarray]] = []
    handles = []
    blocks = list(pipeline.model.get_submodule("blocks").named_children())

    def keep(name: str) -> Any:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            if name == blocks[0][0]:
                forwards.append({})
            forwards[-1][name] = output[0].double().numpy()

        return hook

    for name, block in blocks:
        handles.append(block.register_forward_hook(keep(name)))
    pipeline.sample(["a red apple"], seed=3, sampling=sampling)
    for handle in handles:
        handle.remove()
    return forwards


@pytest.mark.parametrize("sampling", [INTERVAL, HEUN], ids=lambda s: s.solver)
def test_norms_are_those_of_the_forwards_that_draw_the_image(
    pipeline: Pipeline, sampling: SamplingConfig
) -> None:
    sampled = sample_with_norms(pipeline, "a red apple", seed=3, sampling=sampling)
    plain = pipeline.sample(["a red apple"], seed=3, sampling=sampling)[0]
    assert torch.equal(sampled.image, plain)
    assert plain.float().std() > 20
    # Of Heun's two forwards at each inner time, the second is at the latents of the path.
    forwards = block_outputs(pipeline, sampling)[:: 2 if sampling.solver == "heun" else 1]
    assert len(forwards) == len(sampled.steps) == sampling.steps
    for step, forward in zip(sampled.steps, forwards, strict=True):
        assert [norms.block for norms in step.blocks] == [
            *(f"blocks.{i}" for i in range(4)),
            "head.0",
        ]
        for norms, (number, tokens) in zip(step.blocks, forward.items(), strict=True):
            registers = 4 if int(number) >= 2 else 0
            assert tokens.shape[0] == registers + 16
            lengths = np.sqrt((tokens**2).sum(1))
            np.testing.assert_allclose(norms.register_norms[0], lengths[:registers], rtol=1e-5)
            np.testing.assert_allclose(norms.image_norms[0], lengths[registers:], rtol=1e-5)
    even = np.linspace(1, 0, sampling.steps + 1)[:-1]
    shifted = 2 * even / (1 + even)  # the bundle's shift is 2
    np.testing.assert_allclose([step.time for step in sampled.steps], shifted, rtol=1e-6)


def test_the_page_draws_what_sample_draws(pipeline: Pipeline, by_class: Path) -> None:
    demo = Demo(pipeline, INTERVAL, "drawn", origin={"bundle": "there"})
    picture, _ = demo.draw("ein Apfel", 11.0, HEUN)
    wanted = pipeline.sample(["ein Apfel"], seed=11, sampling=HEUN)[0]
    assert np.array_equal(np.asarray(picture), wanted.permute(1, 2, 0).numpy())
    assert picture.info["prompts"] == "ein Apfel" and picture.info["seed"] == "11"
    assert SamplingConfig.model_validate_json(picture.info["sampling"]) == HEUN
    assert picture.info["bundle"] == "there"

    classes = load(by_class, device="cpu")
    demo = Demo(classes, classes.sampling, "tiny")
    assert demo.prompt_name == "Class number, 0 to 6"
    drawn = [demo.draw(number, 0, classes.sampling)[0] for number in ("2", "5")]
    wanted = [classes.sample([number], seed=0)[0].permute(1, 2, 0).numpy() for number in ("2", "5")]
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(drawn, wanted, strict=True))
    assert not np.array_equal(wanted[0], wanted[1])


def test_autoguidance_reaches_the_page(pipeline: Pipeline, tmp_path: Path) -> None:
    weaker = load(write_drawn_bundle(tmp_path / "weaker"), device="cpu")
    demo = Demo(pipeline, INTERVAL, "drawn", weaker=weaker)
    picture, sampled = demo.draw("a", 0, INTERVAL)
    wanted = pipeline.sample(["a"], seed=0, sampling=INTERVAL, weaker=weaker)[0]
    assert np.array_equal(np.asarray(picture), wanted.permute(1, 2, 0).numpy())
    assert len(sampled.steps) == INTERVAL.steps  # of the guided network, not of the weaker one


def magma(value: float) -> np.ndarray:
    """matplotlib's colour for a value in [0, 1], from 0 to 255."""
    colours: Any = pytest.importorskip("matplotlib").colormaps["magma"]
    return 255 * np.array(colours(value))[:3]


def test_overlay_has_the_colours_of_magma_and_frames_outliers() -> None:
    norms = torch.linspace(8, 12, 24).reshape(4, 6)
    norms[1, 2] = 50.0
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[0] = 200
    cell = SIDE / 6
    alone = np.asarray(norm_overlay(image, norms, opacity=1.0))
    assert alone.shape[1] == SIDE and alone.shape[0] > round(SIDE * 32 / 48)
    for row, column in np.ndindex(4, 6):
        middle = int((column + 0.5) * cell)
        shown = alone[int((row + 0.5) * cell), middle]
        wanted = magma(float(norms[row, column]) / 50)
        assert np.abs(shown - wanted).max() < 12, (row, column)
        above = alone[int(row * cell) : int(row * cell) + 5, middle]
        framed = (above == (0x56, 0xB4, 0xE9)).all(1).any()
        assert framed == ((row, column) == (1, 2))
    bare = np.asarray(norm_overlay(image, norms.clamp(max=12), opacity=0.0))
    assert (bare[: int(4 * cell)] == round(0.299 * 200)).all()


def test_a_map_without_outliers_is_as_even_as_it_is() -> None:
    norms = torch.tensor([[9.0, 10.0], [10.0, 11.0]])
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    shown = np.asarray(norm_overlay(image, norms, opacity=1.0))
    for (row, column), relative in zip(np.ndindex(2, 2), (0.9, 1, 1, 1.1), strict=True):
        colour = shown[SIDE // 4 + row * SIDE // 2, SIDE // 4 + column * SIDE // 2]
        assert np.abs(colour - magma(relative / 2)).max() < 12


def test_words_say_what_the_norms_are(pipeline: Pipeline) -> None:
    demo = Demo(pipeline, INTERVAL, "drawn")
    sampled = sample_with_norms(pipeline, "a red apple", seed=3, sampling=INTERVAL)
    norms = sampled.steps[2].blocks[3]
    image = norms.image_norms.clone()
    image[0, 5] = 40 * image.median()
    planted = dataclasses.replace(norms, image_norms=image)
    blocks = (*sampled.steps[2].blocks[:3], planted, *sampled.steps[2].blocks[4:])
    steps = list(sampled.steps)
    steps[2] = dataclasses.replace(steps[2], blocks=blocks)
    told = demo.show(SampledNorms(sampled.image, tuple(steps)), 3, 3, 0.5)[1]
    assert "block 3 of the body, at step 3 of 5" in told
    assert "model time 0.75 (pre-shift 0.6;" in told  # 2·0.6/(1+0.6)
    assert "1 of 16 (6.25 %)" in told
    median = sorted(image[0].tolist())[7]
    assert f"image token: {image.max() / median:.3g} × median" in told
    assert f"register: {norms.register_norms.max() / median:.3g} × median" in told
    assert "register: none in this block" in demo.show(sampled, 1, 1, 0.5)[1]
    assert "block 0 of the head" in demo.show(sampled, 4, 5, 0.5)[1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ((4, "euler", None, 0, 1), "empty field"),
        ((4, "euler", 2, 0.8, 0.3), "from model time 0.8 to 0.3"),
        ((4, "euler", 2, 0, 1.5), "to 1.5"),
        ((4, "euler", -1, 0, 1), "guidance -1"),
        ((2.5, "euler", 1, 0, 1), "steps 2.5"),
        ((4, "rk4", 1, 0, 1), "solver rk4"),
    ],
)
def test_settings_that_no_sampling_can_have(fields: tuple[Any, ...], named: str) -> None:
    with pytest.raises(InputError, match="what to do") as refused:
        sampling_of(*fields)
    assert named in refused.value.found


def test_no_prompt_and_no_seed(pipeline: Pipeline) -> None:
    demo = Demo(pipeline, HEUN, "drawn")
    for prompt, seed, named in (
        (" ", 0, "no prompt"),
        ("a", None, "no seed"),
        ("a", 0.5, "seed 0.5"),
    ):
        with pytest.raises(InputError, match=named):
            demo.draw(prompt, seed, HEUN)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What `dsr-scale sample words…` says when it ends with status 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["dsr-scale", "sample", *map(str, words)])
        command_line.run()
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_serve_refuses(
    by_class: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("--prompt", "1", "--prompt", "2")
    assert "--serve with several prompts" in refused(capsys, by_class, "--serve", *two)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(capsys, by_class, "--serve", "--port", port, "--device", "cpu")
        assert f"port {port} on {HOST}" in told and "--port" in told
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gradio" else found(name, *rest),
    )
    assert "pip install 'dsr-scale[web]'" in refused(capsys, by_class, "--serve")


def test_the_command_serves_on_this_machine_alone_until_it_is_interrupted(
    by_class: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in what a shell starts in the background.
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    address = f"http://{HOST}:{port}/"
    config: dict[str, Any] = {}
    elsewhere: list[bool] = []
    pictures: list[Path] = []
    over = threading.Event()

    def visit() -> None:
        try:
            printed, until = "", time.monotonic() + WAIT_S
            while address not in printed and time.monotonic() < until and not over.is_set():
                time.sleep(0.1)
                printed += capsys.readouterr().err
            config.update(httpx.get(f"{address}config", trust_env=False).json())
            pictures.append(Path(os.environ["GRADIO_TEMP_DIR"]))
            assert pictures[0].is_dir()
            with socket.socket() as other:
                elsewhere.append(other.connect_ex(("127.0.0.2", port)) == 0)
        finally:
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    # A proxy that answers nothing: the server asks itself whether it is up.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    words = [by_class, "--serve", "--port", port, "--prompt", 3, "--seed", 8, "--steps", 7]
    monkeypatch.setattr(sys, "argv", ["dsr-scale", "sample", *map(str, words), "--device", "cpu"])
    before = dict(os.environ)
    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.run()
    finally:
        over.set()
        visitor.join()
        assert signal.signal(signal.SIGINT, ignored) == signal.SIG_IGN
    assert ended.value.code == 0
    assert elsewhere == [False]
    values = {
        part["props"].get("elem_id"): part["props"].get("value") for part in config["components"]
    }
    assert (values["prompt"], values["seed"], values["steps"]) == ("3", 8, 7)
    assert values["guidance"] == 2.0  # the bundle's
    assert not pictures[0].exists()
    now = dict(os.environ)
    changed = {name for name in before | now if before.get(name) != now.get(name)}
    assert changed <= {"HF_HUB_DISABLE_TELEMETRY"}  # by gradio, told to send no reports
