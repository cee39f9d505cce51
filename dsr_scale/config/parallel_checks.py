"""What a layout demands of the rest of a run: heads, token counts, blocks, micro-batches.

All of it is arithmetic, so that a layout which cannot run is refused on the login node, with the
nearest one that can. A sequence that does not divide over the tensor ranks is refused and not
padded: the register count and the caption length are free to choose, and one of them cures it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import (
    ModelShape,
    batch_arithmetic,
    latent_grid,
    model_shape,
    padded_hidden_width,
    parallel_layout,
)
from dsr_scale.config.model import ModelConfig
from dsr_scale.config.presets import with_preset
from dsr_scale.config.run import RunConfig
from dsr_scale.config.shape_checks import Problems
from dsr_scale.config.stages import require_blocks


def tensor_problems(run: RunConfig) -> Problems:
    """Heads and hidden widths must divide over the tensor ranks; widths follow from the heads."""
    tp, model = run.parallel.tp, with_preset(run.model)
    for stack in _stacks(model):
        wrong = [(name, size) for name, size in stack.items() if size % tp]
        if wrong:
            name, size = wrong[0]
            choices = [n for n in range(1, size + 1) if _divides(n, model)]
            yield InputError(
                found=f"parallel.tp = {tp}, {name} = {size}",
                required=f"tensor ranks that divide {name}",
                remedy=f"set parallel.tp to one of {_listed(choices)}",
            )
    if run.parallel.sp and tp == 1:
        yield InputError(
            found="parallel.sp = true, parallel.tp = 1",
            required="tensor ranks over which the sequence is shared",
            remedy="set parallel.tp above 1, or parallel.sp to false",
        )


def _stacks(model: ModelConfig) -> list[dict[str, int]]:
    """What tensor ranks share out, by name, for body and head."""
    stacks = [("model", model.width, model.heads)]
    if model.head is not None:
        stacks.append(("model.head", model.head.width, model.head.heads))
    return [
        {
            f"{name}.heads": heads,
            f"the padded hidden width of {name}.width {width}": padded_hidden_width(width),
        }
        for name, width, heads in stacks
    ]


def _divides(tp: int, model: ModelConfig) -> bool:
    return not any(size % tp for stack in _stacks(model) for size in stack.values())


class _Length(NamedTuple):
    """One sequence length of a run, as a sum: K registers, L text rows in context, T image tokens."""

    size: str
    """The setting the image size comes from."""
    registers: bool
    text: bool
    image: int

    def at(self, registers: int, text: int) -> int:
        return registers * self.registers + text * self.text + self.image


def sequence_problems(run: RunConfig) -> Problems:
    """With sequence parallelism every sequence a run meets divides over the tensor ranks."""
    tp = run.parallel.tp
    if not run.parallel.sp or tp == 1:
        return
    shape = model_shape(run)
    lengths = list(_lengths(run, shape))
    count, text = shape.registers, shape.text_length
    wrong = [length for length in lengths if length.at(count, text) % tp]
    if not wrong:
        return
    yield InputError(
        found=f"parallel.sp = true, parallel.tp = {tp}, sequences of "
        + ", ".join(_described(length, count, text) for length in wrong),
        required="sequences that divide over the tensor ranks, at every block and image size",
        remedy=_sequence_remedy(lengths, count, text, tp, with_preset(run.model)),
    )


def _lengths(run: RunConfig, shape: ModelShape) -> Iterator[_Length]:
    """As tokens enter the body, with the registers, and after the text has left."""
    resolution = run.data.resolution
    sizes = {"data.resolution": (resolution, resolution)}
    sizes |= {f"data.buckets[{i}]": size for i, size in enumerate(run.data.buckets)}
    text = shape.conditioning.kind == "in_context"
    for name, (height, width) in sizes.items():
        rows, columns = latent_grid(run.encoders, height, width, resolution)
        image = (rows // shape.patch) * (columns // shape.patch)
        yield _Length(name, False, text, image)
        if shape.registers:
            yield _Length(name, True, text, image)
        if text:
            yield _Length(name, shape.registers > 0, False, image)


def _described(length: _Length, count: int, text: int) -> str:
    parts = [f"{length.image} image tokens"]
    parts += [f"{text} of text"] if length.text else []
    parts += [f"{count} registers"] if length.registers else []
    total = length.at(count, text)
    return f"{total} ({' + '.join(parts)}, {length.size})"


def _sequence_remedy(
    lengths: list[_Length], count: int, text: int, tp: int, model: ModelConfig
) -> str:
    """The register count, caption length or both that are nearest; other tensor ranks otherwise."""

    def fits(candidate: tuple[int, int]) -> bool:
        return not any(length.at(*candidate) % tp for length in lengths)

    counts = _near(count, tp) if any(length.registers for length in lengths) else [count]
    texts = _near(text, tp) if any(length.text for length in lengths) else [text]
    by_count = [n for n in counts if fits((n, text))]
    by_text = [n for n in texts if fits((count, n))]
    choices: list[str] = []
    if by_count:
        choices.append(f"model.registers.count to {_either(by_count)}")
    if by_text:
        choices.append(f"encoders.text.max_length to {_either(by_text)}")
    if not choices:
        both = [pair for pair in itertools.product(counts, texts) if fits(pair)]
        if both:
            best = min(both, key=lambda pair: abs(pair[0] - count) + abs(pair[1] - text))
            choices.append(
                f"model.registers.count to {best[0]} and encoders.text.max_length to {best[1]}"
            )
    fewer = [
        n
        for n in range(2, tp)
        if _divides(n, model) and not any(length.at(count, text) % n for length in lengths)
    ]
    if fewer:
        choices.append(f"parallel.tp to {_either(fewer[-2:])}")
    return f"set {', or '.join([*choices, 'parallel.sp to false'])}"


def _near(value: int, tp: int) -> list[int]:
    """Positive numbers less than `tp` away, in ascending order."""
    return list(range(max(1, value - tp + 1), value + tp))


def pipeline_problems(run: RunConfig) -> Problems:
    """Stages over blocks, and what the pipeline schedules cannot do."""
    parallel, model = run.parallel, with_preset(run.model)
    blocks = model.depth + (model.head.depth if model.head else 0)
    if parallel.virtual_stages > 1 and parallel.pp == 1:
        yield InputError(
            found=f"parallel.virtual_stages = {parallel.virtual_stages}, parallel.pp = 1",
            required="pipeline ranks, each with several stages",
            remedy="set parallel.pp above 1, or parallel.virtual_stages to 1",
        )
    if parallel.zero > 1 and parallel.pp > 1:
        yield InputError(
            found=f"parallel.zero = {parallel.zero}, parallel.pp = {parallel.pp}",
            required="ZeRO-1 under a pipeline: the schedule runs the micro-batches itself, and "
            "ZeRO-2 and ZeRO-3 reduce gradients inside the engine's own backward",
            remedy="set parallel.zero to 1, or parallel.pp to 1",
        )
    if parallel.zero == 3 and run.training.compile:
        yield InputError(
            found="parallel.zero = 3, training.compile = true",
            required="blocks that are not compiled: ZeRO-3 gathers their weights in hooks, at which "
            "a compiled block breaks",
            remedy="set training.compile to false, or parallel.zero to 1 or 2",
        )
    require_blocks(blocks, parallel.pp * parallel.virtual_stages)


def microbatch_problems(run: RunConfig, devices: int) -> Problems:
    """Enough micro-batches in a step to fill the pipeline, in whole rounds where it is interleaved."""
    pp, virtual = run.parallel.pp, run.parallel.virtual_stages
    if pp == 1:
        return
    dp = parallel_layout(run, devices).dp
    batch = batch_arithmetic(run, dp)
    if schedulable(batch.accumulation_steps, pp, virtual):
        return
    replica_images = batch.global_images // dp
    sizes = [
        size
        for size in range(1, replica_images + 1)
        if replica_images % size == 0 and schedulable(replica_images // size, pp, virtual)
    ]
    more = _next(lambda n: schedulable(n, pp, virtual), batch.accumulation_steps)
    images = dp * batch.microbatch_images * more
    choices = [f"training.microbatch_images to one of {_listed(sizes)}"] if sizes else []
    choices.append(f"training.global_batch_images to {images}")
    required = f"at least parallel.pp = {pp} micro-batches in a step"
    if virtual > 1:
        required += ", and for the interleaved schedule a multiple of its rounds, which are "
        required += "micro-batches // parallel.pp"
    yield InputError(
        found=f"training.global_batch_images = {batch.global_images}, training.microbatch_images = "
        f"{batch.microbatch_images}, data-parallel ranks = {dp}: {batch.accumulation_steps} "
        f"micro-batches in a step, parallel.virtual_stages = {virtual}",
        required=required,
        remedy=f"set {', or '.join(choices)}",
    )


def schedulable(microbatches: int, pp: int, virtual_stages: int) -> bool:
    """Whether `torch.distributed.pipelining` runs so many micro-batches on `pp` ranks."""
    if microbatches < pp:
        return False
    return virtual_stages == 1 or microbatches % (microbatches // pp) == 0


def _next(holds: Callable[[int], bool], above: int) -> int:
    return next(number for number in itertools.count(above + 1) if holds(number))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
