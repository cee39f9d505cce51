"""Autoencoder latents and images against diffusers' own encode and decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import EncodersConfig, RaeDecoder, VaeDecoder, VaeImage, VitImage
from dsr_scale.encoders.contract import Decoder, build_decoder, build_image_encoder
from dsr_scale.encoders.statistics import LatentStatistics, StatisticsIdentity, save_statistics

declare_torchvision_operators()

RESOLUTION = 32


def _images(batch: int, height: int = RESOLUTION, width: int = RESOLUTION) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def _as_uint8(unit: torch.Tensor) -> torch.Tensor:
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def _assert_images_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for a value on the edge between two bytes here and there."""
    assert ours.dtype == torch.uint8
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert ours.float().std() > 20


def _decoder(encoders: EncodersConfig) -> Decoder:
    decoder = build_decoder(encoders, resolution=RESOLUTION, device="cpu")
    assert decoder is not None
    return decoder


def _vae(directory: Path, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 5,
        "norm_num_groups": 4,
    }
    vae = AutoencoderKL(**sizes, **config).eval()
    vae.save_pretrained(directory)
    return vae


CHANNEL_MEAN, CHANNEL_STD = (0.5, -1.0, 0.25, 2.0, 0.0), (2.0, 1.0, 0.5, 0.25, 3.0)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": CHANNEL_MEAN, "latents_std": CHANNEL_STD},
    ],
    ids=["scale", "scale and shift", "mean and std per channel"],
)
@torch.no_grad()
def test_vae_latents_are_the_scaled_mean_and_decode(tmp_path: Path, config: dict[str, Any]) -> None:
    vae = _vae(tmp_path, **config)
    image = VaeImage(model=str(tmp_path), channels=5, downsample=4)
    encoders = EncodersConfig(image=image, decoder=VaeDecoder(model=str(tmp_path)))
    encoder = build_image_encoder(image, resolution=RESOLUTION, device="cpu")
    images = _images(2, 32, 40)
    mean = vae.encode(images.float() / 255 * 2 - 1).latent_dist.mean
    latents = encoder.encode(images)
    assert encoder.channels == 5
    torch.testing.assert_close(latents, _scaled(mean, config), rtol=1e-4, atol=1e-5)
    alone = torch.cat([encoder.encode(one[None]) for one in images])
    torch.testing.assert_close(latents, alone, rtol=0, atol=1e-5)
    spread = 5 * torch.randn(2, 5, 8, 10)  # gives images with contrast
    ours = _decoder(encoders).decode(_scaled(spread, config))
    _assert_images_equal(ours, _as_uint8(vae.decode(spread).sample / 2 + 0.5))


