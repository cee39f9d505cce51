"""Parameters, FLOPs and memory of a decoder, counted from its sizes.

What judges the images in training, LPIPS' classifier and the discriminator's ViT, is not in them: its
size follows from the weights that are named, not from the run file.
"""

from __future__ import annotations

import math

from dsr_scale.config.decoder import DecoderRun, DecoderShape
from dsr_scale.config.derive import ParallelLayout
from dsr_scale.config.memory import Memory

_KEPT_FP32 = 18
"""Numbers per token, in units of the width, that a block keeps for its backward pass, beside those of
the MLP: two norms' inputs and outputs, q, k, v, attention's result, two residual sums. Derived."""


def parameters(shape: DecoderShape) -> dict[str, int]:
    """Trained parameters by part."""
    width, outputs = shape.width, 3 * shape.patch**2
    attention = 4 * (width * width + width)
    mlp = 2 * width * shape.mlp_width + shape.mlp_width + width
    return {
        "embedder": shape.channels * width + width,
        "blocks": shape.depth * (attention + mlp + 4 * width),
        "class token": width,
        "final": 2 * width + width * outputs + outputs,
    }


def forward_flops(shape: DecoderShape) -> dict[str, int]:
    """FLOPs, 2 per multiply-add, of one image's matrix products by part."""
    width, positions = shape.width, shape.grid**2
    rows = positions + 1
    block = rows * (8 * width**2 + 4 * width * shape.mlp_width) + 4 * rows**2 * width
    return {
        "embedder": 2 * positions * shape.channels * width,
        "blocks": shape.depth * block,
        "final": 2 * rows * width * 3 * shape.patch**2,
    }


def training_flops(shape: DecoderShape) -> int:
    """FLOPs of forward and backward of one image: three forwards."""
    return 3 * sum(forward_flops(shape).values())


def memory_per_gpu(run: DecoderRun, shape: DecoderShape, layout: ParallelLayout) -> Memory:
    """Bytes on each of `layout.dp` devices; of activations those of the blocks, derived."""
    count, training = sum(parameters(shape).values()), run.training
    number_bytes = 2 if training.precision == "bf16" else 4
    rows = shape.grid**2 + 1
    whole = rows * (_KEPT_FP32 * shape.width + 2 * shape.mlp_width)
    kept = shape.depth * whole
    if training.recompute == "full":
        kept = shape.depth * rows * shape.width + whole
    return Memory(
        weights=number_bytes * count,
        gradients=math.ceil(4 * count / (layout.dp if run.parallel.zero > 1 else 1)),
        optimizer=math.ceil(12 * count / layout.dp),
        ema=math.ceil(4 * count / layout.dp) * len(training.ema_decays),
        activations=training.microbatch_images * kept * number_bytes,
    )
