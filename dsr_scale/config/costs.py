"""What a network costs, from its shape alone: parameters and FLOPs per image.

FLOPs are counted from the shapes of the matrix products and not as 6·parameters·tokens: a third of
a DiT's weights are AdaLN projections, which run once per image, so that rule overstates DiT-XL by
1.46. Torch is not needed; that the counts are those of the real model is tested.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dsr_scale.config.derive import (
    BYTE_LAYERS,
    BYTE_VOCABULARY,
    FREQUENCIES,
    ModelShape,
    hidden_width,
    padded_hidden_width,
)
from dsr_scale.config.model import ClassConditioning, QueryAdaLNConditioning

MEASURED_CEILING_TFLOPS = {"H200": 790.0}
"""bf16 matrix products, TFLOP/s, measured outside this repository (docs/method.md §7)."""

DATASHEET_CEILING_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 SXM": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
"""Dense bf16 on tensor cores, TFLOP/s per GPU, from NVIDIA's data sheets: A100 (SXM and PCIe alike),
H100, H200 (SXM), HGX B200. The sheets from H100 on print twice as much, for 2:4 sparsity."""

_DEVICE_NAMES = {
    r"\bA100\b": "A100",
    r"\bH100 PCIe\b": "H100 PCIe",
    r"\bH100\b.*\b(HBM3|SXM\d?)\b": "H100 SXM",
    r"\bH200\b(?! NVL)": "H200",
    r"\bB200\b": "B200",
}


def gpu_kind(device_name: str) -> str | None:
    """Which GPU of the tables above the driver calls `device_name`; None for another, or a part of
    one."""
    if re.search(r"\bMIG\b", device_name):
        return None
    kinds = (kind for name, kind in _DEVICE_NAMES.items() if re.search(name, device_name))
    return next(kinds, None)


class Count(NamedTuple):
    """Parameters of one part."""

    published: int
    """With the published hidden width, int(2/3 · 4 · width)."""
    stored: int
    """As held in memory, the hidden width padded."""

    def __add__(self, other: object) -> Count:
        assert isinstance(other, Count)
        return Count(self.published + other.published, self.stored + other.stored)

    def times(self, number: int) -> Count:
        """The same part `number` times."""
        return Count(self.published * number, self.stored * number)


def parameters(shape: ModelShape) -> dict[str, Count]:
    """Trained parameters by part; their sum is the number of parameters of the built model.

    `body` is the blocks without AdaLN and without cross-attention; `head` and `final` include
    their own AdaLN; `conditioning` is the class table or everything that reads the caption.
    """
    width, head = shape.width, shape.head
    cells = shape.channels * shape.patch**2
    out_width = head.width if head else width
    registers = shape.registers * width
    head_count = _exact(0)
    if head:
        registers += shape.registers * head.width
        projector = 0 if head.width == width else _linear(width, head.width)
        block = _self_block(head.width, head.heads, shape.qk_norm) + _adaln(head.width)
        block += _exact(variant_parameters(shape, head.width, head.heads))
        head_count = block.times(head.depth) + _exact(_linear(cells, head.width) + projector)
    timestep = _linear(2 * FREQUENCIES, width) + _linear(width, width)
    body = _self_block(width, shape.heads, shape.qk_norm)
    body += _exact(variant_parameters(shape, width, shape.heads))
    return {
        "embedders": _exact(_linear(cells, width) + timestep),
        "body": body.times(shape.depth),
        "AdaLN": _adaln(width).times(shape.depth),
        "registers": _exact(registers),
        "conditioning": _conditioning(shape),
        "head": head_count,
        "final": _exact(out_width + _linear(out_width, 2 * out_width) + _linear(out_width, cells)),
    }


def total(counts: dict[str, Count]) -> Count:
    """The sum over parts."""
    return sum(counts.values(), start=Count(0, 0))


def _exact(number: int) -> Count:
    return Count(number, number)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _attention(width: int, heads: int, qk_norm: bool) -> int:
    norms = 2 * (width // heads) if qk_norm else 0
    return _linear(width, 3 * width) + _linear(width, width) + norms


def _swiglu(width: int) -> Count:
    def count(hidden: int) -> int:
        return _linear(width, 2 * hidden) + _linear(hidden, width)

    return Count(count(hidden_width(width)), count(padded_hidden_width(width)))


def _self_block(width: int, heads: int, qk_norm: bool) -> Count:
    """Two norms, self-attention, SwiGLU."""
    return _exact(2 * width + _attention(width, heads, qk_norm)) + _swiglu(width)


def variant_parameters(shape: ModelShape, width: int, heads: int) -> int:
    """What `attention_variant` adds to a block of body or head; all of it divides over heads."""
    match shape.attention_variant:
        case "bias":
            return 2 * width
        case "gated":
            return _linear(width, heads)
        case _:
            return 0


def _adaln(width: int) -> Count:
    return _exact(_linear(width, 6 * width))


def _cross_attention(width: int) -> int:
    """Query, key-value and output projections."""
    return _linear(width, width) + _linear(width, 2 * width) + _linear(width, width)


def _conditioning(shape: ModelShape) -> Count:
    width = shape.width
    match shape.conditioning:
        case ClassConditioning(num_classes=classes):
            return _exact((classes + 1) * width)
        case QueryAdaLNConditioning(connector_depth=depth):
            queries = shape.image_tokens * width
            layer = _exact(2 * width + _cross_attention(width)) + _swiglu(width)
            rest = _exact(queries + width + width + _linear(width, width))
            return _text_tokens(shape) + layer.times(depth) + rest
        case conditioning:
            pooled = _exact(width + 2 * _linear(width, width))
            cross = 0
            if conditioning.kind == "cross_attention":
                cross = shape.depth * (width + _cross_attention(width))
            return _text_tokens(shape) + pooled + _exact(cross)


def _text_tokens(shape: ModelShape) -> Count:
    if shape.text_kind == "features":
        return _exact(_linear(shape.text_channels, shape.width))
    layers = _self_block(shape.width, shape.heads, qk_norm=False).times(BYTE_LAYERS)
    return layers + _exact(BYTE_VOCABULARY * shape.width)


def forward_flops(shape: ModelShape) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of one forward of one image, by part; training costs three times.

    Source: docs/method.md §7. Matrix products only, with the published hidden width; captions
    count at their padded length.
    """
    width, head = shape.width, shape.head
    image, text = shape.image_tokens, shape.text_length
    per_token = shape.conditioning.kind == "query_adaln"
    body = adaln = cross = 0
    for block, rows in enumerate(body_rows(shape)):
        body += block_flops(width, rows) + variant_flops(shape, block)
        adaln += adaln_flops(width, rows if per_token else 1)
        if shape.conditioning.kind == "cross_attention":
            cross += cross_flops(width, rows, text)
    embedders = patch_flops(shape, width) + timestep_flops(width)
    head_flops = 0
    if head is not None:
        rows = image + shape.registers
        head_flops = head.depth * (block_flops(head.width, rows) + adaln_flops(head.width, rows))
        head_flops += head.depth * variant_flops(shape, shape.depth) + head_entry_flops(shape)
    return {
        "embedders": embedders,
        "body": body,
        "AdaLN": adaln,
        "conditioning": cross + text_flops(shape),
        "head": head_flops,
        "final": final_flops(shape),
    }


