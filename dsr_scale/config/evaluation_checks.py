"""What must fit together for a run to be evaluated while it trains, and what that takes in memory."""

from __future__ import annotations

from collections.abc import Callable

from dsr_scale.base.errors import InputError
from dsr_scale.config import costs
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.evaluation import IMAGES_NEEDED, OF_REFERENCE
from dsr_scale.config.run import RunConfig
from dsr_scale.config.shape_checks import Problems


def interval_problems(name: str, sampling: SamplingConfig) -> Problems:
    """Times between which guidance applies, in the section called `name`."""
    low, high = sampling.guidance_interval
    if not 0 <= low < high <= 1:
        yield InputError(
            found=f"{name}.guidance_interval = [{low}, {high}]",
            required="two timesteps between 0 and 1, the lower first",
            remedy=f"correct {name}.guidance_interval; [0, 1] is everywhere",
        )


def _metrics(run: RunConfig) -> Problems:
    """Something to measure, each thing once, with as many images as it needs."""
    evaluation = run.evaluation
    if not evaluation.metrics:
        yield InputError(
            found=f"evaluation.every_steps = {evaluation.every_steps}, no evaluation.metrics",
            required="at least one metric",
            remedy="set evaluation.metrics, or remove evaluation.every_steps",
        )
    for metric, needed in IMAGES_NEEDED.items():
        if metric in evaluation.metrics and (evaluation.images or 0) < needed:
            yield InputError(
                found=f"evaluation.images = {evaluation.images}, evaluation.metrics with {metric}",
                required=f"at least {needed} images for {metric}: with fewer the value depends on "
                "their number",
                remedy=f"set evaluation.images to {needed} or more, or remove {metric} from "
                "evaluation.metrics",
            )


def _sources(run: RunConfig) -> Problems:
    """What metrics are computed from."""
    evaluation = run.evaluation
    wanted = frozenset(evaluation.metrics)
    of_reference = sorted(OF_REFERENCE & wanted)
    if of_reference and evaluation.reference is None:
        yield InputError(
            found=f"evaluation.metrics with {', '.join(of_reference)}, no evaluation.reference",
            required="real images to compare with",
            remedy="set evaluation.reference to a folder, packed shards or an ADM .npz",
        )
    if "held_out_loss" in wanted and evaluation.held_out is None:
        yield InputError(
            found="evaluation.metrics with held_out_loss, no evaluation.held_out",
            required="samples that are not trained on",
            remedy="set evaluation.held_out to packed shards",
        )
    by_class = run.model.conditioning.kind == "class"
    draws = wanted & IMAGES_NEEDED.keys()
    if by_class and "clip_score" in wanted:
        yield InputError(
            found="evaluation.metrics with clip_score, model.conditioning.kind = class",
            required="captions to compare the images with",
            remedy="remove clip_score from evaluation.metrics",
        )
    if by_class and evaluation.prompts_file is not None:
        yield InputError(
            found=f"evaluation.prompts_file = {evaluation.prompts_file}, "
            "model.conditioning.kind = class",
            required="no prompts: all classes are drawn in turn",
            remedy="remove evaluation.prompts_file",
        )
    if draws and not by_class and evaluation.prompts_file is None:
        yield InputError(
            found=f"evaluation.metrics with {', '.join(sorted(draws))}, no evaluation.prompts_file",
            required="captions to draw images for",
            remedy="set evaluation.prompts_file to a file with one caption per line",
        )


def _drawing(run: RunConfig) -> Problems:
    """How images are drawn. A decoder is needed even for the held-out loss, as in a bundle."""
    evaluation = run.evaluation
    if run.encoders.decoder.kind == "none":
        yield InputError(
            found=f"evaluation.every_steps = {evaluation.every_steps}, encoders.decoder.kind = none",
            required="a decoder, without which nothing is evaluated, a bundle neither",
            remedy="set encoders.decoder.kind, or remove evaluation.every_steps",
        )
    sampling, name = evaluation.sampling, "evaluation.sampling"
    if sampling is None:
        sampling, name = run.grid.sampling, "grid.sampling"
    else:
        yield from interval_problems(name, sampling)
    draws = not IMAGES_NEEDED.keys().isdisjoint(evaluation.metrics)
    if draws and sampling.guidance != 1 and run.data.condition_dropout == 0:
        yield InputError(
            found=f"{name}.guidance = {sampling.guidance}, data.condition_dropout = 0, images to "
            "evaluate",
            required="a trained unconditional branch for guidance",
            remedy=f"set data.condition_dropout to 0.1, or {name}.guidance to 1",
        )


def evaluation_problems(run: RunConfig) -> Problems:
    """Every reason why a run could not be evaluated as its section says; none without an interval."""
    if run.evaluation.every_steps is None:
        return
    checks: tuple[Callable[[RunConfig], Problems], ...] = (_metrics, _sources, _drawing)
    for check in checks:
        yield from check(run)


def evaluation_notes(run: RunConfig, shape: ModelShape) -> list[str]:
    """What an evaluation takes of a GPU's memory, for `plan`."""
    if run.evaluation.every_steps is None:
        return []
    gib = 4 * costs.total(costs.parameters(shape)).stored / 2**30
    return [
        f"While it evaluates, every rank holds the whole network in fp32 on its device, {gib:,.3f} GiB "
        "more than above, with the decoder, encoders and judging networks; all go again afterwards."
    ]
