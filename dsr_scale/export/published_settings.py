"""What networks were released for: encoder, decoder, what they put out, timestep shift, sampling.

No released checkpoint says any of it, and each decides what the numbers of the network mean. Models are
named as on the hub; statistics are files that are downloaded beside the weights.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape, latent_grid, vit_geometry
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.config.encoders import EncodersConfig, TestTimeRegisters, VitImage

PUBLISHED_SAMPLING = SamplingConfig(solver="euler", steps=49)
"""50 time points without guidance."""
PUBLISHED_BATCH_IMAGES = 1024
"""Of an optimizer step, in every released recipe."""
IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k, of which released statistics are."""


class Setting(NamedTuple):
    """An encoder and what networks were released for it."""

    image: VitImage
    decoder: str | None
    """None where the decoder was not released in the form of diffusers."""
    prediction: Literal["data", "velocity"]
    """DSR's networks put out data, RAE's the velocity."""
    resolution: int = 256
    shift: float | None = None
    """α of the timestep shift; None is √(latent elements / 4096)."""

    @property
    def latents(self) -> tuple[int, int, int]:
        """Channels, height and width of the encoder's latents."""
        side = self.resolution
        grid = latent_grid(EncodersConfig(image=self.image), side, side, side)
        return (vit_geometry(self.image).channels, *grid)

    def timestep_shift(self) -> float:
        """α in force."""
        return self.shift or math.sqrt(math.prod(self.latents) / 4096)

    def check_network(self, shape: ModelShape) -> None:
        """Raises InputError for a network on other latents than this encoder's."""
        held = (shape.channels, *shape.grid)
        if held != self.latents:
            raise InputError(
                found=f"a network on latents of {list(held)}",
                required=f"{list(self.latents)}, those of {self.image.known_as} at "
                f"{self.resolution} pixels",
                remedy="choose the encoder that the network was trained on",
            )


_SIGLIP2_B = VitImage(model="google/siglip2-base-patch16-256")
_SIGLIP2_B_DECODER = "nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08"
_SO400M = VitImage(model="google/siglip2-so400m-patch14-224")
_SO400M_SHIFT = math.sqrt(196_608 / 4096)
"""The released So400M networks were trained with the shift of 768 channels, although they have 1152."""
_DINOV2_B = VitImage(model="facebook/dinov2-with-registers-base")


def _with_registers(image: VitImage, neurons: str) -> VitImage:
    """As released, which leaves the first patch of encoders without CLS token as it is."""
    registers = TestTimeRegisters(neurons=f"package:{neurons}", keep_first_patch=True)
    return image.model_copy(update={"outliers": registers})


SETTINGS = {
    "siglip2-b": Setting(_SIGLIP2_B, _SIGLIP2_B_DECODER, "data"),
    "siglip2-b-registers": Setting(
        _with_registers(_SIGLIP2_B, "siglip2_base_patch16_256"), _SIGLIP2_B_DECODER, "data"
    ),
    "siglip2-so400m": Setting(_SO400M, None, "data", shift=_SO400M_SHIFT),
    "siglip2-so400m-registers": Setting(
        _with_registers(_SO400M, "siglip2_so400m_patch14_224"), None, "data", shift=_SO400M_SHIFT
    ),
    "dinov2-b": Setting(_DINOV2_B, "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", "velocity"),
    "dinov2-b-512": Setting(
        _DINOV2_B.model_copy(update={"input_size": 448}),
        "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
        "velocity",
        resolution=512,
    ),
}


def released_for(encoder: str) -> Setting:
    """What was released for an encoder of `SETTINGS`. Raises InputError for another name."""
    if encoder not in SETTINGS:
        raise InputError(
            found=f"encoder {encoder!r}",
            required=f"one of {', '.join(SETTINGS)}",
            remedy="choose one of these; a run of this package exports itself: dsr-scale export",
        )
    return SETTINGS[encoder]
