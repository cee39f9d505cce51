"""Bytes that one rank puts into collectives in one optimizer step, by what they are for.

Every figure is a payload: the size of the tensor that a rank passes to the call, whatever the
algorithm then sends. An all-reduce of n bytes counts n; an all-gather counts the rank's own piece; a
reduce-scatter counts the whole that is to be summed. So a test can compare with counted calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dsr_scale.config.costs import body_rows
from dsr_scale.config.derive import BYTE_LAYERS, ModelShape, ParallelLayout
from dsr_scale.config.model import QueryAdaLNConditioning
from dsr_scale.config.rank_parameters import embedder_share, rank_share
from dsr_scale.config.run import RunConfig
from dsr_scale.config.stages import cut_stages, num_blocks, stages_of_rank

GRADIENT_BYTES = 4
"""Accumulated gradients are fp32 and travel so, also in bf16 training."""


class Wire(NamedTuple):
    """Payload bytes of one rank and step."""

    tensor_all_reduce: int
    """Activations and their gradients between tensor ranks."""
    tensor_all_gather: int
    """Token shards under sequence parallelism, and the modulations of image-level AdaLN."""
    tensor_reduce_scatter: int
    """The same on the way back."""
    tensor_gradients: int
    """Gradients of weights that every tensor rank holds whole and applies to its own part."""
    pipeline_sent: int
    """Activations forward and gradients backward, point to point."""
    pipeline_gradients: int
    """Gradients of the embedders that every stage has a copy of."""
    data_gradients: int
    """Gradients over data-parallel ranks."""
    data_parameters: int
    """Weights gathered from the ranks that own them."""

    @property
    def total(self) -> int:
        """Sum of the items."""
        return sum(self)


class TensorPayload(NamedTuple):
    """Elements that a rank passes to the tensor group, by call."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def plus(self, other: TensorPayload) -> TensorPayload:
        """The sum, call by call."""
        return TensorPayload(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: int) -> TensorPayload:
        """The same `number` times."""
        return TensorPayload(*(number * count for count in self))


def wire_bytes(
    run: RunConfig,
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    microbatches: int,
    pipeline_rank: int,
) -> Wire:
    """Everything a rank passes on in a step of `microbatches` micro-batches."""
    parallel = run.parallel
    spans = cut_stages(shape, layout.pp * parallel.virtual_stages)
    held = [spans[s] for s in stages_of_rank(pipeline_rank, layout.pp, parallel.virtual_stages)]
    element = element_bytes(run)
    images = microbatches * run.training.microbatch_images
    payload = tensor_payload(run, shape, held, layout.tp).times(images)
    share = rank_share(shape, held)
    count = share.on_rank(layout.tp)
    sent = sum(boundary_elements(shape, span, spans) for span in held)
    embedders = embedder_share(shape).on_rank(layout.tp) if layout.pp > 1 else 0
    zero = parallel.zero
    return Wire(
        tensor_all_reduce=payload.all_reduce * element,
        tensor_all_gather=payload.all_gather * element,
        tensor_reduce_scatter=payload.reduce_scatter * element,
        tensor_gradients=microbatches * share.summed(layout.tp, parallel.sp) * element,
        pipeline_sent=images * sent * element // (layout.tp if parallel.sp else 1),
        pipeline_gradients=embedders * GRADIENT_BYTES,
        data_gradients=data_gradient_bytes(count, layout.dp, microbatches, zero),
        data_parameters=data_parameter_bytes(count, element, layout.dp, microbatches, zero),
    )


def element_bytes(run: RunConfig) -> int:
    """Bytes of a weight, of an activation and of the gradient of either within a replica."""
    return 2 if run.training.precision == "bf16" else 4


def tensor_payload(
    run: RunConfig, shape: ModelShape, held: Sequence[range], tp: int
) -> TensorPayload:
    """Elements per image of a rank's stages, forward and backward, the embedders' included.

    Each stage with body blocks embeds the condition and gathers the modulations of its body blocks.
    """
    if tp == 1:
        return TensorPayload()
    sp = run.parallel.sp
    payload = TensorPayload()
    for span in held:
        for block in span:
            payload = payload.plus(_block(run, shape, block, tp))
        if sp:
            payload = payload.plus(division_payload(shape, span, tp))
        if span.start < shape.depth:
            payload = payload.plus(TensorPayload(all_reduce=embedder_elements(shape)))
            if shape.conditioning.kind != "query_adaln":
                body = sum(1 for block in span if block < shape.depth)
                payload = payload.plus(modulation_payload(shape.width, body, tp, sp))
    return payload


def _block(run: RunConfig, shape: ModelShape, block: int, tp: int) -> TensorPayload:
    sp, recompute = run.parallel.sp, run.training.recompute
    # Selective recompute keeps what an all-reduce left, and gathers and scatters again.
    forwards = 2 if recompute == "full" or (recompute == "selective" and sp) else 1
    text = None
    if block >= shape.depth:
        assert shape.head is not None
        rows, width = shape.image_tokens + shape.registers, shape.head.width
    else:
        rows, width = body_rows(shape)[block], shape.width
        if shape.conditioning.kind == "cross_attention":
            text = shape.text_length
    payload = block_payload(rows, width, text, tp, sp, forwards)
    if shape.attention_variant == "gated":
        payload = payload.plus(gate_payload(rows, width, tp, sp, forwards))
    return payload


