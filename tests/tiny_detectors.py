"""Detectors and VQA models with random weights, saved as the published ones are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_language_models import EOS, PAD, SMALL, VISION, WORDS, save_word_tokenizer

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
import transformers  # noqa: E402

LABELS = {0: "person", 1: "mouse", 2: "sofa"}
ANSWERS = {0: "no", 1: "yes", 2: "two"}


def _save(model: Any, directory: Path, spread: float) -> Path:
    """Weights moved by `spread` from their initialisation, so that outputs differ between inputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def save_tiny_mask2former(directory: Path) -> Path:
    """Instances of LABELS by 6 queries."""
    torch.manual_seed(0)
    backbone: Any = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(
        directory
    )
    return _save(model, directory, 0.1)


def save_tiny_yolos(directory: Path, labels: dict[int, str] = LABELS) -> Path:
    """Boxes of `labels` by 5 queries."""
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return _save(transformers.YolosForObjectDetection(config).eval(), directory, 0.3)


def save_tiny_color_clip(directory: Path, words: Sequence[str]) -> Path:
    """CLIP that knows `words`, one token each; any other word is one and the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    rows = {word: row for row, word in enumerate(["<pad>", "<unk>", *words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(rows, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", rows["<eos>"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(directory)
    text = {**SMALL, "vocab_size": len(rows), "eos_token_id": rows["<eos>"]}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION)
    return _save(transformers.CLIPModel(config).eval(), directory, 0.3)


def save_tiny_blip(directory: Path) -> Path:
    """Writes answers of WORDS."""
    torch.manual_seed(0)
    text = {**SMALL, "encoder_hidden_size": 16, "is_decoder": True, "projection_dim": 8}
    text |= {"bos_token_id": 3, "sep_token_id": EOS, "pad_token_id": PAD}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8, "intermediate_size": 8}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    size = {"height": 16, "width": 16}
    transformers.BlipImageProcessor(size=size).save_pretrained(directory)
    save_word_tokenizer(directory, ends_with_eos=True)
    return _save(transformers.BlipForQuestionAnswering(config).eval(), directory, 0.4)


def save_tiny_vilt(directory: Path) -> Path:
    """Chooses one of ANSWERS."""
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        max_position_embeddings=12,
        id2label=ANSWERS,
        label2id={name: number for number, name in ANSWERS.items()},
    )
    transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8).save_pretrained(
        directory
    )
    save_word_tokenizer(directory, ends_with_eos=True)
    return _save(transformers.ViltForQuestionAnswering(config).eval(), directory, 0.3)
