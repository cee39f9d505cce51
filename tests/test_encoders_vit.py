"""ViT latents against the same network called directly: tokens dropped, norm and whitening by hand.

The networks are tiny and random, with a final norm whose weight and bias are far from one and zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.derive import KNOWN_VITS, vit_geometry
from dsr_scale.config.encoders import VitImage
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.statistics import LatentStatistics, StatisticsIdentity, save_statistics
from dsr_scale.encoders.vit import VitEncoder

declare_torchvision_operators()
import transformers  # noqa: E402

WIDTH, PATCH, INPUT_SIZE, RESOLUTION = 24, 4, 16, 20
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": PATCH,
    "image_size": INPUT_SIZE,
}


def _dinov2_with_registers() -> Any:
    # Published checkpoints have more positions than are used: here 6×6, interpolated to 4×4.
    config = transformers.Dinov2WithRegistersConfig(
        **{**SMALL, "image_size": 24}, num_register_tokens=3, mlp_ratio=2
    )
    return transformers.Dinov2WithRegistersModel(config)


def _dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2))


def _siglip_vision() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL))


def _siglip_whole() -> Any:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=SMALL, text_config=text)
    )


def _mae() -> Any:
    config = transformers.ViTMAEConfig(
        **SMALL, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1
    )
    return transformers.ViTMAEForPreTraining(config)


FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "dinov2 with registers": (_dinov2_with_registers, 4),
    "dinov2": (_dinov2, 1),
    "siglip vision": (_siglip_vision, 0),
    "siglip with text": (_siglip_whole, 0),
    "mae": (_mae, 1),
}
"""How a checkpoint is made, and how many tokens stand before its patches."""


def _saved(directory: Path, family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"height": 1, "width": 1}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def _config(directory: Path, **changes: Any) -> VitImage:
    settings = {"channels": WIDTH, "patch": PATCH, "input_size": INPUT_SIZE, **changes}
    return VitImage(model=str(directory), **settings)


def _images(batch: int, height: int = RESOLUTION, width: int = RESOLUTION) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def _by_hand(model: Any, family: str, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents [B,C,h,w] before whitening, from the output of the last block."""
    seen: list[torch.Tensor] = []
    name = "vit" if family == "mae" else "vision_model"
    tower = getattr(model, name, model)
    blocks = getattr(tower.encoder, "layers", None) or tower.encoder.layer
    hook = blocks[-1].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0] if type(output) is tuple else output)
    )
    x = functional.interpolate(images.float() / 255, size=size, mode="bicubic")
    for channel in range(3):
        x[:, channel] = (x[:, channel] - MEAN[channel]) / STD[channel]
    h, w = size[0] // PATCH, size[1] // PATCH
    if family == "mae":
        tower.config.mask_ratio = 0.0
        noise = torch.arange(h * w).float().expand(len(images), -1)
        tower(x, noise=noise, interpolate_pos_encoding=True)
    elif "siglip" in family:
        tower(x, interpolate_pos_encoding=True)
    else:
        tower(x)
    hook.remove()
    tokens = seen[0][:, FAMILIES[family][1] :]
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    eps = tower.config.layer_norm_eps
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    assert normed.shape[1] == h * w
    latents = torch.empty(len(images), WIDTH, h, w)
    for row in range(h):
        for column in range(w):
            latents[:, :, row, column] = normed[:, row * w + column]
    return latents


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_of_the_network(tmp_path: Path, family: str) -> None:
    model = _saved(tmp_path, family)
    encoder = build_image_encoder(_config(tmp_path), resolution=RESOLUTION, device="cpu")
    images = _images(3)
    expected = _by_hand(model, family, images, (INPUT_SIZE, INPUT_SIZE))
    latents = encoder.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(encoder.encode(images), latents)
    # A bucket: 20×30 pixels at 16/20 are 16×24 at the encoder, 4×6 tokens.
    wide = _images(2, RESOLUTION, 30)
    expected = _by_hand(model, family, wide, (16, 24))
    torch.testing.assert_close(encoder.encode(wide), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["dinov2 with registers", "siglip vision", "mae"])
def test_an_image_does_not_depend_on_its_batch(tmp_path: Path, family: str) -> None:
    _saved(tmp_path, family)
    encoder = build_image_encoder(_config(tmp_path), resolution=RESOLUTION, device="cpu")
    images = _images(5)
    alone = torch.cat([encoder.encode(image[None]) for image in images])
    torch.testing.assert_close(encoder.encode(images), alone, rtol=0, atol=1e-5)
    swapped = encoder.encode(images.flip(0)).flip(0)
    torch.testing.assert_close(swapped, alone, rtol=0, atol=1e-5)


