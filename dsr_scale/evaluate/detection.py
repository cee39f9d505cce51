"""Objects in images: class, score, box and, where the network gives one, mask.

Two kinds of transformers checkpoints are read: Mask2Former trained for instances, whose masks become
boxes, and the object detectors of the DETR family, which give boxes alone. Masks are worked out at
the size of the image and not at the 384 pixels of the library, whose small objects lose their outline.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.encoders.loading import load_transformer, loading_errors
from dsr_scale.encoders.locate import Location, locate

BATCH_IMAGES = 8
"""At a time: detectors enlarge images to about 800 pixels whatever the batch of the evaluation is."""

MAX_OBJECTS = 100
"""Pairs of query and class that Mask2Former's instances are chosen from, as in its own evaluation."""


class Box(NamedTuple):
    """Edges in pixels from the upper left corner; right and bottom are outside."""

    left: float
    top: float
    right: float
    bottom: float


class DetectedObject(NamedTuple):
    """One object of one image."""

    label: str
    """As the checkpoint's config names it."""
    score: float
    box: Box
    mask: Tensor | None = None
    """bool [H,W] on the CPU; None where the detector gives boxes alone."""


class ObjectDetector:
    """A frozen detector with its own preprocessing, on one device."""

    def __init__(self, model: str, device: torch.device) -> None:
        """`model`: hub name or local directory.

        Raises InputError when it cannot be loaded or detects no objects.
        """
        declare_torchvision_operators()
        import transformers

        location = locate(model, files=("config.json", "preprocessor_config.json"))
        with loading_errors(location):
            kind = transformers.AutoConfig.from_pretrained(location.source).model_type
            self._process = transformers.AutoImageProcessor.from_pretrained(location.source)
        self._gives_masks = kind == "mask2former"
        self._network = _load(location, kind, device)
        self._labels: dict[int, str] = self._network.config.id2label
        self._device = device

    @property
    def labels(self) -> frozenset[str]:
        """All that can be detected."""
        return frozenset(self._labels.values())

    @torch.inference_mode()
    def __call__(self, images: Tensor, threshold: float) -> list[list[DetectedObject]]:
        """The objects of each of uint8 images [B,3,H,W] that score above `threshold`, best first."""
        found = []
        for part in images.split(BATCH_IMAGES):
            pictures = list(part.permute(0, 2, 3, 1).cpu().numpy())
            inputs = self._process(pictures, return_tensors="pt")
            output = self._network(**{name: x.to(self._device) for name, x in inputs.items()})
            size = (part.shape[2], part.shape[3])
            of_image = self._from_masks if self._gives_masks else self._from_boxes
            found += [
                sorted(objects, key=lambda one: -one.score)
                for objects in of_image(output, size, threshold)
            ]
        return found

    def _from_masks(
        self, output: Any, size: tuple[int, int], threshold: float
    ) -> Iterator[list[DetectedObject]]:
        """An instance scores its class's probability times the mean probability inside its mask."""
        for class_logits, mask_logits in zip(
            output.class_queries_logits, output.masks_queries_logits, strict=True
        ):
            probability = class_logits.softmax(dim=-1)[:, :-1]  # the last class is "nothing"
            classes = probability.shape[1]
            best, index = probability.flatten().topk(min(MAX_OBJECTS, probability.numel()))
            logits = F.interpolate(mask_logits[None], size=size, mode="bilinear")[0]
            # By query, not by pair: a query may stand for several classes.
            inside = logits > 0
            area = inside.flatten(1).sum(1)
            quality = (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
            query = index // classes
            scores = best * quality[query]
            keep = (scores > threshold) & (area[query] > 0)
            yield [
                DetectedObject(self._labels[label], score, _box_of(mask), mask)
                for label, score, mask in zip(
                    (index % classes)[keep].tolist(),
                    scores[keep].tolist(),
                    inside[query[keep]].cpu(),
                    strict=True,
                )
            ]

    def _from_boxes(
        self, output: Any, size: tuple[int, int], threshold: float
    ) -> Iterator[list[DetectedObject]]:
        height, width = size
        images = self._process.post_process_object_detection(
            output, threshold=threshold, target_sizes=[size] * len(output.logits)
        )
        limit = torch.tensor([width, height, width, height])
        for image in images:
            boxes = torch.minimum(image["boxes"].cpu().clamp(min=0), limit)
            yield [
                DetectedObject(self._labels[label], score, Box(*box))
                for label, score, box in zip(
                    image["labels"].tolist(), image["scores"].tolist(), boxes.tolist(), strict=True
                )
            ]


def _box_of(mask: Tensor) -> Box:
    """The smallest box around a mask [H,W] that is not empty."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _load(location: Location, kind: str, device: torch.device) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    if kind == "mask2former":
        network = transformers.Mask2FormerForUniversalSegmentation
    elif kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        network = transformers.AutoModelForObjectDetection
    else:
        raise InputError(
            found=f"{location.source}, a model of type {kind}",
            required="mask2former, or one of "
            + ", ".join(sorted(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)),
            remedy="give a detector of COCO's classes, for example "
            "facebook/mask2former-swin-small-coco-instance",
        )
    try:
        return load_transformer(network, location, dtype="fp32", device=device)
    except ImportError as error:  # some of the family keep their backbone in another library
        raise InputError(
            found=f"{location.source}: {' '.join(str(error).split())[:300]}",
            required="the libraries that this detector is built from",
            remedy="install what is named, or give another detector",
        ) from error
