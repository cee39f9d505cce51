"""What must fit together across sections of a run, checked in one place and reported at once.

Types and ranges of single fields are the schema's business; here are the rules that join two or
more of them. All of it is arithmetic on the config, so a cluster job fails on the login node.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from dsr_scale.base.errors import InputError
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.decoder_checks import DECODER_CHECKS
from dsr_scale.config.derive import (
    batch_arithmetic,
    latent_channels,
    latent_grid,
    parallel_layout,
    register_start,
)
from dsr_scale.config.encoder_checks import ENCODER_CHECKS
from dsr_scale.config.encoders import CAPTION_PLACEHOLDER, TransformersText
from dsr_scale.config.evaluation_checks import evaluation_problems, interval_problems
from dsr_scale.config.model import ClassConditioning
from dsr_scale.config.parallel_checks import (
    microbatch_problems,
    pipeline_problems,
    sequence_problems,
    tensor_problems,
)
from dsr_scale.config.presets import with_preset
from dsr_scale.config.problems import raise_problems
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.config.schema_paths import leaf_paths
from dsr_scale.config.shape_checks import (
    Problems,
    flash_problems,
    no_text,
    patch_problems,
    register_problems,
    width_problems,
)

_DECODER_FOR = {"pixels": "pixels", "vit": "rae", "vae": "vae"}
"""Image encoder kind → the decoder kind that inverts it."""

DATA_FINGERPRINT = "data.fingerprint"
"""What `checkpoint.allow_changed` calls the identity of the data set, which no setting holds."""


def check_run(run: AnyRun, *, devices: int = 1) -> None:
    """Raise InputError with everything in `run` that does not fit together on `devices` processes."""
    problems: list[InputError] = []
    if isinstance(run, DecoderRun):
        for decoder_check in DECODER_CHECKS:
            _collect(problems, decoder_check(run))
    elif isinstance(run, RunConfig):
        for check in _CHECKS:
            _collect(problems, check(run))
    for shared_check in _SHARED_CHECKS:
        _collect(problems, shared_check(run))
    _collect(problems, _batch(run, devices))
    if isinstance(run, RunConfig):
        _collect(problems, microbatch_problems(run, devices))
    raise_problems(f"the run {run.name}", problems)


def _collect(problems: list[InputError], found: Problems) -> None:
    """Add what a check yields, or raises while it derives sizes; the same problem counts once."""
    try:
        for problem in found:
            problems.append(problem)
    except InputError as problem:
        if str(problem) not in map(str, problems):
            problems.append(problem)


def _widths(run: RunConfig) -> Problems:
    model = with_preset(run.model)
    yield from width_problems(model.width, model.heads, model.head)


def _registers(run: RunConfig) -> Problems:
    model = with_preset(run.model)
    yield from register_problems(
        model.registers.count,
        register_start(model),
        model.depth,
        masked=model.registers.masked,
    )


def _conditioning(run: RunConfig) -> Problems:
    by_class = isinstance(run.model.conditioning, ClassConditioning)
    text = run.encoders.text.kind
    if by_class and text != "none":
        yield InputError(
            found=f"model.conditioning.kind = class, encoders.text.kind = {text}",
            required="no text encoder for class conditioning",
            remedy="set encoders.text.kind to none, or another model.conditioning.kind",
        )
    if not by_class and text == "none":
        yield no_text(run.model.conditioning.kind)


def _attention(run: RunConfig) -> Problems:
    if run.model.attention != "flash":
        return
    yield from flash_problems(run.model.attention, run.model.conditioning.kind)
    if run.training.precision != "bf16":
        yield InputError(
            found=f"model.attention = flash, training.precision = {run.training.precision}",
            required="bf16: flash-attn has no fp32 kernels",
            remedy="set training.precision to bf16, or model.attention to sdpa",
        )
    if run.training.device == "cpu":
        yield InputError(
            found="model.attention = flash, training.device = cpu",
            required="a CUDA device for flash-attn",
            remedy="set model.attention to sdpa",
        )


def _encoders(run: RunConfig) -> Problems:
    image, decoder = run.encoders.image.kind, run.encoders.decoder.kind
    if decoder not in ("none", _DECODER_FOR[image]):
        yield InputError(
            found=f"encoders.image.kind = {image}, encoders.decoder.kind = {decoder}",
            required=f"the decoder of the same latents, {_DECODER_FOR[image]}, or none",
            remedy=f"set encoders.decoder.kind to {_DECODER_FOR[image]}, or to none for a run "
            "without sample grids",
        )
    text = run.encoders.text
    if isinstance(text, TransformersText) and CAPTION_PLACEHOLDER not in text.template:
        yield InputError(
            found=f"encoders.text.template = {text.template!r}",
            required=f"a template with {CAPTION_PLACEHOLDER} where the caption goes",
            remedy=f"add {CAPTION_PLACEHOLDER} to encoders.text.template",
        )


def _grids(run: RunConfig) -> Problems:
    """Every image size must give whole latent cells, and whole tokens of `model.patch` cells."""
    latent_channels(run.encoders)  # an unknown encoder is one problem, not one for each size
    resolution = run.data.resolution
    sizes = {"data.resolution": (resolution, resolution)}
    sizes |= {f"data.buckets[{i}]": size for i, size in enumerate(run.data.buckets)}
    for name, (height, width) in sizes.items():
        try:
            grid = latent_grid(run.encoders, height, width, resolution)
        except InputError as problem:
            yield InputError(
                found=f"{name}: {problem.found}",
                required=problem.required,
                remedy=problem.remedy,
            )
            continue
        yield from patch_problems(name, grid, run.model.patch)


def _data(run: AnyRun) -> Problems:
    if "://" in run.data.shards and run.data.cache_directory is None:
        yield InputError(
            found=f"data.shards = {run.data.shards}, no data.cache_directory",
            required="a local directory for remote shards",
            remedy="set data.cache_directory to a fast local disk",
        )
    buckets = run.data.buckets
    for index, (height, width) in enumerate(buckets):
        if (height, width) in buckets[:index]:
            yield InputError(
                found=f"data.buckets[{index}] = [{height}, {width}], which is there before",
                required="each bucket once",
                remedy=f"remove data.buckets[{index}]",
            )


def _schedule(run: AnyRun) -> Problems:
    steps, schedule = run.training.steps, run.training.schedule
    if schedule.warmup_steps > steps:
        yield InputError(
            found=f"training.schedule.warmup_steps = {schedule.warmup_steps}, "
            f"training.steps = {steps}",
            required="a warm-up no longer than the run",
            remedy="lower training.schedule.warmup_steps or raise training.steps",
        )
    start = max(schedule.decay_start_step, schedule.warmup_steps)
    end = schedule.decay_end_step if schedule.decay_end_step is not None else steps
    if schedule.decay != "constant" and end <= start:
        yield InputError(
            found=f"a {schedule.decay} decay from step {start} to step {end}",
            required="an end after the start; the start is decay_start_step or the warm-up's end, "
            "the end is decay_end_step or the last step",
            remedy="raise training.schedule.decay_end_step (or training.steps), or lower "
            "training.schedule.decay_start_step",
        )
    rate = run.training.optimizer.learning_rate
    if schedule.decay != "constant" and schedule.final_learning_rate > rate:
        yield InputError(
            found=f"training.schedule.final_learning_rate = {schedule.final_learning_rate}, "
            f"training.optimizer.learning_rate = {rate}",
            required="a final rate no higher than the peak",
            remedy="lower training.schedule.final_learning_rate",
        )


def _checkpoints(run: AnyRun) -> Problems:
    every, keep = run.checkpoint.every_steps, run.checkpoint.keep_every_steps
    if keep is not None and keep % every:
        yield InputError(
            found=f"checkpoint.keep_every_steps = {keep}, checkpoint.every_steps = {every}",
            required="steps at which a checkpoint is written",
            remedy=f"set checkpoint.keep_every_steps to a multiple of {every}",
        )
    known = {DATA_FINGERPRINT, *leaf_paths(type(run))}
    for name in run.checkpoint.allow_changed:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield InputError(
                found=f"checkpoint.allow_changed with {name!r}, which is no setting",
                required=f"dotted names of settings, or {DATA_FINGERPRINT}",
                remedy=f"did you mean {close[0]}?" if close else f"remove {name!r}",
            )


def _sampling(run: RunConfig) -> Problems:
    grid = run.grid
    yield from interval_problems("grid.sampling", grid.sampling)
    if grid.every_steps is None:
        return
    if run.encoders.decoder.kind == "none":
        yield InputError(
            found=f"grid.every_steps = {grid.every_steps}, encoders.decoder.kind = none",
            required="a decoder to turn sampled latents into images",
            remedy=f"set encoders.decoder.kind to {_DECODER_FOR[run.encoders.image.kind]}, or "
            "remove grid.every_steps",
        )
    if not grid.prompts:
        yield InputError(
            found=f"grid.every_steps = {grid.every_steps}, no grid.prompts",
            required="at least one prompt",
            remedy="set grid.prompts, or remove grid.every_steps",
        )
    if grid.sampling.guidance != 1 and run.data.condition_dropout == 0:
        yield InputError(
            found=f"grid.sampling.guidance = {grid.sampling.guidance}, data.condition_dropout = 0",
            required="a trained unconditional branch for guidance",
            remedy="set data.condition_dropout to 0.1, or grid.sampling.guidance to 1",
        )
    yield from _class_prompts(run)


def _class_prompts(run: RunConfig) -> Problems:
    conditioning = run.model.conditioning
    if not isinstance(conditioning, ClassConditioning):
        return
    classes = conditioning.num_classes
    wrong = [
        prompt
        for prompt in run.grid.prompts
        if not (prompt.isascii() and prompt.isdigit() and int(prompt) < classes)
    ]
    if wrong:
        yield InputError(
            found=f"grid.prompts with {', '.join(map(repr, wrong))}, "
            "model.conditioning.kind = class",
            required=f"class numbers from 0 to {classes - 1}",
            remedy="write class numbers in grid.prompts, or condition on text",
        )


def _averages(run: AnyRun) -> Problems:
    decays = run.training.ema_decays
    if len(set(decays)) < len(decays):
        yield InputError(
            found=f"training.ema_decays = {list(decays)}",
            required="different decays: an average is saved under the name of its decay",
            remedy="remove the repeated ones from training.ema_decays",
        )


def _batch(run: AnyRun, devices: int) -> Problems:
    """Devices that are no whole replicas, or a global batch that does not divide over these."""
    yield from ()
    batch_arithmetic(run, parallel_layout(run, devices).dp)


_CHECKS: tuple[Callable[[RunConfig], Problems], ...] = (
    _widths,
    _registers,
    _conditioning,
    _attention,
    _encoders,
    _grids,
    _sampling,
    evaluation_problems,
    tensor_problems,
    sequence_problems,
    pipeline_problems,
)
"""Of a diffusion transformer."""

_SHARED_CHECKS: tuple[Callable[[AnyRun], Problems], ...] = (
    _data,
    _schedule,
    _averages,
    _checkpoints,
    *ENCODER_CHECKS,
)
