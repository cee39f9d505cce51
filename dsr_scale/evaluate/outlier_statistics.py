"""Statistics of one block's tokens, image by image: how large outliers are, where, what they know.

All are ratios or shares that need no threshold of a model's own, but for the one absolute rule. The
same norms without the channels of largest energy tell outlying tokens from massive activations:
a few channels that are huge on every token move all norms, and no token stands out when they are
gone. Two functions ask what an outlier still knows of its place: the cosine with its neighbours, and a
ridge probe to what its patch holds (docs/method.md §5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dsr_scale.base.token_outliers import outliers

MEASURES: dict[str, str] = {
    "outlier_ratio": "share of image tokens over median + 6·1.4826·MAD and over 2·median",
    "outlier_ratio_mad": "share over median + 6·1.4826·MAD alone",
    "outlier_ratio_sigma": "share over mean + 3 standard deviations",
    "outlier_ratio_median": "share over 3·median",
    "outlier_ratio_absolute": "share over the absolute norm threshold",
    "median_norm": "median norm of an image's tokens",
    "max_over_median": "largest over median norm",
    "top_over_median": "mean of the largest 0.2 % of norms (at least one) over the median",
    "register_over_median": "largest register norm over the median of image tokens",
    "channel_energy_share": "share of the squared norms in the three channels of largest energy",
    "outlier_ratio_without_channels": "outlier_ratio without the three channels of largest energy",
    "max_over_median_without_channels": "max_over_median without those channels",
    "top_over_median_without_channels": "top_over_median without those channels",
    "register_over_median_without_channels": "register_over_median without those channels",
    "attention_registers": "attention of image tokens that registers receive in all",
    "attention_top_norm": "… that the 1 % of image tokens with the largest norms receive in all",
    "attention_text": "… that text tokens in context receive in all",
    "attention_special": "… that an encoder's CLS token receives",
    "attention_extra_key": "… that the key of attention bias or of softmax-off-by-one receives",
    "attention_rest": "… that all other image tokens receive in all",
    "attention_registers_per_token": "attention_registers over uniform attention, per token",
    "attention_top_norm_per_token": "attention_top_norm over uniform attention, per token",
    "attention_text_per_token": "attention_text over uniform attention, per token",
    "attention_special_per_token": "attention_special over uniform attention, per token",
    "attention_extra_key_per_token": "attention_extra_key over uniform attention",
    "attention_rest_per_token": "attention_rest over uniform attention, per token",
    "attention_entropy": "entropy of an image token's attention over that of uniform attention",
    "cross_text_per_token": "cross-attention: mass that a real text token receives on average",
    "cross_text_top": "cross-attention: mass that the most attended text token receives",
    "cross_entropy": "cross-attention: entropy over that of uniform attention",
    "position_repeat": "probability that an outlier's position is an outlier in another image",
    "position_chance": "the same, were each image's outliers placed at random",
    "border_enrichment": "share of outliers on the grid's border over the border's share of tokens",
    "neighbour_cosine_outliers": "cosine of outlier tokens with their neighbours (four at most)",
    "neighbour_cosine_normal": "cosine of other tokens with their neighbours",
    "patch_prediction_outliers": "R² of a ridge probe from outlier tokens to what their patch holds",
    "patch_prediction_normal": "R² of the same probe on other tokens",
}
"""Name → what it is, in the order of reports. `Findings.measures` has each of them."""


POOLED = (
    "position_repeat",
    "position_chance",
    "border_enrichment",
    "patch_prediction_outliers",
    "patch_prediction_normal",
)
"""Measures of all images together, which have no standard error."""
CHANNELS = 3
"""Of largest energy, removed for the control."""
COMPONENTS = 3
TOP_SHARE = 0.002
_DEVIATIONS = 6 * 1.4826
"""Six standard deviations in units of the median absolute deviation."""
_SIGMAS = 3
_TIMES_MEDIAN = 3
_RIDGE = 1e-2
"""Of the probe, over the mean square of its inputs."""
HISTOGRAM_EDGES = torch.logspace(-1, 2, 61, dtype=torch.float64)
"""Of norms over the image's median; the outermost bins hold what is beyond."""


NO_ROWS = slice(0, 0)


class TokenRows(NamedTuple):
    """Which rows of a sequence are what; an empty slice where there are none."""

    registers: slice
    image: slice
    text: slice
    """Text in context."""
    special: slice
    """An encoder's CLS token."""


