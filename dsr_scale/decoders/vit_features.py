"""Features of a frozen vision transformer at several depths, as maps over the patches.

Any transformers model with `num_hidden_layers` blocks in one list will do (DINO's `ViTModel`, DINOv2,
DINOv3): blocks are read by hooks, and those behind the last tapped one are dropped. Images are
resized to the side that the checkpoint's processor feeds and normalised as it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators


class VitFeatures(nn.Module):
    """Images → one feature map per tapped block. Frozen, and in evaluation mode always."""

    def __init__(
        self,
        network: Any,
        *,
        blocks: Sequence[int],
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """`network`: a transformers vision transformer; `side` in pixels, of what it is fed."""
        super().__init__()
        self.blocks = tuple(blocks)
        self.side = side
        self.width = int(network.config.hidden_size)
        self.grid = side // int(network.config.patch_size)
        self.mean = tuple(mean)
        self.std = tuple(std)
        stack = _blocks_of(network)
        del stack[max(self.blocks) + 1 :]
        self.network = network.eval().requires_grad_(False)
        self._seen: dict[int, Tensor] = {}
        for block in self.blocks:
            stack[block].register_forward_hook(self._keeper(block))
        # Models with learnt positions refuse other sizes than their own unless told.
        takes = inspect.signature(network.forward).parameters
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        )

    def train(self, mode: bool = True) -> VitFeatures:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B,3,H,W] in [0, 1] scale → a map [B,D,h,w] for each of `blocks`, in their order."""
        size = (self.side, self.side)
        if images.shape[-2:] != size:
            images = functional.interpolate(images, size=size, mode="bicubic", antialias=True)
        planes = zip(images.unbind(1), self.mean, self.std, strict=True)
        pixels = torch.stack([(plane - mean) / std for plane, mean, std in planes], dim=1)
        self.network(pixels.to(self.network.dtype), **self._options)
        return [self._as_map(self._seen.pop(block)) for block in self.blocks]

    def _keeper(self, block: int) -> Any:
        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
            self._seen[block] = output[0] if isinstance(output, tuple) else output

        return keep

    def _as_map(self, tokens: Tensor) -> Tensor:
        """[B,T,D] → [B,D,h,w]; class and register tokens stand before the patches."""
        patches = tokens[:, tokens.shape[1] - self.grid**2 :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def open_vit_features(model: str, revision: str | None, *, blocks: Sequence[int]) -> VitFeatures:
    """Features on the CPU in float32 of the directory or hub name `model`; `blocks` from 0.

    Raises InputError when it cannot be loaded, lacks weights, is no vision transformer, or has
    no such block.
    """
    declare_torchvision_operators()
    network, processor = _load(model, revision)
    depth = int(network.config.num_hidden_layers)
    if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= b < depth for b in blocks):
        raise InputError(
            found=f"blocks {list(blocks)} of {model}, which has {depth}",
            required=f"at least one block, each once, from 0 to {depth - 1}",
            remedy="choose blocks at even distances, such as "
            f"{sorted({(depth * part - 1) // 4 for part in (1, 2, 3, 4)} - {-1})}",
        )
    side = _side(processor) or int(network.config.image_size)
    patch = int(network.config.patch_size)
    return VitFeatures(
        network,
        blocks=blocks,
        side=max(side // patch, 1) * patch,
        mean=processor["image_mean"],
        std=processor["image_std"],
    )


def _load(model: str, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The network and its processor's settings."""
    import transformers
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network, report = transformers.AutoModel.from_pretrained(
            model, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(
            model, revision=revision
        )
        missing = [name for name in report["missing_keys"] if "pooler" not in name]
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights, such as {sorted(missing)[0]}")
        _blocks_of(network)
    # Hub, files and configs fail with OSError or ValueError; weights of other shapes with the last.
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            found=f"no features from {model}: {' '.join(str(error).split())[:400]}",
            required="a vision transformer such as facebook/dino-vits8, whole, with its "
            "preprocessor_config.json, on this machine or where it can be fetched",
            remedy=f"on a machine with network run 'hf download {model}', or give the directory of "
            "a copy; decoder.adversarial=null goes without",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return network, processor


def _blocks_of(network: Any) -> nn.ModuleList:
    """The list of a transformer's blocks. Raises ValueError when there is none."""
    depth = getattr(network.config, "num_hidden_layers", None)
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(network).__name__} is no plain vision transformer")


def _side(processor: dict[str, Any]) -> int | None:
    """Pixels of a side that a processor feeds: its crop where it crops, else its size."""
    for name in ("crop_size", "size"):
        if name == "crop_size" and processor.get("do_center_crop") is False:
            continue
        size = processor.get(name)
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return next(
                (int(size[key]) for key in ("height", "shortest_edge") if key in size), None
            )
    return None
