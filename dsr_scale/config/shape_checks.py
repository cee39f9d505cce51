"""What makes a network's sizes fit together: the rules, once, for run files and for built models.

`checks.py` applies each rule to a run file, so that one wrong size hides no other problem;
`check_shape` applies all of them to a `ModelShape`, which may come from a checkpoint or a test.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.model import HeadConfig
from dsr_scale.config.problems import raise_problems

Problems = Iterator[InputError]


def check_shape(shape: ModelShape) -> None:
    """Raises InputError with everything in `shape` that does not fit together."""
    problems = [
        *width_problems(shape.width, shape.heads, shape.head),
        *register_problems(
            shape.registers, shape.register_start, shape.depth, masked=shape.registers_masked
        ),
        *patch_problems("data.resolution", shape.grid, shape.patch),
        *flash_problems(shape.attention, shape.conditioning.kind),
    ]
    if shape.conditioning.kind != "class" and shape.text_kind == "none":
        problems.append(no_text(shape.conditioning.kind))
    raise_problems("the model", problems)


def width_problems(width: int, heads: int, head: HeadConfig | None) -> Problems:
    """Widths of body and head over their attention heads, RoPE pairs and fixed positions."""
    yield from _stack("model", width, heads)
    if head is not None:
        yield from _stack("model.head", head.width, head.heads)


def _stack(name: str, width: int, heads: int) -> Problems:
    found = f"{name}.width = {width}, {name}.heads = {heads}"
    if width % heads:
        yield InputError(
            found=found,
            required="a width divisible by the number of heads",
            remedy=f"set {name}.heads to one of {_divisors(width)}",
        )
    elif (width // heads) % 4:
        yield InputError(
            found=f"{found}: {width // heads} channels per head",
            required="channels per head divisible by 4: RoPE turns pairs, half of them per axis",
            remedy=f"set {name}.width to a multiple of {4 * heads}",
        )
    if width % 4:
        yield InputError(
            found=f"{name}.width = {width}",
            required="a width divisible by 4: sine and cosine of two axes",
            remedy=f"set {name}.width to {width + 4 - width % 4}",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0 and number // n >= 4)


def register_problems(count: int, start: int, depth: int, *, masked: bool) -> Problems:
    """`count` registers that enter at block `start` of a body of `depth` blocks, or hide there."""
    if masked and not count:
        yield InputError(
            found="model.registers.masked = true, model.registers.count = 0",
            required="registers to hide",
            remedy="set model.registers.count, or model.registers.masked to false",
        )
    if count and start >= depth:
        yield InputError(
            found=f"model.registers.start = {start} in a body of {depth} blocks",
            required=f"a block from 0 to {depth - 1}",
            remedy=f"set model.registers.start to at most {depth - 1}, or model.registers.count "
            "to 0; left out, the start is the published ceil(2·depth/7)",
        )


def patch_problems(name: str, grid: tuple[int, int], patch: int) -> Problems:
    """A latent grid, of the image size that `name` sets, cut into patches."""
    if grid[0] % patch or grid[1] % patch:
        yield InputError(
            found=f"{name}: a latent grid of {grid[0]}×{grid[1]} cells, model.patch = {patch}",
            required="a grid divisible by the patch",
            remedy=f"change model.patch or {name}",
        )


def flash_problems(attention: str, conditioning: str) -> Problems:
    """flash-attn takes no mask."""
    if attention == "flash" and conditioning == "in_context":
        yield InputError(
            found="model.attention = flash, model.conditioning.kind = in_context",
            required="attention that takes a mask, to leave out padded caption tokens",
            remedy="set model.attention to sdpa, or choose another model.conditioning.kind",
        )


def no_text(conditioning: str) -> InputError:
    """Conditioning on text without a text encoder."""
    return InputError(
        found=f"model.conditioning.kind = {conditioning}, encoders.text.kind = none",
        required="a text encoder for text conditioning",
        remedy="set encoders.text.kind to transformers or bytes, or model.conditioning.kind "
        "to class",
    )