def block_payload(
    rows: int, width: int, text: int | None, tp: int, sp: bool, forwards: int
) -> TensorPayload:
    """Elements per image of one block: a pair of matrix products for attention, for cross-attention
    if it reads `text` rows, and for SwiGLU.

    Without sequence parallelism a pair all-reduces its output in each of `forwards` forwards and the
    gradient of its input in the backward. With it, the input is gathered and the output reduced and
    scattered; the backward does the converse, and gathers the input once more for the weights.
    """
    pairs = 2 if text is None else 3
    tokens = rows * width
    text_gradient = 0 if text is None else text * width
    if not sp:
        return TensorPayload(all_reduce=pairs * tokens * (forwards + 1) + text_gradient)
    return TensorPayload(
        all_reduce=text_gradient,
        all_gather=pairs * (tokens // tp) * (forwards + 2),
        reduce_scatter=pairs * tokens * (forwards + 1),
    )


def gate_payload(rows: int, width: int, tp: int, sp: bool, forwards: int) -> TensorPayload:
    """Elements per image of a gate, one more product of attention's input: its gradient is summed.
    Under sequence parallelism the input is gathered in each forward and once more for the weights."""
    tokens = rows * width
    if not sp:
        return TensorPayload(all_reduce=tokens)
    return TensorPayload(all_gather=(tokens // tp) * (forwards + 1), reduce_scatter=tokens)


def modulation_payload(width: int, blocks: int, tp: int, sp: bool) -> TensorPayload:
    """Elements per image of image-level AdaLN: the modulations of a stage's `blocks` in one gather.

    Backward, the condition's gradient is summed; under sequence parallelism each rank's tokens give
    a part of the modulations' gradient, which is summed and scattered first.
    """
    modulations = blocks * 6 * width
    return TensorPayload(
        all_reduce=width,
        all_gather=modulations // tp,
        reduce_scatter=modulations if sp else 0,
    )


def division_payload(shape: ModelShape, span: range, tp: int) -> TensorPayload:
    """Elements per image where a stage's tokens are divided (the gradient is gathered) or made whole
    (they are): at the entrances of body, registers and head, where text leaves, before the final
    layer. Per-token conditions are divided once for each length of the body's sequence.
    """
    width, head = shape.width, shape.head
    rows = body_rows(shape)
    tokens = shape.image_tokens + shape.registers
    in_context = shape.text_length if shape.conditioning.kind == "in_context" else 0
    before_registers = shape.image_tokens + in_context
    moved = 0
    if 0 in span:
        moved += before_registers * width
    if shape.registers and shape.register_start in span:
        moved += (before_registers + rows[shape.register_start]) * width
    if in_context and shape.depth - 1 in span:
        moved += (rows[-1] + tokens) * width
    if shape.conditioning.kind == "query_adaln":
        moved += sum({rows[block] for block in span if block < shape.depth}) * width
    if head is not None and shape.depth in span:
        moved += tokens * head.width
    if span.stop == num_blocks(shape):
        moved += tokens * (2 * head.width if head else width)
    enters_head = head is not None and shape.depth in span
    return TensorPayload(all_reduce=width if enters_head else 0, all_gather=moved // tp)


def embedder_elements(shape: ModelShape) -> int:
    """Elements per image that the caption's own blocks all-reduce, forward and backward."""
    width, text, image = shape.width, shape.text_length, shape.image_tokens
    elements = 0
    if shape.text_kind == "bytes":
        elements += BYTE_LAYERS * 4 * text * width
    match shape.conditioning:
        case QueryAdaLNConditioning(connector_depth=depth):
            elements += depth * (4 * image + text) * width
        case _:
            pass
    return elements


def boundary_elements(shape: ModelShape, span: range, spans: tuple[range, ...]) -> int:
    """Elements per image that the stage of `span` sends: its output forward, its input's gradient
    back. The first stage sends nothing back, the last nothing on."""
    forward = carried_elements(shape, span.stop) if span != spans[-1] else 0
    backward = carried_elements(shape, span.start) if span != spans[0] else 0
    return forward + backward


def carried_elements(shape: ModelShape, block: int) -> int:
    """Elements per image at the entrance of `block`: its tokens, and inside the head what modulates
    them. Noised latents, conditions and body modulations do not travel."""
    tokens = shape.image_tokens + shape.registers
    if block > shape.depth:
        assert shape.head is not None
        return 2 * tokens * shape.head.width
    rows = tokens if block == shape.depth else body_rows(shape)[block - 1]
    return rows * shape.width


def data_gradient_bytes(count: int, dp: int, microbatches: int, zero: int) -> int:
    """Gradients of `count` weights: once a step with ZeRO-1, after every micro-batch with 2 and 3."""
    if dp == 1:
        return 0
    return count * GRADIENT_BYTES * (1 if zero == 1 else microbatches)


def data_parameter_bytes(count: int, element: int, dp: int, microbatches: int, zero: int) -> int:
    """A rank's piece of the weights: gathered once after the step; with ZeRO-3 instead for every
    forward and every backward."""
    if dp == 1:
        return 0
    return math.ceil(count / dp) * element * (2 * microbatches if zero == 3 else 1)


def busiest(
    run: RunConfig, shape: ModelShape, layout: ParallelLayout, *, microbatches: int
) -> tuple[int, Wire]:
    """The pipeline rank that passes on the most, and its bytes."""
    wires = [
        wire_bytes(run, shape, layout, microbatches=microbatches, pipeline_rank=rank)
        for rank in range(layout.pp)
    ]
    rank = max(range(layout.pp), key=lambda rank: (wires[rank].total, -rank))
    return rank, wires[rank]
