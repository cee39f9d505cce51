"""DiffAug pixel by pixel from the same draws, its gradient, and that draws belong to the sample."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dsr_scale.base import random_keys
from dsr_scale.decoders.augment import augmented

HEIGHT, WIDTH = 16, 24


def _images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))


def _by_hand(
    image: NDArray[np.float64], seed: int, step: int, sample: int
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """The distorted image [3,H,W] and how far it was moved down and right."""
    draws = random_keys.generator(seed, "discriminator augmentation", step, sample).random(7)
    brightness, saturation, contrast, down, right, top, left = draws
    image = image + (brightness - 0.5) / 2
    luminance = image.mean(axis=0)
    image = luminance + (image - luminance) * 2 * saturation
    image = image.mean() + (image - image.mean()) * (0.5 + contrast)
    dy, dx = int(down * 5) - 2, int(right * 7) - 3
    result = np.full_like(image, 0.5)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            hidden = (
                abs(y + 0.5 - top * HEIGHT) < HEIGHT / 4 and abs(x + 0.5 - left * WIDTH) < WIDTH / 4
            )
            if 0 <= y - dy < HEIGHT and 0 <= x - dx < WIDTH and not hidden:
                result[:, y, x] = image[:, y - dy, x - dx]
    return result, (dy, dx)


def test_it_is_diffaug_written_out() -> None:
    ids = list(range(40))
    images = _images(len(ids))
    ours = augmented(images, seed=1, step=2, sample_ids=ids)
    moves: set[int] = set()
    for row, sample in enumerate(ids):
        expected, (dy, dx) = _by_hand(images[row].numpy().astype(np.float64), 1, 2, sample)
        moves |= {dy, 10 + dx}
        np.testing.assert_allclose(ours[row].numpy(), expected, rtol=0, atol=1e-5)
    assert moves == {*range(-2, 3), *range(7, 14)}


def test_draws_belong_to_the_sample_and_the_step() -> None:
    images = _images(4)
    together = augmented(images, seed=1, step=2, sample_ids=[7, 3, 9, 5])
    assert torch.equal(together, augmented(images, seed=1, step=2, sample_ids=[7, 3, 9, 5]))
    alone = augmented(images[2:3], seed=1, step=2, sample_ids=[9])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)
    for other in ({"seed": 0, "step": 2}, {"seed": 1, "step": 3}):
        assert (together - augmented(images, **other, sample_ids=[7, 3, 9, 5])).abs().max() > 0.1


def test_gradients_pass_through() -> None:
    """The distortion is affine, so its gradient is exact over any distance."""
    ids = [1, 2, 3]
    images, moved = _images(3).requires_grad_(), 0.7 * _images(6)[3:]
    pull = torch.randn(3, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    made = augmented(images, seed=0, step=0, sample_ids=ids)
    (made * pull).sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        change = augmented(moved, seed=0, step=0, sample_ids=ids) - made
    torch.testing.assert_close(
        (change * pull).sum((1, 2, 3)),
        (images.grad * (moved - images.detach())).sum((1, 2, 3)),
        rtol=1e-4,
        atol=1e-4,
    )
    assert (images.grad != 0).float().mean() > 0.4