@dataclass(frozen=True)
class BlockStatistics:
    """Of a batch of B images with T image tokens and K registers."""

    values: dict[str, Tensor]
    """Measure → [B]; NaN where an image has none."""
    norms: Tensor
    """[B,T]."""
    norms_without_channels: Tensor
    """[B,T], without the image's `channels`."""
    register_norms: Tensor
    """[B,K]."""
    outlying: Tensor
    """bool [B,T], by the rule of `base.token_outliers`."""
    channels: Tensor
    """int64 [B,3], those of largest energy over the image's tokens."""


def block_statistics(
    tokens: Tensor, rows: TokenRows, grid: tuple[int, int], *, threshold: float
) -> BlockStatistics:
    """Statistics of tokens [B,N,D] whose image tokens fill `grid`, row-major.

    `threshold` is the norm of the absolute rule.
    """
    tokens = tokens.float()
    image = tokens[:, rows.image]
    channels = largest_channels(image)
    norms = tokens.norm(dim=-1)
    of_image, of_registers = norms[:, rows.image], norms[:, rows.registers]
    masks = outlier_masks(of_image, threshold)
    outlying = masks["outlier_ratio"]
    values = {name: mask.float().mean(1) for name, mask in masks.items()}
    values["median_norm"] = of_image.median(1).values
    values |= norm_ratios(of_image, of_registers)
    rest = norms_without(tokens, channels)
    rest_image = rest[:, rows.image]
    controls = {"outlier_ratio": outliers(rest_image).float().mean(1)}
    controls |= norm_ratios(rest_image, rest[:, rows.registers])
    values |= {f"{name}_without_channels": value for name, value in controls.items()}
    values["channel_energy_share"] = 1 - rest_image.square().sum(1) / of_image.square().sum(1)
    cosines = neighbour_cosines(image, grid)
    values["neighbour_cosine_outliers"] = masked_mean(cosines, outlying)
    values["neighbour_cosine_normal"] = masked_mean(cosines, ~outlying)
    return BlockStatistics(values, of_image, rest_image, of_registers, outlying, channels)


def outlier_masks(norms: Tensor, threshold: float) -> dict[str, Tensor]:
    """Norms [B,T] → bool [B,T] for each rule, by the name of its measure."""
    median = norms.median(1, keepdim=True).values
    deviation = (norms - median).abs().median(1, keepdim=True).values
    sigma = norms.std(1, keepdim=True, correction=0)
    return {
        "outlier_ratio": outliers(norms),
        "outlier_ratio_mad": norms > median + _DEVIATIONS * deviation,
        "outlier_ratio_sigma": norms > norms.mean(1, keepdim=True) + _SIGMAS * sigma,
        "outlier_ratio_median": norms > _TIMES_MEDIAN * median,
        "outlier_ratio_absolute": norms > threshold,
    }


def norm_ratios(norms: Tensor, register_norms: Tensor) -> dict[str, Tensor]:
    """Norms [B,T] and [B,K] → ratios [B] to the image tokens' median; NaN for no registers."""
    median = norms.median(1).values
    top = norms.topk(math.ceil(TOP_SHARE * norms.shape[1]), dim=1).values
    registers = torch.full_like(median, math.nan)
    if register_norms.shape[1]:
        registers = register_norms.amax(1)
    return {
        "max_over_median": norms.amax(1) / median,
        "top_over_median": top.mean(1) / median,
        "register_over_median": registers / median,
    }


def largest_channels(tokens: Tensor) -> Tensor:
    """The channels with the largest sum of squares over an image's tokens [B,T,D]: int64 [B,3]."""
    return tokens.square().sum(1).topk(CHANNELS, dim=-1).indices


def norms_without(tokens: Tensor, channels: Tensor) -> Tensor:
    """Norms [B,N] of tokens [B,N,D] whose image's `channels` [B,3] are set to zero."""
    removed = channels[:, None].expand(-1, tokens.shape[1], -1)
    # Subtracting their squares from the norm's would leave nothing but rounding beside a huge one.
    return tokens.scatter(-1, removed, 0).norm(dim=-1)


