"""Published initial values, each drawn from its own generator keyed by (seed, parameter name).

A value therefore depends on nothing but the seed, the name and the published (unpadded) shape: not
on the order of construction, the number of registers, or which other parameters a process holds.
RAE-DiT draws Xavier-uniform linears with zero bias, RAE-DiT^DH torch's default; embeddings,
AdaLN, output and registers are the same in both (docs/method.md §2). What was never published
(text parts) follows the rule of its variant; cross-attention starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from dsr_scale.base.random_keys import key
from dsr_scale.config.derive import hidden_width, padded_hidden_width
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import SwiGLU, TimestepEmbedder

Draw = Callable[[torch.Generator], Tensor]


def initial_values(model: DiT, seed: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and a function that draws its float32 CPU value, for every parameter and buffer.

    The model is only read for its names and sizes and may be on the meta device. Values are drawn
    when called, so a process can draw just the tensors it holds.
    """
    for name, draw in _draws(model):
        yield name, partial(_drawn, draw, key(seed, f"init/{name}"))


def _drawn(draw: Draw, seed: int) -> Tensor:
    return draw(torch.Generator().manual_seed(seed))


def _draws(model: DiT) -> Iterator[tuple[str, Draw]]:
    default = model.shape.head is not None
    swiglu_parts: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, SwiGLU):
            swiglu_parts |= {f"{path}.w12", f"{path}.w3"}
            yield from _swiglu(path, module, default=default)
        elif isinstance(module, nn.Linear):
            if path not in swiglu_parts:
                yield from _linear(path, module, default=default)
        elif isinstance(module, nn.Conv2d):
            matrix = (module.out_channels, module.weight[0].numel())
            yield f"{path}.weight", _reshaped(_xavier(*matrix), module.weight.shape)
            yield f"{path}.bias", _constant(0.0, module.out_channels)
        elif isinstance(module, nn.Embedding):
            # Bytes stand beside sin-cos positions of unit size; classes are added to t_emb.
            std = 1.0 if path.endswith("byte_table") else 0.02
            yield f"{path}.weight", _normal(std, *module.weight.shape)
        else:
            if isinstance(module, TimestepEmbedder):
                yield f"{path}.W", _normal(1.0, *module.W.shape)
            for leaf, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{leaf}".lstrip("."), _bare(leaf, parameter)


def _bare(leaf: str, parameter: Tensor) -> Draw:
    """Parameters that belong to no linear: norm weights, registers, queries, null tokens, biases of
    attention."""
    shape = parameter.shape
    if leaf == "weight":
        return _constant(1.0, *shape)
    if leaf.endswith("register_tokens"):
        return _normal(1.0, *shape)
    if leaf == "queries":
        return _normal(1 / math.sqrt(shape[-1]), *shape)
    assert leaf in ("null_token", "key", "value"), leaf
    return _normal(0.02, *shape)


def _linear(path: str, module: nn.Linear, *, default: bool) -> Iterator[tuple[str, Draw]]:
    out_width, in_width = module.weight.shape
    starts_at_zero = (
        path.endswith("adaLN_modulation.1")
        or path == "final_layer.linear"
        or (path.startswith("blocks.") and path.endswith(".cross.proj"))
    )
    if starts_at_zero:
        yield f"{path}.weight", _constant(0.0, out_width, in_width)
        yield f"{path}.bias", _constant(0.0, out_width)
        return
    weight, bias = _published_linear(out_width, in_width, default=default)
    if path.startswith("t_embedder."):
        weight = _normal(0.02, out_width, in_width)
    yield f"{path}.weight", weight
    yield f"{path}.bias", bias


def _published_linear(out_width: int, in_width: int, *, default: bool) -> tuple[Draw, Draw]:
    """Weight and bias: torch's default for a linear, or Xavier-uniform and zero."""
    if default:
        bound = 1 / math.sqrt(in_width)
        return _uniform(bound, out_width, in_width), _uniform(bound, out_width)
    return _xavier(out_width, in_width), _constant(0.0, out_width)


def _swiglu(path: str, module: SwiGLU, *, default: bool) -> Iterator[tuple[str, Draw]]:
    """Draws the published shapes and pads them with zeros."""
    width = module.w3.out_features
    hidden = hidden_width(width)
    padding = padded_hidden_width(width) - hidden
    weight, bias = _published_linear(2 * hidden, width, default=default)
    yield f"{path}.w12.weight", lambda generator: pad_halves(weight(generator), padding)
    yield f"{path}.w12.bias", lambda generator: pad_halves(bias(generator), padding)
    weight3, bias3 = _published_linear(width, hidden, default=default)
    yield (
        f"{path}.w3.weight",
        lambda generator: pad_columns(weight3(generator), padding),
    )
    yield f"{path}.w3.bias", bias3


def pad_halves(w12: Tensor, padding: int) -> Tensor:
    """w12 weight or bias with `padding` zero rows after each half [a|b]: [2·h, …] → [2·(h+padding), …]."""
    halves = w12.unflatten(0, (2, -1))
    zeros = halves.new_zeros(2, padding, *w12.shape[1:])
    return torch.cat([halves, zeros], dim=1).flatten(0, 1)


def pad_columns(w3: Tensor, padding: int) -> Tensor:
    """w3 weight with `padding` zero columns: [D, h] → [D, h+padding]."""
    return torch.cat([w3, w3.new_zeros(len(w3), padding)], dim=1)


def _normal(std: float, *shape: int) -> Draw:
    return lambda generator: torch.randn(shape, generator=generator) * std


def _uniform(bound: float, *shape: int) -> Draw:
    return lambda generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _xavier(out_width: int, in_width: int) -> Draw:
    return _uniform(math.sqrt(6 / (in_width + out_width)), out_width, in_width)


def _constant(value: float, *shape: int) -> Draw:
    return lambda generator: torch.full(shape, value)


def _reshaped(draw: Draw, shape: torch.Size) -> Draw:
    return lambda generator: draw(generator).reshape(shape)
