"""A bundle through diffusers draws what it draws without, bit for bit, and needs no training package."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from drawn_bundles import small_shape, write_drawn_bundle
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dsr_scale.base.errors import InputError
from dsr_scale.cli.main import TRAINING_PACKAGES
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.model import ClassConditioning
from dsr_scale.diffusion.solvers import time_grid
from dsr_scale.export import DSRPipeline, load

PROMPTS = ["skull", "taxi", "old key"]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    """Nothing may ask the hub, not even for what it could do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def pipe(bundle: Path) -> Any:
    pipe: Any = DSRPipeline.from_pretrained(bundle)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def directly(bundle: Path, prompts: list[str] = PROMPTS, **options: Any) -> np.ndarray:
    dtype = options.pop("dtype", None)
    images = load(bundle, device="cpu", dtype=dtype).sample(prompts, **options)
    assert images.float().std() > 20
    return images.permute(0, 2, 3, 1).numpy()


def test_the_bundle_s_own_settings_give_the_same_bits(bundle: Path, pipe: Any) -> None:
    output = pipe(PROMPTS, seed=3)
    assert isinstance(output, ImagePipelineOutput)
    assert np.array_equal(pixels(output.images), directly(bundle, seed=3))
    (one,) = pipe("skull", seed=3, return_dict=False)
    assert np.array_equal(pixels(one), pixels(output.images[:1]))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++"])
def test_every_setting_arrives(bundle: Path, pipe: Any, solver: Any) -> None:
    sampling = SamplingConfig(solver=solver, steps=6, guidance=3.0, guidance_interval=(0.3, 0.8))
    images = pipe(
        PROMPTS,
        seed=5,
        solver=solver,
        num_inference_steps=6,
        guidance_scale=3.0,
        guidance_interval=(0.3, 0.8),
        batch_size=2,
        output_type="np",
    ).images
    expected = directly(bundle, seed=5, sampling=sampling, batch=2)
    assert images.dtype == np.float32
    assert np.array_equal((images * 255).round().astype(np.uint8), expected)
    everywhere = sampling.model_copy(update={"guidance_interval": (0.0, 1.0)})
    assert not np.array_equal(directly(bundle, seed=5, sampling=everywhere, batch=2), expected)


def test_diffusers_own_class_opens_it_once_ours_is_known(bundle: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(bundle)
    found = type(pipe)
    assert found is DSRPipeline
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(pipe(PROMPTS, seed=3).images), directly(bundle, seed=3))


def test_precision_follows_diffusers(bundle: Path, pipe: Any) -> None:
    expected = directly(bundle, seed=3, dtype="bf16")
    loaded: Any = DSRPipeline.from_pretrained(bundle, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(loaded(PROMPTS, seed=3).images), expected)
    assert np.array_equal(pixels(pipe.to(torch.bfloat16)(PROMPTS, seed=3).images), expected)


def test_a_generator_moves_on_and_can_be_set_back(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    first = pixels(pipe("taxi", generator=generator).images)
    second = pixels(pipe("taxi", generator=generator).images)
    again = pixels(pipe("taxi", generator=torch.Generator().manual_seed(7)).images)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    torch.manual_seed(7)
    assert np.array_equal(pixels(pipe("taxi").images), first)


def test_several_images_of_one_prompt(bundle: Path, pipe: Any) -> None:
    images = pixels(pipe(["skull", "taxi"], num_images_per_prompt=2, seed=1).images)
    assert np.array_equal(images, directly(bundle, ["skull", "skull", "taxi", "taxi"], seed=1))
    assert not np.array_equal(images[0], images[1])


def test_the_callback_sees_every_step_of_every_batch(pipe: Any) -> None:
    seen: list[tuple[int, float]] = []

    def on_step_end(pipeline: Any, step: int, time: float, values: dict[str, Any]) -> None:
        assert pipeline is pipe and values == {}
        seen.append((step, time))

    pipe(PROMPTS, seed=0, batch_size=2, callback_on_step_end=on_step_end)
    times = time_grid(4, 2.0)
    assert seen == [(step, times[step]) for step in range(4)] * 2


def test_class_numbers_are_prompts(tmp_path: Path) -> None:
    shape = small_shape(conditioning=ClassConditioning(num_classes=5), text_kind="none")
    bundle = write_drawn_bundle(tmp_path, shape=shape)
    pipe: Any = DSRPipeline.from_pretrained(bundle)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(
        pixels(pipe(["0", "4"], seed=2).images), directly(bundle, ["0", "4"], seed=2)
    )
    with pytest.raises(InputError, match="a class number from 0 to 4"):
        pipe("a cat", seed=2)


def test_saving_again_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="copy the bundle's directory"):
        pipe.save_pretrained(tmp_path)


INFERENCE = """
import sys
blocked = sys.argv[2].split(",")
sys.modules.update(dict.fromkeys(blocked))
import dsr_scale.export
assert "torch" not in sys.modules and "diffusers" not in sys.modules
import numpy
images = dsr_scale.export.load(sys.argv[1], device="cpu").sample(["skull"], seed=3)
pipe = dsr_scale.export.DSRPipeline.from_pretrained(sys.argv[1])
drawn = numpy.asarray(pipe("skull", seed=3).images[0])
assert numpy.array_equal(images[0].permute(1, 2, 0).numpy(), drawn)
from dsr_scale.cli.main import app
app(["sample", sys.argv[1], "--prompt", "skull", "--out", sys.argv[3]], standalone_mode=False)
"""
"""A module that is None cannot be imported, and counts as not installed."""


def plain_install() -> set[str]:
    """What `pip install dsr-scale` brings: its requirements without extras, and theirs, normalised."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    pending = [Requirement(line) for line in project["project"]["dependencies"]]
    found: set[str] = set()
    while pending:
        requirement = pending.pop()
        extras = ("", *requirement.extras)
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            pending += [
                further
                for further in map(Requirement, importlib.metadata.requires(name) or ())
                if further.marker is None
                or any(further.marker.evaluate({"extra": extra}) for extra in extras)
            ]
    return found


def test_a_plain_install_is_enough_for_inference(bundle: Path, tmp_path: Path) -> None:
    """Every module of this environment that a plain install would not have is kept from importing."""
    installed = plain_install() | {"dsr-scale"}
    blocked = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not installed & set(map(canonicalize_name, distributions))
    }
    # psutil comes with the plain install, as a requirement of accelerate.
    assert blocked >= (TRAINING_PACKAGES - {"psutil"}) | {"megatron"}
    arguments = [str(bundle), ",".join(sorted(blocked)), str(tmp_path / "out.png")]
    done = subprocess.run(
        [sys.executable, "-c", INFERENCE, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").stat().st_size > 1000