def neighbour_cosines(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine of each token with the two to four beside it: [B,T,D] → [B,T]."""
    unit = functional.normalize(tokens, dim=-1).unflatten(1, grid)
    across = (unit[:, :, :-1] * unit[:, :, 1:]).sum(-1)
    down = (unit[:, :-1] * unit[:, 1:]).sum(-1)
    total, count = (torch.zeros(unit.shape[:3], device=tokens.device) for _ in range(2))
    for part, cosines in (
        (slice(None, -1), across),
        (slice(1, None), across),
    ):
        total[:, :, part] += cosines
        count[:, :, part] += 1
    for part in (slice(None, -1), slice(1, None)):
        total[:, part] += down
        count[:, part] += 1
    return (total / count).flatten(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B,T] where `mask`: [B], NaN where it is nowhere set."""
    return (values * mask).sum(1) / mask.sum(1)


def position_consistency(counts: Tensor, per_image: Tensor) -> tuple[float, float]:
    """How probably the position of an outlier is an outlier in another image, and by chance.

    `counts` [T]: images with an outlier there; `per_image` [n]: outliers of each image. Chance
    places each image's outliers at random. NaN without outliers or a second image.
    """
    counts, per_image = counts.double(), per_image.double()
    found = counts.sum()
    pairs = found * (len(per_image) - 1)
    repeat = (counts * (counts - 1)).sum() / pairs
    chance = (found.square() - per_image.square().sum()) / (pairs * len(counts))
    return float(repeat), float(chance)


def border_enrichment(counts: Tensor) -> float:
    """Share of outliers `counts` [h,w] on the grid's border over the border's share of positions."""
    border = torch.ones_like(counts, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    counts = counts.double()
    return float(counts[border].sum() / counts.sum() / border.double().mean())


def principal_components(tokens: Tensor) -> Tensor:
    """Scores of each image's own first three principal components: [B,T,D] → [B,T,3].

    The score furthest from zero is positive, since a component's sign means nothing.
    """
    centred = tokens.float() - tokens.float().mean(1, keepdim=True)
    # Of T×T, not D×D: the scores are its eigenvectors, and no D×D matrix is made.
    values, vectors = torch.linalg.eigh(centred @ centred.mT)
    scores = vectors[..., -COMPONENTS:] * values[:, None, -COMPONENTS:].clamp(min=0).sqrt()
    scores = scores.flip(-1)
    extreme = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    return torch.where(extreme < 0, -scores, scores)


def norm_histogram(norms: Tensor, median: Tensor) -> Tensor:
    """How many of norms [B,N], over the images' `median` [B], are in each bin: int64 [H].

    Images whose median is 0 have none.
    """
    edges = HISTOGRAM_EDGES[1:-1].to(norms.device, norms.dtype)
    ratios = (norms / median[:, None])[median > 0]
    places = torch.bucketize(ratios.flatten(), edges)
    return torch.bincount(places, minlength=len(HISTOGRAM_EDGES) - 1)


class RidgeProbe:
    """A linear map from tokens, each of unit mean square, to what their patches hold.

    Fitted on the tokens of some images and tested on those of others. Scaling the tokens is what the
    next block's norm does; without it an outlier's prediction would be off for its length alone. Holds
    D·(D+C) sums, no tokens.
    """

    def __init__(self, width: int, outputs: int, device: torch.device) -> None:
        self._squares = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self._products = torch.zeros(width + 1, outputs, dtype=torch.float64, device=device)
        self._map: Tensor | None = None
        self._errors = torch.zeros(2, 2, dtype=torch.float64, device=device)

    def fit(self, tokens: Tensor, targets: Tensor) -> None:
        """Adds tokens [n,D] with targets [n,C]."""
        inputs = _with_one(tokens)
        self._squares += inputs.mT @ inputs
        self._products += inputs.mT @ targets.double()

    def test(self, tokens: Tensor, targets: Tensor, outlying: Tensor) -> None:
        """Adds the errors on tokens [n,D] of which `outlying` [n] are counted apart."""
        if self._map is None:
            self._map = self._solve()
        targets = targets.double()
        error = (targets - _with_one(tokens) @ self._map).square().sum(1)
        around = (targets - self._mean_target()).square().sum(1)
        both = torch.stack([error, around])
        self._errors += torch.stack([both @ outlying.double(), both @ (~outlying).double()])

    def r_squared(self) -> tuple[float, float]:
        """1 − error / variance about the fitted tokens' mean, of outliers and of others; NaN for none."""
        error, around = self._errors.unbind(1)
        of_outliers, of_others = (1 - error / around).tolist()
        return of_outliers, of_others

    def _mean_target(self) -> Tensor:
        return self._products[-1] / self._squares[-1, -1]

    def _solve(self) -> Tensor:
        penalty = torch.full_like(self._squares[0], _RIDGE) * self._squares[-1, -1]
        penalty[-1] = 0  # the constant is free
        return torch.linalg.solve(self._squares + penalty.diag(), self._products)


def _with_one(tokens: Tensor) -> Tensor:
    """Tokens [n,D] of unit mean square with a constant beside them: float64 [n,D+1]."""
    tokens = tokens.double()
    scaled = functional.normalize(tokens, dim=-1) * math.sqrt(tokens.shape[-1])
    return functional.pad(scaled, (0, 1), value=1)
