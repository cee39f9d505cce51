"""ViT latents against the same network called directly: tokens dropped, norm and whitening by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision_transformers import (
    FAMILIES,
    INPUT_SIZE,
    MEAN,
    PATCH,
    RESOLUTION,
    STD,
    WIDTH,
    random_images,
    save_vit,
    tower_of,
    vit_config,
)
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import KNOWN_VITS, vit_geometry
from dsr_scale.config.encoders import VitImage
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.statistics import LatentStatistics, StatisticsIdentity, save_statistics
from dsr_scale.encoders.vit import VitEncoder


@torch.no_grad()
def _by_hand(model: Any, family: str, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents [B,C,h,w] before whitening, from the output of the last block."""
    seen: list[torch.Tensor] = []
    tower = tower_of(model)
    stack = getattr(tower, "encoder", getattr(tower, "model", tower))
    blocks = getattr(stack, "layers", None) or stack.layer
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
    model = save_vit(tmp_path, family)
    encoder = build_image_encoder(vit_config(tmp_path), resolution=RESOLUTION, device="cpu")
    images = random_images(3)
    expected = _by_hand(model, family, images, (INPUT_SIZE, INPUT_SIZE))
    latents = encoder.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(encoder.encode(images), latents)
    # A bucket: 20×30 pixels at 16/20 are 16×24 at the encoder, 4×6 tokens.
    wide = random_images(2, RESOLUTION, 30)
    expected = _by_hand(model, family, wide, (16, 24))
    torch.testing.assert_close(encoder.encode(wide), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_has_the_same_bits_in_every_batch(
    tmp_path: Path, family: str, dtype: str, device: str
) -> None:
    save_vit(tmp_path, family)
    config = vit_config(tmp_path, dtype=dtype)
    encoder = build_image_encoder(config, resolution=RESOLUTION, device=device)
    assert isinstance(encoder, VitEncoder)
    # As if the libraries had another kernel for each size, which on a CPU they may not have.
    encoder.model.register_forward_pre_hook(_distorted_by_size, with_kwargs=True)
    images = random_images(7)
    together = encoder.encode(images)
    assert len(together) == 7
    for batch in (1, 2, 3):
        parts = torch.cat([encoder.encode(part) for part in images.split(batch)])
        assert torch.equal(parts, together)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(encoder.encode(images[order]), together[order.to(device)])
    others = torch.cat([255 - images, images[3:4]])
    assert torch.equal(encoder.encode(others)[-1], together[3])
    assert not torch.allclose(encoder.tokens(images[:1]), encoder.tokens(images[:2])[:1])


def _distorted_by_size(_model: Any, inputs: Any, arguments: dict[str, Any]) -> Any:
    pixels = arguments["pixel_values"]
    return inputs, {**arguments, "pixel_values": pixels * (1 + 0.1 * len(pixels))}


def test_latents_are_whitened_with_the_statistics_of_their_encoder(tmp_path: Path) -> None:
    model = save_vit(tmp_path, "dinov2")
    images = random_images(16)
    raw = _by_hand(model, "dinov2", images, (INPUT_SIZE, INPUT_SIZE))
    path = tmp_path / "statistics.safetensors"
    identity = StatisticsIdentity(str(tmp_path), None, RESOLUTION)
    save_statistics(path, LatentStatistics.of(raw), identity)
    config = vit_config(tmp_path, statistics=str(path))
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
    save_vit(tmp_path, "dinov2")
    images = random_images(16)
    plain = build_image_encoder(vit_config(tmp_path), resolution=RESOLUTION, device="cpu")
    raw = plain.encode(images)
    path = tmp_path / "statistics.safetensors"
    identity = StatisticsIdentity(hub, commit, RESOLUTION)
    save_statistics(path, LatentStatistics.of(raw), identity)
    config = vit_config(tmp_path, statistics=str(path), name=hub, revision=commit)
    latents = build_image_encoder(config, resolution=RESOLUTION, device="cpu").encode(images)
    expected = (raw - raw.mean(dim=0)) / (raw.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    for other in ({"name": None, "revision": None}, {"revision": None}, {"name": "owner/other"}):
        with pytest.raises(InputError, match="required: statistics of"):
            build_image_encoder(
                config.model_copy(update=other), resolution=RESOLUTION, device="cpu"
            )


def test_half_precision_is_near_full_and_whitening_stays_fp32(tmp_path: Path) -> None:
    model = save_vit(tmp_path, "siglip vision")
    config = vit_config(tmp_path, dtype="bf16")
    encoder = build_image_encoder(config, resolution=RESOLUTION, device="cpu")
    latents = encoder.encode(random_images(4))
    expected = _by_hand(model, "siglip vision", random_images(4), (INPUT_SIZE, INPUT_SIZE))
    assert latents.dtype == torch.float32
    assert ((latents - expected).square().mean() / expected.square().mean()).sqrt() < 0.03


def test_the_network_is_frozen_but_its_latents_can_be_trained_on(tmp_path: Path) -> None:
    save_vit(tmp_path, "dinov2")
    encoder = build_image_encoder(vit_config(tmp_path), resolution=RESOLUTION, device="cpu")
    assert isinstance(encoder, VitEncoder)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    layer = torch.nn.Linear(WIDTH, 1)
    layer(encoder.encode(random_images(1)).flatten(2).transpose(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_configs_that_disagree_with_the_model_are_refused(tmp_path: Path) -> None:
    save_vit(tmp_path, "dinov2")
    for change, message in [
        ({"channels": 32}, r"set encoders\.image\.channels to 24"),
        ({"patch": 2}, r"set encoders\.image\.patch to 4"),
        ({"input_size": 18}, "sides divisible by the encoder's patch"),
        ({"channels": None}, "its token width, patch and input size"),
    ]:
        with pytest.raises(InputError, match=message):
            build_image_encoder(vit_config(tmp_path, **change), resolution=RESOLUTION, device="cpu")
    encoder = build_image_encoder(vit_config(tmp_path), resolution=RESOLUTION, device="cpu")
    with pytest.raises(InputError, match="sides divisible by the encoder's patch"):
        encoder.encode(random_images(1, 20, 22))


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_vit(tmp_path, "dinov2")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "mlp" in name)
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    config = vit_config(tmp_path)
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
