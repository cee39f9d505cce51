"""A page in the browser: a prompt becomes an image, and the norms of its tokens lie over it.

One process, one user: the page listens on the loopback interface alone, asks nothing of other hosts (no
fonts, scripts, usage reports or shared links), and draws one image at a time, later requests waiting.
Norms of all blocks and steps are kept with the image, so that another block or step is another picture
of them and not another sampling. Needs the extra `web` (gradio); nothing else imports this module.
"""

from __future__ import annotations

import contextlib
import html
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

import gradio as gr
import torch
from PIL import Image
from pydantic import ValidationError

from dsr_scale.base.errors import InputError
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.diffusion.timesteps import shift_timesteps
from dsr_scale.evaluate.norm_overlay import norm_overlay
from dsr_scale.evaluate.sampling_norms import SampledNorms, sample_with_norms
from dsr_scale.export.pipeline import Pipeline

HOST = "127.0.0.1"
FIRST_PORT = 7860
_PORTS = 100
"""How many are tried, from the first on, where none is asked for."""
_MOST_STEPS = 100
_OPACITY = 0.6
_KEPT_S = 3600
"""How long a picture that was shown stays on the disk."""
_STYLE = """
#sample .image-frame, #norms .image-frame {width: 100%}
#sample img, #norms img {
  width: 100% !important; height: auto !important; object-fit: contain !important;
}
"""
"""Small images fill their place, too."""


@dataclass(frozen=True)
class Demo:
    """What the page draws with, and the settings that it begins with."""

    pipeline: Pipeline
    sampling: SamplingConfig
    title: str
    """Which model this is, for the head of the page."""
    prompt: str = ""
    seed: int = 0
    weaker: Pipeline | None = None
    """Guides instead of the null condition."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """What the text of a downloaded PNG says besides prompt, seed and settings."""

    @property
    def blocks(self) -> int:
        """Blocks of body and head."""
        shape = self.pipeline.shape
        return shape.depth + (shape.head.depth if shape.head else 0)

    @property
    def prompt_name(self) -> str:
        """What the model is conditioned on."""
        conditioning = self.pipeline.shape.conditioning
        if conditioning.kind == "class":
            return f"Class number, 0 to {conditioning.num_classes - 1}"
        return "Prompt"

    def draw(
        self,
        prompt: str,
        seed: float | None,
        sampling: SamplingConfig,
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[Image.Image, SampledNorms]:
        """The image of `dsr-scale sample` with these settings, and its norms.

        Raises InputError for no prompt, a seed that is no whole number, a class that is none.
        """
        if not prompt.strip():
            raise InputError(
                found="no prompt",
                required=f"text in the field “{self.prompt_name}”",
                remedy="say what to draw",
            )
        if seed is None or seed != int(seed):
            raise InputError(
                found="no seed" if seed is None else f"seed {seed:g}",
                required="a whole number",
                remedy="fill in the field “Seed”, for example with 0",
            )
        sampled = sample_with_norms(
            self.pipeline,
            prompt,
            seed=int(seed),
            sampling=sampling,
            weaker=self.weaker,
            on_step=on_step,
        )
        picture = Image.fromarray(sampled.image.permute(1, 2, 0).numpy())
        settings = {"seed": str(int(seed)), "sampling": sampling.model_dump_json()}
        picture.info |= {"prompts": prompt} | settings | dict(self.origin)
        return picture, sampled

    def show(
        self, sampled: SampledNorms, block: int, step: int, opacity: float
    ) -> tuple[Image.Image, str]:
        """The norms after block `block`, from 0, at step `step`, from 1: over the image, and as text."""
        shape = self.pipeline.shape
        norms = sampled.steps[step - 1].blocks[block]
        grid = shape.grid[0] // shape.patch, shape.grid[1] // shape.patch
        overlay = norm_overlay(
            sampled.image, norms.image_norms[0].unflatten(0, grid), opacity=opacity
        )
        return overlay, self._words(sampled, block, step)

    def _words(self, sampled: SampledNorms, block: int, step: int) -> str:
        at = sampled.steps[step - 1]
        norms = at.blocks[block]
        part, number = norms.block.split(".")
        place = f"block {number} of the {'head' if part == 'head' else 'body'}"
        preshift = float(shift_timesteps(torch.tensor(at.time), 1 / self.pipeline.timestep_shift))
        tokens = norms.image_norms.shape[1]
        ratio = norms.outlier_ratio
        registers = "none in this block"
        if norms.register_over_median is not None:
            registers = f"{norms.register_over_median:.3g} × median"
        if not self.pipeline.shape.registers:
            registers = "the model has none"
        return (
            f"**After {place}, at step {step} of {len(sampled.steps)}**, model time {at.time:.3g} "
            f"(pre-shift {preshift:.3g}; 1 is noise)\n"
            f"- Outlier tokens (framed): {round(ratio * tokens)} of {tokens} ({100 * ratio:.3g} %)\n"
            f"- Largest norm of an image token: {norms.max_over_median:.3g} × median\n"
            f"- Largest norm of a register: {registers}"
        )


def sampling_of(
    steps: float, solver: str, guidance: float | None, low: float | None, high: float | None
) -> SamplingConfig:
    """The settings that the page's fields say. Raises InputError for what no sampling can be."""
    if guidance is None or low is None or high is None:
        raise InputError(
            found="an empty field among the settings",
            required="a number in each",
            remedy="fill it in; guidance 1 from time 0 to 1 is no guidance",
        )
    if not 0 <= low < high <= 1:
        raise InputError(
            found=f"guidance from model time {low:g} to {high:g}",
            required="0 ≤ from < to ≤ 1, in model time: 0 is data, 1 is noise",
            remedy="0 and 1 are everywhere",
        )
    values = {"steps": steps, "solver": solver, "guidance": guidance}
    try:
        return SamplingConfig.model_validate(values | {"guidance_interval": (low, high)})
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            found=f"{problem['loc'][0]} {problem['input']}",
            required=problem["msg"],
            remedy="correct it",
        ) from error


