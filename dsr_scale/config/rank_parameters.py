"""Parameters that one rank holds: of the blocks of its stages, its tensor rank's part.

The counts follow the table of `parallel/tensor_plan.py` without knowing it (and without torch); a
test compares both with the built model. What stands between the matrix products stays whole on every
tensor rank, and with it the AdaLN of per-token conditions, a third of the parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from dsr_scale.config.costs import variant_parameters
from dsr_scale.config.derive import (
    BYTE_LAYERS,
    BYTE_VOCABULARY,
    FREQUENCIES,
    ModelShape,
    padded_hidden_width,
)
from dsr_scale.config.model import ClassConditioning, QueryAdaLNConditioning


class Share(NamedTuple):
    """Parameters by what tensor ranks do with them."""

    split: int = 0
    """Divided over the tensor ranks."""
    heads: int = 0
    """Whole on each, applied to its heads: gradients are summed over the tensor ranks."""
    tokens: int = 0
    """Whole on each, applied to its tokens: gradients are summed under sequence parallelism."""
    whole: int = 0
    """Whole on each, with equal gradients."""

    def plus(self, *others: Share) -> Share:
        """The sum, kind by kind."""
        total = self
        for other in others:
            total = Share(*map(operator.add, total, other))
        return total

    def times(self, number: int) -> Share:
        """The same `number` times."""
        return Share(*(number * count for count in self))

    def on_rank(self, tp: int) -> int:
        """Parameters on each of `tp` tensor ranks."""
        return self.split // tp + self.heads + self.tokens + self.whole

    def summed(self, tp: int, sp: bool) -> int:
        """Parameters whose gradients are summed over the tensor ranks."""
        if tp == 1:
            return 0
        return self.heads + (self.tokens if sp else 0)


def block_share(shape: ModelShape, block: int) -> Share:
    """One block of body or head, without what sits at the ends."""
    head = shape.head
    if block >= shape.depth:
        assert head is not None
        width, heads = head.width, head.heads
    else:
        width, heads = shape.width, shape.heads
    per_token = block >= shape.depth or shape.conditioning.kind == "query_adaln"
    modulation = _linear(width, 6 * width)
    share = _self_attention(width).plus(
        _swiglu(width),
        Share(tokens=2 * width),
        Share(heads=2 * (width // heads) if shape.qk_norm else 0),
        Share(split=variant_parameters(shape, width, heads)),
        Share(tokens=modulation) if per_token else Share(split=modulation),
    )
    if block < shape.depth and shape.conditioning.kind == "cross_attention":
        share = share.plus(_cross_attention(width), Share(tokens=width))
    return share


def embedder_share(shape: ModelShape) -> Share:
    """Timestep and condition: what every pipeline rank has a copy of."""
    width = shape.width
    match shape.conditioning:
        case ClassConditioning(num_classes=classes):
            condition = Share(whole=(classes + 1) * width)
        case QueryAdaLNConditioning(connector_depth=depth):
            layer = _cross_attention(width).plus(_swiglu(width), Share(whole=2 * width))
            rest = (shape.image_tokens + 2) * width + _linear(width, width)
            condition = _text_tokens(shape).plus(
                _unsequenced(layer).times(depth), Share(whole=rest)
            )
        case _:
            pooled = width + 2 * _linear(width, width)
            condition = _text_tokens(shape).plus(Share(whole=pooled))
    timestep = _linear(2 * FREQUENCIES, width) + _linear(width, width)
    return condition.plus(Share(whole=timestep))


def rank_share(shape: ModelShape, spans: Sequence[range]) -> Share:
    """A pipeline rank whose stages hold the blocks in `spans`: these, and one copy of the embedders."""
    return embedder_share(shape).plus(*(_stage_share(shape, span) for span in spans))


def _stage_share(shape: ModelShape, span: range) -> Share:
    """The blocks in `span` and what sits at the ends."""
    width, head = shape.width, shape.head
    cells = shape.channels * shape.patch**2
    out_width = head.width if head else width
    share = Share().plus(*(block_share(shape, block) for block in span))
    if span.start == 0:
        share = share.plus(Share(whole=_linear(cells, width)))
    if shape.register_start in span:
        share = share.plus(Share(whole=shape.registers * width))
    if head is not None and shape.depth in span:
        projector = 0 if head.width == width else _linear(width, head.width)
        entry = _linear(cells, head.width) + shape.registers * head.width
        share = share.plus(Share(tokens=projector, whole=entry))
    if span.stop == shape.depth + (head.depth if head else 0):
        modulation = _linear(out_width, 2 * out_width)
        share = share.plus(Share(whole=out_width + modulation + _linear(out_width, cells)))
    return share


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _column(inputs: int, outputs: int) -> Share:
    return Share(split=_linear(inputs, outputs))


def _row(inputs: int, outputs: int) -> Share:
    return Share(split=inputs * outputs, tokens=outputs)


def _self_attention(width: int) -> Share:
    return _column(width, 3 * width).plus(_row(width, width))


def _cross_attention(width: int) -> Share:
    return _column(width, width).plus(_column(width, 2 * width), _row(width, width))


def _swiglu(width: int) -> Share:
    hidden = padded_hidden_width(width)
    return _column(width, 2 * hidden).plus(_row(hidden, width))


def _text_tokens(shape: ModelShape) -> Share:
    if shape.text_kind == "features":
        return Share(whole=_linear(shape.text_channels, shape.width))
    layer = _self_attention(shape.width).plus(_swiglu(shape.width), Share(whole=2 * shape.width))
    table = Share(whole=BYTE_VOCABULARY * shape.width)
    return _unsequenced(layer).times(BYTE_LAYERS).plus(table)


def _unsequenced(share: Share) -> Share:
    """The same among captions and queries, which sequence parallelism does not divide."""
    return Share(split=share.split, whole=share.tokens + share.whole)
