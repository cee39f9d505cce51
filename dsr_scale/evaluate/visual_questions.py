"""Yes-or-no questions about images, put to a VQA model.

Two kinds of transformers checkpoints answer: BLIP, which writes its answer (here the likeliest token
each time), and ViLT, which chooses one of a fixed list. Questions of as many tokens share a batch and
none is padded: BLIP's decoder attends to padding, so an answer would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.encoders.loading import load_transformer, loading_errors
from dsr_scale.encoders.locate import locate

BATCH_QUESTIONS = 64
ANSWER_TOKENS = 8


class VisualQuestions:
    """A frozen VQA model with its own preprocessing, on one device."""

    def __init__(self, model: str, device: torch.device) -> None:
        """`model`: hub name or local directory.

        Raises InputError when it cannot be loaded, or answers in a way that is not known here.
        """
        declare_torchvision_operators()
        import transformers

        location = locate(model, files=("config.json", "preprocessor_config.json"))
        with loading_errors(location):
            config = transformers.AutoConfig.from_pretrained(location.source)
            self._preprocess = transformers.AutoImageProcessor.from_pretrained(location.source)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(location.source)
        self._writes = config.model_type == "blip"
        if not self._writes and config.model_type != "vilt":
            raise InputError(
                found=f"{location.source}, a model of type {config.model_type}",
                required="blip or vilt, trained for questions",
                remedy="give one, for example Salesforce/blip-vqa-capfilt-large",
            )
        network = (
            transformers.BlipForQuestionAnswering
            if self._writes
            else transformers.ViltForQuestionAnswering
        )
        self._network: Any = load_transformer(network, location, dtype="fp32", device=device)
        text = config.text_config if self._writes else config
        self._max_tokens: int = text.max_position_embeddings
        self._device = device

    @torch.inference_mode()
    def says_yes(self, images: Tensor, questions: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether the answer is "yes", for each of `questions[i]` about image i of uint8 [B,3,H,W]."""
        answers = [[False] * len(of_image) for of_image in questions]
        of_length: dict[int, list[tuple[int, int, list[int]]]] = {}
        for image, of_image in enumerate(questions):
            for number, question in enumerate(of_image):
                tokens = self._tokenizer(question, truncation=True, max_length=self._max_tokens)
                ids = tokens["input_ids"]
                of_length.setdefault(len(ids), []).append((image, number, ids))
        pixels = self._preprocess(
            list(images.permute(0, 2, 3, 1).cpu().numpy()), return_tensors="pt"
        )["pixel_values"]
        for same in of_length.values():
            for start in range(0, len(same), BATCH_QUESTIONS):
                part = same[start : start + BATCH_QUESTIONS]
                ids = torch.tensor([ids for _, _, ids in part], device=self._device)
                shown = pixels[[image for image, _, _ in part]].to(self._device)
                answer = self._written if self._writes else self._chosen
                for (image, number, _), text in zip(part, answer(ids, shown), strict=True):
                    answers[image][number] = text.strip().lower() == "yes"
        return answers

    def _written(self, ids: Tensor, pixels: Tensor) -> list[str]:
        """Answers to token ids [B,L] about preprocessed images [B,3,H,W], one each."""
        tokens = self._network.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            num_beams=1,
        )
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _chosen(self, ids: Tensor, pixels: Tensor) -> list[str]:
        # ViLT draws an order for the patches, on the CPU. It does not matter but for rounding, and
        # neither should that move, nor the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            logits = self._network(input_ids=ids, pixel_values=pixels).logits
        labels = self._network.config.id2label
        return [labels[index] for index in logits.argmax(dim=1).tolist()]