def test_latents_are_whitened_with_the_statistics_of_their_encoder(tmp_path: Path) -> None:
    model = _saved(tmp_path, "dinov2")
    images = _images(16)
    raw = _by_hand(model, "dinov2", images, (INPUT_SIZE, INPUT_SIZE))
    path = tmp_path / "statistics.safetensors"
    identity = StatisticsIdentity(str(tmp_path), None, RESOLUTION)
    save_statistics(path, LatentStatistics.of(raw), identity)
    config = _config(tmp_path, statistics=str(path))
    latents = build_image_encoder(config, resolution=RESOLUTION, device="cpu").encode(images)
    expected = (raw - raw.mean(dim=0)) / (raw.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="required: statistics of"):
        build_image_encoder(config, resolution=40, device="cpu")
    save_statistics(path, LatentStatistics.of(raw[:, :, :3]), identity)
    with pytest.raises(InputError, match=r"required: shape \[24, 4, 4\]"):
        build_image_encoder(config, resolution=RESOLUTION, device="cpu")


def test_a_named_local_copy_is_the_encoder_it_is_a_copy_of(tmp_path: Path) -> None:
    """Statistics computed for a pinned hub name whiten the latents of a copy on disk."""
    hub, commit = "google/siglip2-base-patch16-256", "a1b2c3"
    assert vit_geometry(VitImage(model=str(tmp_path), name=hub)) == KNOWN_VITS[hub]
    with pytest.raises(InputError, match=r"encoders\.image\.name"):
        vit_geometry(VitImage(model=str(tmp_path)))
    _saved(tmp_path, "dinov2")
    images = _images(16)
    plain = build_image_encoder(_config(tmp_path), resolution=RESOLUTION, device="cpu")
    raw = plain.encode(images)
    path = tmp_path / "statistics.safetensors"
    identity = StatisticsIdentity(hub, commit, RESOLUTION)
    save_statistics(path, LatentStatistics.of(raw), identity)
    config = _config(tmp_path, statistics=str(path), name=hub, revision=commit)
    latents = build_image_encoder(config, resolution=RESOLUTION, device="cpu").encode(images)
    expected = (raw - raw.mean(dim=0)) / (raw.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    for other in ({"name": None, "revision": None}, {"revision": None}, {"name": "owner/other"}):
        with pytest.raises(InputError, match="required: statistics of"):
            build_image_encoder(
                config.model_copy(update=other), resolution=RESOLUTION, device="cpu"
            )


def test_half_precision_is_near_full_and_whitening_stays_fp32(tmp_path: Path) -> None:
    model = _saved(tmp_path, "siglip vision")
    config = _config(tmp_path, dtype="bf16")
    encoder = build_image_encoder(config, resolution=RESOLUTION, device="cpu")
    latents = encoder.encode(_images(4))
    expected = _by_hand(model, "siglip vision", _images(4), (INPUT_SIZE, INPUT_SIZE))
    assert latents.dtype == torch.float32
    assert ((latents - expected).square().mean() / expected.square().mean()).sqrt() < 0.03


def test_the_network_is_frozen_but_its_latents_can_be_trained_on(tmp_path: Path) -> None:
    _saved(tmp_path, "dinov2")
    encoder = build_image_encoder(_config(tmp_path), resolution=RESOLUTION, device="cpu")
    assert isinstance(encoder, VitEncoder)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    layer = torch.nn.Linear(WIDTH, 1)
    layer(encoder.encode(_images(1)).flatten(2).transpose(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_configs_that_disagree_with_the_model_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, "dinov2")
    for change, message in [
        ({"channels": 32}, r"set encoders\.image\.channels to 24"),
        ({"patch": 2}, r"set encoders\.image\.patch to 4"),
        ({"input_size": 18}, "sides divisible by the encoder's patch"),
        ({"channels": None}, "its token width, patch and input size"),
    ]:
        with pytest.raises(InputError, match=message):
            build_image_encoder(_config(tmp_path, **change), resolution=RESOLUTION, device="cpu")
    encoder = build_image_encoder(_config(tmp_path), resolution=RESOLUTION, device="cpu")
    with pytest.raises(InputError, match="sides divisible by the encoder's patch"):
        encoder.encode(_images(1, 20, 22))


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _saved(tmp_path, "dinov2")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "mlp" in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    config = _config(tmp_path)
    for content, message in [(kept, "lacks 1 weights"), ({**kept, lost: torch.zeros(1)}, "shape")]:
        save_file(content, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            build_image_encoder(config, resolution=RESOLUTION, device="cpu")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="could not be loaded"):
        build_image_encoder(config, resolution=RESOLUTION, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(InputError, match="of type resnet"):
        build_image_encoder(config, resolution=RESOLUTION, device="cpu")
