"""CLIPScore: does an image show what its prompt says, asked of a CLIP model?

100 · max(cos, 0) of the image's and the prompt's embedding, as reported for text-to-image models
(Hessel et al. 2021 scale by 2.5 instead of 100). CLIP reads the first 77 tokens of a prompt; the rest
of a longer one does not count. Scores of different CLIP models are different metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.encoders.loading import load_transformer, loading_errors
from dsr_scale.encoders.locate import locate


class ClipScorer:
    """A frozen CLIP model with its own preprocessing, on one device."""

    def __init__(self, model: str, device: torch.device) -> None:
        """`model`: hub name or local directory. Raises InputError when it cannot be loaded."""
        declare_torchvision_operators()
        import transformers

        location = locate(model, files=("config.json", "preprocessor_config.json"))
        # Pillow resamples as CLIP was trained; from 5 on the plain name is torchvision's processor.
        pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        with loading_errors(location):
            self._preprocess = pillow.from_pretrained(location.source)
            self._tokenize = transformers.AutoTokenizer.from_pretrained(location.source)
        self._model = load_transformer(
            transformers.CLIPModel, location, dtype="fp32", device=device
        )
        self._device = device

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], 0 to 100, of uint8 images [B,3,H,W] for their B prompts."""
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        cosine = (self.embed_images(pictures) * self.embed_texts(prompts)).sum(dim=-1)
        return 100 * cosine.clamp(min=0)

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[object]) -> Tensor:
        """Unit vectors [B,D] of B Pillow images or uint8 arrays [H,W,3], of any sizes."""
        # Said, since a picture of one or three rows would be taken for channels first.
        pixels = self._preprocess(
            list(pictures), return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        seen = self._model.vision_model(pixels.to(self._device)).pooler_output
        return F.normalize(self._model.visual_projection(seen), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B,D]."""
        tokens = self._tokenize(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        read = self._model.text_model(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
        ).pooler_output
        return F.normalize(self._model.text_projection(read), dim=-1)


class ClipSums:
    """Number and sum of scores, float64."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, scores: Tensor) -> None:
        """Counts scores [B] in."""
        scores = scores.to(self.sums)
        self.sums += torch.stack([torch.ones_like(scores), scores]).sum(1)

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.sums]

    def mean(self) -> float:
        """The mean score of all images, at least one."""
        count, total = self.sums.tolist()
        assert count > 0
        return total / count
