"""Weights of RAE and DSR as they were published, in this project's network and back.

What is learned has the same name here and there. Two things differ: the released SwiGLU is not padded,
and released state dicts store the fixed positions that this network computes. So a conversion is a
padding and a comparison; nothing is renamed, and learned tensors come back bit for bit.

The comparison cannot be as exact for all positions. Rotary tables are buffers and stay as they were
made. Sin-cos tables are parameters that do not train, and the released trainer averages them with
the rest: in fp32, 0.9999·x + 0.0001·x is not x but settles at 0.9998·x after some 2500 steps. An average
is therefore accepted with that drift, which `check_published` returns, and samples with exact tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape, hidden_width
from dsr_scale.config.model import ClassConditioning, HeadConfig
from dsr_scale.config.shape_checks import check_shape
from dsr_scale.model.build import build_on_meta
from dsr_scale.model.initialisation import pad_columns, pad_halves
from dsr_scale.model.layout import Rows
from dsr_scale.model.positions import register_grid, rope, sincos_2d

FREQUENCIES = "t_embedder.W"
"""Stored and neither trained nor computed; the released trainer averages it all the same."""
TABLE_TOLERANCE = 1e-5
"""Largest difference between a released rotary table, made in float32, and ours."""
AVERAGED_TOLERANCE = 5e-4
"""The same for sin-cos tables, whose average drifts; another order of axes differs by about 1."""

_SWIGLU = re.compile(r"(blocks\.\d+)\.mlp\.(w12\.weight|w12\.bias|w3\.weight)")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Unstated:
    """What a released state dict does not say; None is the published rule or what the tables say."""

    register_start: int | None = None
    """Block where registers enter; None is ceil(2·depth/7)."""
    heads: int | None = None
    """Attention heads of the body; needed where the rotary tables were left out."""
    head_heads: int | None = None
    """The same of the DDT head."""
    head_depth: int = 2
    """Blocks of the DDT head; read only where it is as wide as the body."""


def infer_shape(state: Mapping[str, Tensor], unstated: Unstated) -> ModelShape:
    """The network of a released state dict.

    Raises InputError when a tensor that says a size is missing or is of another kind of network.
    """
    ddt = "s_embedder.proj.weight" in state
    embedder = "s_embedder" if ddt else "x_embedder"
    width, channels, patch, _ = _sizes(state, f"{embedder}.proj.weight", 4)
    side = math.isqrt(_sizes(state, "pos_embed", 3)[1]) * patch
    numbers = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    depth = max(numbers, default=-1) + 1
    head = None
    if ddt:
        head_width = _sizes(state, "x_embedder.proj.weight", 4)[0]
        norms = [state.get(f"blocks.{number}.norm1.weight") for number in range(depth)]
        wide = sum(norm is not None and len(norm) == head_width for norm in norms)
        head = HeadConfig(
            width=head_width,
            depth=max(1, unstated.head_depth if head_width == width else wide),
            heads=unstated.head_heads or _heads(state, "dec_feat_rope", head_width, "head_heads"),
        )
        depth -= head.depth
    body = "enc_" if ddt else ""
    tokens = state.get(f"{body}register_tokens")
    start = unstated.register_start
    shape = ModelShape(
        width=width,
        depth=depth,
        heads=unstated.heads or _heads(state, f"{body}feat_rope", width, "heads"),
        head=head,
        patch=patch,
        channels=channels,
        grid=(side, side),
        registers=0 if tokens is None else _sizes(state, f"{body}register_tokens", 3)[1],
        register_start=math.ceil(2 * depth / 7) if start is None else start,
        conditioning=ClassConditioning(
            num_classes=_sizes(state, "y_embedder.embedding_table.weight", 2)[0] - 1
        ),
        text_kind="none",
        text_channels=0,
        text_length=0,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        attention="sdpa",
    )
    check_shape(shape)
    return shape


def _sizes(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    held = state.get(name)
    if held is None or held.dim() != dims or 0 in held.shape:
        raise InputError(
            found=f"no {name}" if held is None else f"{name} of shape {list(held.shape)}",
            required=f"{name} with {dims} dimensions, as in every RAE-DiT",
            remedy="give a class-conditional RAE-DiT or RAE-DiT^DH of RAE or DSR",
        )
    return tuple(held.shape)


def _heads(state: Mapping[str, Tensor], table: str, width: int, option: str) -> int:
    name = f"{table}.freqs_cos"
    if name not in state:
        raise InputError(
            found=f"no {name}, which has one column for each channel of a head",
            required="the number of attention heads",
            remedy=f"give it: --{option.replace('_', '-')}",
        )
    return max(1, width // _sizes(state, name, 2)[1])


def fixed_positions(shape: ModelShape) -> dict[str, Tensor]:
    """Every position that a released state dict stores, float32 by name.

    `pos_embed` [1,T,D], `…register_pos_embed` [1,K,·], and rotary tables [N, head_dim] in which each
    frequency stands twice, for the two adjacent channels that it turns.
    """
    ddt, registers = shape.head is not None, shape.registers
    grid = (shape.grid[0] // shape.patch, shape.grid[1] // shape.patch)
    stacks = [("enc_" if ddt else "", shape.width, shape.heads)]
    if shape.head is not None:
        stacks.append(("dec_", shape.head.width, shape.head.heads))
    fixed = {"pos_embed": sincos_2d(grid, shape.width, _CPU)[None]}
    for prefix, width, heads in stacks:
        if registers:
            table = sincos_2d(register_grid(registers), width, _CPU)
            fixed[f"{prefix}register_pos_embed"] = table[None]
        for suffix, rows in (("", 0), ("_incontext", registers))[: 2 if registers else 1]:
            tables = rope(Rows(rows, 0, shape.image_tokens), grid, width // heads, _CPU)
            for part, table in zip(("cos", "sin"), tables, strict=True):
                name = f"{prefix}feat_rope{suffix}.freqs_{part}"
                fixed[name] = table.repeat_interleave(2, dim=1)
    return fixed


def check_published(state: Mapping[str, Tensor], shape: ModelShape, source: str) -> float:
    """Refuses a state dict that is not exactly a released network of `shape`; `source` names it.

    Rotary tables may be left out, all of them together. Returns the largest difference of a stored
    sin-cos position from the computed one. Raises InputError naming every key that is unknown,
    missing, of another shape, or a position with other values.
    """
    fixed = fixed_positions(shape)
    tables = {name for name in fixed if "feat_rope" in name}
    if not tables & state.keys():
        fixed = {name: table for name, table in fixed.items() if name not in tables}
    sizes = {name: cut for name, (_, cut) in _learned_sizes(shape).items()}
    sizes |= {name: table.shape for name, table in fixed.items()}
    problems = [f"{name} is missing" for name in sizes if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in sizes]
    drift = 0.0
    for name in sizes.keys() & state.keys():
        held = state[name]
        if held.shape != sizes[name] or not held.is_floating_point():
            problems.append(
                f"{name} is {held.dtype} {list(held.shape)}, not floating {list(sizes[name])}"
            )
        elif name in fixed:
            difference = float((held.float() - fixed[name]).abs().max())
            limit = TABLE_TOLERANCE if name in tables else AVERAGED_TOLERANCE
            # Written so that NaN is a problem too.
            if not difference <= limit:
                problems.append(
                    f"{name} differs by up to {difference:.2g} from the fixed positions"
                )
            elif name not in tables:
                drift = max(drift, difference)
    if problems:
        raise InputError(
            found=f"{source}: " + "; ".join(sorted(problems)),
            required=f"the released network with {_described(shape)}",
            remedy="give a checkpoint of RAE-DiT or RAE-DiT^DH, and the heads and depth it was built "
            "with; other variants of the released code cannot be converted",
        )
    return drift


def _described(shape: ModelShape) -> str:
    stacks = [(shape.width, shape.depth, shape.heads)]
    if shape.head is not None:
        stacks.append((shape.head.width, shape.head.depth, shape.head.heads))
    sizes = " and ".join(f"{w} wide, {d} deep, {h} heads" for w, d, h in stacks)
    return (
        f"{sizes}, patch {shape.patch}, {shape.channels} channels on {shape.grid[0]}×{shape.grid[1]}, "
        f"{shape.registers} registers"
    )


def _learned_sizes(shape: ModelShape) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Name → the size here, padded, and the size as released, of all that is not computed."""
    held = {name: tensor.shape for name, tensor in build_on_meta(shape).state_dict().items()}
    sizes = {}
    for name, padded in held.items():
        released = list(padded)
        if part := _SWIGLU.fullmatch(name):
            hidden = hidden_width(held[f"{part[1]}.norm1.weight"][0])
            if part[2] == "w3.weight":
                released[1] = hidden
            else:
                released[0] = 2 * hidden
        sizes[name] = padded, torch.Size(released)
    return sizes


