"""The adaptive weight of the adversarial loss: how hard reconstruction pulls at the last layer.

λ = ‖∇L_rec‖ / (‖∇L_adv‖ + ε), both with respect to the decoder's last weight (Esser et al., "Taming
Transformers", eq. 7). The adversarial loss times λ pulls as hard there as reconstruction does,
whatever the scale of the discriminator's logits; the configured weight says how hard in proportion.

Norms are given, not taken here: those of the global batch's gradients make λ the same on every rank
and for every division of the batch. The published code takes each rank's own.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-4
"""Added to the adversarial norm, as published."""


def weight_from_norms(
    reconstruction_squared: Tensor, adversarial_squared: Tensor, *, most: float
) -> Tensor:
    """√reconstruction / (√adversarial + ε), at most `most`, a scalar without a graph.

    Arguments are squared L2 norms of the two losses' gradients at `last_layer`, scalars.
    """
    ratio = reconstruction_squared.sqrt() / (adversarial_squared.sqrt() + EPSILON)
    return ratio.clamp(max=most).detach()