def _scaled(mean: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    if "latents_mean" in config:
        columns = torch.tensor([CHANNEL_MEAN, CHANNEL_STD]).reshape(2, 1, 5, 1, 1)
        return (mean - columns[0]) / columns[1] * config["scaling_factor"]
    return (mean - config.get("shift_factor", 0)) * config["scaling_factor"]


def test_a_vae_of_another_shape_is_refused(tmp_path: Path) -> None:
    _vae(tmp_path)
    for channels, downsample, message in [
        (4, 4, r"set encoders\.image\.channels to 5"),
        (5, 8, r"set encoders\.image\.downsample to 4"),
    ]:
        image = VaeImage(model=str(tmp_path), channels=channels, downsample=downsample)
        with pytest.raises(InputError, match=message):
            build_image_encoder(image, resolution=RESOLUTION, device="cpu")
        with pytest.raises(InputError, match=message):
            _decoder(EncodersConfig(image=image, decoder=VaeDecoder(model=str(tmp_path))))


WIDTH, GRID = 64, 4
LATENT_MEAN = torch.randn(WIDTH, GRID, GRID, generator=torch.Generator().manual_seed(2))
LATENT_STD = torch.rand(WIDTH, GRID, GRID, generator=torch.Generator().manual_seed(3)) + 0.5


def _rae(directory: Path) -> Any:
    """A small RAE with statistics of its own, and its encoder saved apart as a checkpoint."""
    from diffusers import AutoencoderRAE
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    rae = AutoencoderRAE(
        encoder_type="dinov2",
        encoder_hidden_size=WIDTH,
        encoder_patch_size=14,
        encoder_num_hidden_layers=2,
        encoder_input_size=14 * GRID,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
        patch_size=RESOLUTION // GRID,
        latents_mean=LATENT_MEAN,
        latents_std=LATENT_STD,
    ).eval()
    with torch.no_grad():
        rae.decoder.decoder_pred.weight.mul_(20)
    rae.save_pretrained(directory / "rae")
    encoder = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=WIDTH,
            patch_size=14,
            image_size=518,
            num_attention_heads=1,
            num_hidden_layers=2,
        )
    )
    report = encoder.load_state_dict(rae.encoder.state_dict(), strict=False)
    assert report.missing_keys == ["layernorm.weight", "layernorm.bias"]
    with torch.no_grad():
        encoder.layernorm.weight.uniform_(0.5, 2)
        encoder.layernorm.bias.uniform_(-1, 1)
    encoder.save_pretrained(directory / "vit")
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (directory / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return rae


def _rae_encoders(directory: Path, **changes: Any) -> EncodersConfig:
    vit = str(directory / "vit")
    settings = {"channels": WIDTH, "patch": 14, "input_size": 14 * GRID, **changes}
    return EncodersConfig(
        image=VitImage(model=vit, **settings), decoder=RaeDecoder(model=str(directory / "rae"))
    )


@torch.no_grad()
def test_rae_with_the_same_statistics_is_diffusers_rae(tmp_path: Path) -> None:
    rae = _rae(tmp_path)
    # diffusers divides by (std + 1e-5), we by √(variance + 1e-5).
    variance = (LATENT_STD.double() + 1e-5).square() - 1e-5
    path = tmp_path / "statistics.safetensors"
    identity = StatisticsIdentity(str(tmp_path / "vit"), None, RESOLUTION)
    save_statistics(path, LatentStatistics(10, LATENT_MEAN.double(), variance * 10), identity)
    encoders = _rae_encoders(tmp_path, statistics=str(path))
    encoder = build_image_encoder(encoders.image, resolution=RESOLUTION, device="cpu")
    images = _images(3)
    latents = encoder.encode(images)
    theirs = rae.encode(images.float() / 255).latent
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=2e-5)
    _assert_images_equal(_decoder(encoders).decode(latents), _as_uint8(rae.decode(theirs).sample))


@torch.no_grad()
def test_rae_without_statistics_reads_plain_tokens(tmp_path: Path) -> None:
    rae = _rae(tmp_path)
    encoders = _rae_encoders(tmp_path)
    encoder = build_image_encoder(encoders.image, resolution=RESOLUTION, device="cpu")
    images = _images(3)
    whitened = rae.encode(images.float() / 255).latent
    latents = encoder.encode(images)
    plain = whitened * (LATENT_STD + 1e-5) + LATENT_MEAN
    torch.testing.assert_close(latents, plain, rtol=1e-4, atol=2e-5)
    _assert_images_equal(_decoder(encoders).decode(latents), _as_uint8(rae.decode(whitened).sample))


def test_a_rae_of_another_encoder_is_refused(tmp_path: Path) -> None:
    _rae(tmp_path)
    with pytest.raises(InputError, match=r"token width = 32, but .* has 64"):
        _decoder(_rae_encoders(tmp_path, channels=32))
    with pytest.raises(InputError, match=r"positions = 9, but .* has 16"):
        _decoder(_rae_encoders(tmp_path, input_size=42))
    with pytest.raises(InputError, match=r"data\.resolution = 64, but .* has 32"):
        build_decoder(_rae_encoders(tmp_path), resolution=64, device="cpu")
    with pytest.raises(InputError, match="4×4 positions of the RAE decoder"):
        _decoder(_rae_encoders(tmp_path)).decode(torch.zeros(1, WIDTH, 2, 8))