def from_published(values: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Checked weights, or moments of some of them, as this network has them: float32, padded.

    What is computed here is left out.
    """
    sizes = _learned_sizes(shape)
    return {
        name: _padded(name, value.detach().float(), sizes[name][0])
        for name, value in values.items()
        if name in sizes
    }


def _padded(name: str, value: Tensor, size: torch.Size) -> Tensor:
    if value.shape == size:
        return value
    if name.endswith(".mlp.w3.weight"):
        return pad_columns(value, size[1] - value.shape[1])
    return pad_halves(value, (size[0] - value.shape[0]) // 2)


def to_published(values: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """A released state dict of this network's weights and saved buffers: float32, positions included.

    Raises InputError for a network that the released code cannot hold, or padding that computes.
    """
    _check_publishable(shape)
    sizes = _learned_sizes(shape)
    assert values.keys() == sizes.keys(), values.keys() ^ sizes.keys()
    released = fixed_positions(shape)
    for name, value in values.items():
        released[name] = _cut(name, value.detach().float(), sizes[name][1])
    return released


def _cut(name: str, value: Tensor, size: torch.Size) -> Tensor:
    if value.shape == size:
        return value
    if name.endswith(".mlp.w3.weight"):
        kept, padding = value[:, : size[1]], value[:, size[1] :]
    else:
        halves = value.unflatten(0, (2, -1))
        kept, padding = halves[:, : size[0] // 2].flatten(0, 1), halves[:, size[0] // 2 :]
    if padding.count_nonzero():
        raise InputError(
            found=f"{name} with values in its padding",
            required="zeros there, as training leaves them",
            remedy="these weights were changed outside training; export the run's checkpoint again",
        )
    return kept.contiguous()


def _check_publishable(shape: ModelShape) -> None:
    lacking = {
        "class conditioning": shape.conditioning.kind == "class",
        "a square latent grid": shape.grid[0] == shape.grid[1],
        "a square number of registers": math.isqrt(shape.registers) ** 2 == shape.registers,
        "registers that all tokens see": not shape.registers_masked,
        "plain attention": shape.attention_variant == "plain",
    }
    wrong = [what for what, fits in lacking.items() if not fits]
    if wrong:
        raise InputError(
            found=f"a network without {', '.join(wrong)}",
            required="what the released code can hold",
            remedy="keep the bundle; there is no released form of this network",
        )
