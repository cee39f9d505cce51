"""The decoder of a representation autoencoder as a network to train, and the folder it becomes.

It is the decoder inside diffusers' `AutoencoderRAE` with the arithmetic that follows it, without the
encoder and the latent statistics of that class: latents come unwhitened and images leave in [0, 1]
scale, so the network trained here is the function that `encoders.decoder: {kind: rae}` later calls.

A folder that `AutoencoderRAE.from_pretrained` reads must hold an encoder. The real one has registers
or neurons moved that the class cannot express, so the folder gets one without a block, whose weights
are not-a-number: 6 MB for 768 channels beside the 1.7 GB of a published decoder (XL), and `encode`
gives latents that nobody can mistake for real ones.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsr_scale.base.atomic_files import rename, require_writable_directory, write_bytes
from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.decoders.initialisation import initialise

PLACEHOLDER_PATCH = 14
"""The patch of the encoder that is none; the number of latent positions follows from it."""
LATENTS_MEAN, LATENTS_STD = 0.0, 1 - 1e-5
"""Whitening that changes nothing: the class adds 1e-5 to the deviation that it multiplies with."""

_CARD = """\
# Decoder of a representation autoencoder

It turns the latents of {encoder} into images. Latents are given before whitening.

Only the decoder is here. The class needs an encoder; this one has no block and its weights are not a
number, so that `encode` fails visibly. In a run file of dsr-scale:

    encoders:
      decoder: {{kind: rae, model: THIS_FOLDER}}
"""


class RaeDecoderNetwork(nn.Module):
    """Unwhitened latents → images, trainable in any precision."""

    def __init__(
        self,
        decoder: Any,
        *,
        grid: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        """`decoder`: diffusers' `RAEDecoder` for `grid`×`grid` positions."""
        super().__init__()
        self.decoder: Any = decoder
        self.grid = grid
        # Not buffers: a network cast to bf16 would shift every image by the rounding of its mean.
        self.image_mean = tuple(float(mean) for mean in image_mean)
        self.image_std = tuple(float(std) for std in image_std)

    @property
    def last_layer(self) -> nn.Parameter:
        """[3·patch²,width]: the weight where the adaptive weight compares gradients."""
        return self.decoder.decoder_pred.weight

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] → float32 images [B,3,H,W], 0 black and 1 white, not clamped."""
        assert latents.shape[-2:] == (self.grid, self.grid), latents.shape
        tokens = latents.flatten(2).transpose(1, 2).contiguous()
        return self.images_of(self.decoder(tokens, return_dict=False)[0])

    def images_of(self, patches: Tensor) -> Tensor:
        """What the last layer gives, [B,N,3·patch²] → images as `forward` returns them."""
        planes = self.decoder.unpatchify(patches.float()).unbind(1)
        scaled = zip(planes, self.image_mean, self.image_std, strict=True)
        return torch.stack([plane * std + mean for plane, mean, std in scaled], dim=1)


def build_decoder_network(
    *,
    latent_channels: int,
    grid: int,
    image_size: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    mlp_width: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    seed: int = 0,
) -> RaeDecoderNetwork:
    """A decoder from `grid`×`grid` latents to square images, with the initial values of `seed`.

    `image_mean` and `image_std` [3], in [0, 1] scale, are the colours that an output of 0 means and
    that an output of 1 adds. `heads` and 4 divide `width`.
    """
    assert image_size == grid * patch, (image_size, grid, patch)
    declare_torchvision_operators()
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    decoder = RAEDecoder(
        hidden_size=latent_channels,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=mlp_width,
        num_patches=grid * grid,
        patch_size=patch,
        image_size=image_size,
    )
    network = RaeDecoderNetwork(decoder, grid=grid, image_mean=image_mean, image_std=image_std)
    initialise(network, seed)
    return network


def save_autoencoder(network: RaeDecoderNetwork, folder: Path, *, encoder_name: str) -> None:
    """Writes `network` in float32 as an `AutoencoderRAE` that decodes unwhitened latents.

    `encoder_name` says whose latents it decodes, for the README of the folder; the class has no
    place for it. What was saved there before is replaced.
    Raises InputError when the disk is full or the folder cannot be written.
    """
    declare_torchvision_operators()
    from diffusers import AutoencoderRAE

    decoder = network.decoder
    with torch.device("meta"):
        autoencoder = AutoencoderRAE(
            encoder_type="dinov2",
            encoder_hidden_size=decoder.decoder_embed.in_features,
            encoder_patch_size=PLACEHOLDER_PATCH,
            encoder_num_hidden_layers=0,
            encoder_input_size=PLACEHOLDER_PATCH * network.grid,
            decoder_hidden_size=decoder.decoder_hidden_size,
            decoder_num_hidden_layers=len(decoder.decoder_layers),
            decoder_num_attention_heads=decoder.decoder_layers[0].attention.heads,
            decoder_intermediate_size=decoder.decoder_layers[0].output.dense.in_features,
            patch_size=decoder.patch_size,
            encoder_norm_mean=list(network.image_mean),
            encoder_norm_std=list(network.image_std),
            latents_mean=[LATENTS_MEAN],
            latents_std=[LATENTS_STD],
        )
    autoencoder.load_state_dict(_saved_weights(network, autoencoder), assign=True)
    _write(autoencoder, folder)
    write_bytes(folder / "README.md", _CARD.format(encoder=encoder_name).encode())


def _write(autoencoder: Any, folder: Path) -> None:
    """Weights and config, each whole or not at all."""
    from safetensors import SafetensorError

    require_writable_directory(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial.") as partial:
            autoencoder.save_pretrained(partial)
            for file in sorted(Path(partial).iterdir()):
                # The library makes files that their owner alone may read.
                file.chmod(folder.stat().st_mode & 0o666)
                rename(file, folder / file.name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            found=f"{folder} could not be written: {error}",
            required="room for the weights, and permission to write them",
            remedy="free space or choose another directory",
        ) from error


def _saved_weights(network: RaeDecoderNetwork, autoencoder: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of `autoencoder`, which is on the meta device, on the CPU in float32."""
    weights = {
        name: torch.full(tensor.shape, math.nan)
        for name, tensor in autoencoder.state_dict().items()
        if name.startswith("encoder.")
    }
    weights["encoder_mean"] = torch.tensor(network.image_mean).view(1, 3, 1, 1)
    weights["encoder_std"] = torch.tensor(network.image_std).view(1, 3, 1, 1)
    weights["_latents_mean"] = torch.tensor([LATENTS_MEAN])
    weights["_latents_std"] = torch.tensor([LATENTS_STD])
    for name, tensor in network.decoder.state_dict().items():
        weights[f"decoder.{name}"] = tensor.detach().float().cpu()
    return weights