def body_rows(shape: ModelShape) -> list[int]:
    """Rows inside each body block: image, text in context, registers from their start."""
    text = shape.text_length if shape.conditioning.kind == "in_context" else 0
    return [shape.image_tokens + text + shape.registers_in(block) for block in range(shape.depth)]


def training_flops(shape: ModelShape) -> int:
    """FLOPs of forward and backward of one image: three forwards."""
    return 3 * sum(forward_flops(shape).values())


def patch_flops(shape: ModelShape, width: int) -> int:
    """The patch embedding of the image tokens, to `width`."""
    return shape.image_tokens * 2 * shape.channels * shape.patch**2 * width


def timestep_flops(width: int) -> int:
    """The timestep embedding, once per image."""
    return 2 * (2 * FREQUENCIES * width + width * width)


def head_entry_flops(shape: ModelShape) -> int:
    """What stands before the head's first block: its own patch embedding and the projector of the
    body's output; 0 without a head."""
    if shape.head is None:
        return 0
    rows, width = shape.image_tokens + shape.registers, shape.head.width
    projector = 0 if width == shape.width else rows * 2 * shape.width * width
    return patch_flops(shape, width) + projector


def final_flops(shape: ModelShape) -> int:
    """The final layer: modulated per token after a head or under query_adaln, else once."""
    width = shape.head.width if shape.head else shape.width
    per_token = shape.head is not None or shape.conditioning.kind == "query_adaln"
    modulations = shape.image_tokens if per_token else 1
    return patch_flops(shape, width) + 4 * width**2 * modulations


def block_flops(width: int, rows: int) -> int:
    """Self-attention and SwiGLU over `rows` tokens."""
    return rows * (8 * width**2 + 6 * width * hidden_width(width)) + 4 * rows**2 * width


def variant_flops(shape: ModelShape, block: int) -> int:
    """What the attention of a block computes beyond `block_flops`; below 0 where registers are masked.

    `bias` and `off_by_one` are one more key, `gated` one more output feature per head; queries that
    do not see the registers save their products with them.
    """
    if block < shape.depth:
        width, heads, rows = shape.width, shape.heads, body_rows(shape)[block]
    else:
        assert shape.head is not None
        width, heads = shape.head.width, shape.head.heads
        rows = shape.image_tokens + shape.registers
    hidden = shape.registers_in(block) if shape.registers_masked else 0
    flops = -4 * hidden * (rows - hidden) * width
    match shape.attention_variant:
        case "bias" | "off_by_one":
            flops += 4 * rows * width
        case "gated":
            flops += 2 * rows * width * heads
        case "plain":
            pass
    return flops


def adaln_flops(width: int, rows: int) -> int:
    """The modulation of a block, `rows` times."""
    return 12 * width**2 * rows


def cross_flops(width: int, rows: int, text: int) -> int:
    """`rows` queries that read `text` tokens."""
    return 4 * rows * width**2 + 4 * text * width**2 + 4 * rows * text * width


def text_flops(shape: ModelShape) -> int:
    """From text features or bytes to what the blocks take, cross-attention in the blocks aside."""
    width, text, image = shape.width, shape.text_length, shape.image_tokens
    if shape.text_kind == "none":
        return 0
    if shape.text_kind == "features":
        tokens = 2 * text * shape.text_channels * width
    else:
        tokens = BYTE_LAYERS * block_flops(width, text)
    match shape.conditioning:
        case QueryAdaLNConditioning(connector_depth=depth):
            layer = cross_flops(width, image, text) + image * 6 * width * hidden_width(width)
            return tokens + depth * layer + 2 * image * width**2
        case _:
            return tokens + 4 * width**2