def build_page(demo: Demo) -> gr.Blocks:
    """The page, with what its fields do."""
    page = gr.Blocks(title=demo.title, analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S))
    with page:
        gr.Markdown(f"## {demo.title}")
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                prompt = gr.Textbox(demo.prompt, label=demo.prompt_name, elem_id="prompt")
                button = gr.Button("Sample", variant="primary", elem_id="draw")
                seed = gr.Number(demo.seed, label="Seed", elem_id="seed")
                settings = _settings_fields(demo.sampling)
            with gr.Column(scale=3, min_width=260):
                image = _picture("Image", "sample")
                words = gr.Markdown(elem_id="words")
            with gr.Column(scale=3, min_width=260):
                overlay = _picture("Token norms", "norms")
                view = _view_fields(demo)

        bar = gr.Progress()

        def draw(prompt, seed, steps, solver, guidance, low, high, block, step, opacity, bar=bar):
            def advance(done: int, of: int) -> None:
                bar((done, of), unit="steps")

            with _told_on_the_page():
                sampling = sampling_of(steps, solver, guidance, low, high)
                picture, sampled = demo.draw(prompt, seed, sampling, advance)
            last = len(sampled.steps)
            step = min(step, last)
            slider = gr.Slider(maximum=last, value=step)
            return picture, sampled, slider, *demo.show(sampled, block, step, opacity)

        def show(sampled, block, step, opacity):
            return (None, "") if sampled is None else demo.show(sampled, block, step, opacity)

        gr.on(
            [button.click, prompt.submit],
            draw,
            [prompt, seed, *settings, *view],
            [image, state, view[1], overlay, words],
            concurrency_limit=1,
            show_progress_on=image,
        )
        gr.on(
            [field.input for field in view],
            show,
            [state, *view],
            [overlay, words],
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return page


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, format="png", buttons=["download"], elem_id=name)


def _settings_fields(sampling: SamplingConfig) -> list[gr.Slider | gr.Radio | gr.Number]:
    """Fields for the arguments of `sampling_of`, in order."""
    most = max(_MOST_STEPS, sampling.steps)
    solvers = get_args(SamplingConfig.model_fields["solver"].annotation)
    return [
        gr.Slider(1, most, sampling.steps, step=1, label="Steps", elem_id="steps"),
        gr.Radio(solvers, value=sampling.solver, label="Solver", elem_id="solver"),
        gr.Number(sampling.guidance, label="Guidance (1 is off)", step=0.1, elem_id="guidance"),
        *(
            gr.Number(value, label=f"Guided {name} model time", step=0.05, elem_id=f"guided-{name}")
            for name, value in zip(("from", "to"), sampling.guidance_interval, strict=True)
        ),
    ]


def _view_fields(demo: Demo) -> list[gr.Slider]:
    """Which norms are shown: block, step and opacity."""
    last_block, last_step = demo.blocks - 1, demo.sampling.steps
    middle = -(-last_step // 2)
    return [
        gr.Slider(0, last_block, last_block, step=1, label="After block", elem_id="block"),
        gr.Slider(
            1, last_step, middle, step=1, label="At step (the first sees noise)", elem_id="step"
        ),
        gr.Slider(0, 1, _OPACITY, step=0.05, label="Opacity of the norms", elem_id="opacity"),
    ]


@contextlib.contextmanager
def serving(demo: Demo, *, port: int | None = None) -> Iterator[str]:
    """Serves the page meanwhile: yields its address, on `port` or else the first free from 7860 on.

    Raises InputError for a port that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="dsr-scale-") as pictures, _environment(pictures):
        page = build_page(demo)
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=port,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                show_error=True,
                footer_links=[],
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                ssr_mode=False,
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=_STYLE,
            )
        except OSError as error:
            tried = f"port {port}" if port else f"ports {FIRST_PORT} to {FIRST_PORT + _PORTS - 1}"
            raise InputError(
                found=f"{tried} on {HOST}: {error}",
                required="a free port for the page",
                remedy="name another with --port",
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _told_on_the_page() -> Iterator[None]:
    """Shows what a person can put right as a message that stays until it is closed."""
    try:
        yield
    except InputError as error:
        parts = (("Found", error.found), ("Required", error.required), ("What to do", error.remedy))
        lines = [f"<b>{name}</b>: {html.escape(text)}" for name, text in parts]
        raise gr.Error("<br>".join(lines), duration=None, print_exception=False) from error


@contextlib.contextmanager
def _environment(pictures: str) -> Iterator[None]:
    """What gradio takes from the environment alone.

    Its common directory of pictures may belong to another user of the machine, and it asks its own server
    whether it is up, which a proxy must not answer.
    """
    direct = ",".join(filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY")), HOST]))
    changes = {"GRADIO_TEMP_DIR": pictures, "no_proxy": direct}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
