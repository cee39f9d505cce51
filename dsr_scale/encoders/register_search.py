"""Finds register neurons: the few MLP units that push the norms of outlier tokens (TTR Alg. 1).

A unit's score is its mean absolute activation over an image's outlier tokens, averaged over the
images that have any; the highest are register neurons. Encoders may have populations of outliers
born at different depths, of which one pass finds the first; so passes repeat, each with the
neurons of those before applied, until the detection block is clean (DSR's recursion). Unlike the
released code, the register's own token is no outlier and chosen neurons are not ranked again, so
that a pass spends its budget on new ones. Every pass reads the images twice, since threshold and
last layer follow from norms; never more than one batch's activations are in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.encoders.outliers import RegisterTreatment, treated
from dsr_scale.encoders.patch_norms import LayerNorms, measure_norms, recorded_norms, removed
from dsr_scale.encoders.vit import VitEncoder

Batches = Callable[[], Iterable[Tensor]]
"""Gives the calibration images anew: uint8 [N,3,S,S] batches, each run in one pass."""

Progress = Callable[[str, int], None]
"""Called with what is being done and the images of a batch that has gone through."""

_QUIET_ACTIVATION = 0.5
_QUIET_SHARE = 0.5
_SIGMAS = 3


@dataclass(frozen=True)
class SearchSettings:
    """How to search; the defaults are those of the paper where it has any, else of docs/encoders.md."""

    top_k: int = 50
    """Neurons that a pass adds."""
    threshold: float | None = None
    """Norm over which a token at the detection block is an outlier; None: mean + 3 standard
    deviations of all patch norms there, of every pass anew."""
    detect_layer: int = -1
    """The detection block, counted as Python counts: its output tells which tokens are outliers."""
    highest_layer: int | None = None
    """Last layer whose neurons are ranked; None: of every pass, the block where outliers appear."""
    passes: int = 3
    """At most."""
    max_outlier_ratio: float = 1e-3
    """The search ends when a smaller share of patches is outliers at the detection block."""
    sparse: bool = False
    """Rank only neurons with an activation under 0.5 on at least half of the patches."""
    maximum: Literal["shared", "per_neuron"] = "shared"
    """As in `encoders.image.outliers`."""
    keep_first_patch: bool = False
    """As in `encoders.image.outliers`."""


class ScoredNeuron(NamedTuple):
    """One unit of an MLP and what it was chosen for."""

    layer: int
    unit: int
    score: float


@dataclass(frozen=True)
class SearchPass:
    """One round of ranking, with the neurons of earlier rounds applied."""

    threshold: float
    """Norm over which tokens at the detection block counted as outliers."""
    highest_layer: int
    """Last layer whose neurons were ranked, counted from 0."""
    images_with_outliers: int
    neurons: tuple[ScoredNeuron, ...]
    """Those that this round adds, best first."""
    after: tuple[LayerNorms, ...]
    """Norms by block with these applied as well."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and how it went."""

    settings: SearchSettings
    before: tuple[LayerNorms, ...]
    """Norms of the untreated encoder, by block."""
    passes: tuple[SearchPass, ...]
    stop: Literal["clean", "passes used up", "nothing to rank"]

    @property
    def neurons(self) -> dict[int, tuple[int, ...]]:
        """Layer → units, of all passes together; empty when the encoder needs no registers."""
        return _by_layer([neuron for done in self.passes for neuron in done.neurons])

    @property
    def after(self) -> tuple[LayerNorms, ...]:
        """Norms with all neurons applied, by block."""
        return self.passes[-1].after if self.passes else self.before

    @property
    def treatment(self) -> RegisterTreatment:
        """What all passes add up to; there must be neurons."""
        assert self.passes
        return _treatment([n for done in self.passes for n in done.neurons], self.settings)

    def description(self) -> dict[str, Any]:
        """Settings and findings as JSON values, for the register file."""
        return {
            "settings": asdict(self.settings),
            "stop": self.stop,
            "before": [norms._asdict() for norms in self.before],
            "passes": [
                {
                    "threshold": done.threshold,
                    "highest_layer": done.highest_layer,
                    "images_with_outliers": done.images_with_outliers,
                    "neurons": [list(neuron) for neuron in done.neurons],
                    "after": [norms._asdict() for norms in done.after],
                }
                for done in self.passes
            ],
        }


def find_register_neurons(
    encoder: VitEncoder,
    batches: Batches,
    settings: SearchSettings,
    *,
    on_images: Progress = lambda _stage, _images: None,
    on_norms: Callable[[str, tuple[LayerNorms, ...]], None] = lambda _stage, _norms: None,
) -> SearchResult:
    """Searches the encoder as it is without treatment, whatever treatment it has.

    `on_images` and `on_norms` hear of batches and measurements as they come. Raises InputError
    when a layer of the settings does not exist.
    """
    search = _Search(encoder, batches, settings, on_images, on_norms)
    before = norms = search.norms("before", [])
    passes: list[SearchPass] = []
    found: list[ScoredNeuron] = []
    while norms[search.detect_layer].outlier_ratio >= settings.max_outlier_ratio:
        if len(passes) == settings.passes:
            return SearchResult(settings, before, tuple(passes), "passes used up")
        done = search.one_pass(len(passes) + 1, norms, found)
        if done is None:
            return SearchResult(settings, before, tuple(passes), "nothing to rank")
        passes.append(done)
        found += done.neurons
        norms = done.after
    return SearchResult(settings, before, tuple(passes), "clean")


class _Search:
    """What the passes of one search have in common."""

    def __init__(
        self,
        encoder: VitEncoder,
        batches: Batches,
        settings: SearchSettings,
        on_images: Progress,
        on_norms: Callable[[str, tuple[LayerNorms, ...]], None],
    ) -> None:
        depth = len(encoder.structure.blocks)
        self.encoder = encoder
        self.batches = batches
        self.settings = settings
        self.detect_layer = _layer("--detect-layer", settings.detect_layer, depth)
        if settings.highest_layer is not None:
            _layer("--highest-layer", settings.highest_layer, depth)
        self.on_images = on_images
        self.on_norms = on_norms

    def norms(self, stage: str, neurons: Sequence[ScoredNeuron]) -> tuple[LayerNorms, ...]:
        """Norms by block with these neurons applied."""
        with treated(self.encoder, self._treatment(neurons)):
            norms = measure_norms(
                self.encoder,
                self.batches(),
                lambda images: self.on_images(f"{stage}: norms", images),
            )
        self.on_norms(stage, norms)
        return norms

    def one_pass(
        self, number: int, before: tuple[LayerNorms, ...], found: Sequence[ScoredNeuron]
    ) -> SearchPass | None:
        """Ranks neurons with those of earlier passes applied; None when there are none to rank."""
        settings, at_detection = self.settings, before[self.detect_layer]
        threshold = settings.threshold
        if threshold is None:
            threshold = at_detection.mean + _SIGMAS * at_detection.deviation
        highest = settings.highest_layer
        if highest is None:
            highest = first_outlier_layer(before, self.detect_layer, settings.max_outlier_ratio)
        stage = f"pass {number}"
        with treated(self.encoder, self._treatment(found)):
            scores = _Scores(self.encoder, highest % len(before) + 1)
            for images in self.batches():
                scores.add(images, self.detect_layer, threshold)
                self.on_images(f"{stage}: neurons", len(images))
        new = scores.highest(settings.top_k, found, sparse=settings.sparse)
        if not new:
            return None
        after = self.norms(stage, [*found, *new])
        return SearchPass(threshold, highest % len(before), scores.images, tuple(new), after)

    def _treatment(self, neurons: Sequence[ScoredNeuron]) -> RegisterTreatment | None:
        return _treatment(neurons, self.settings) if neurons else None


class _Scores:
    """Sums over images for every unit of the first `layers` MLPs."""

    def __init__(self, encoder: VitEncoder, layers: int) -> None:
        device = encoder.structure.device
        widths = encoder.structure.hidden_units[:layers]
        self.encoder = encoder
        self.images = 0
        """Images with outliers."""
        self._patches = 0
        self._sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in widths]
        self._quiet = [torch.zeros(n, dtype=torch.int64, device=device) for n in widths]

    def add(self, images: Tensor, detect_layer: int, threshold: float) -> None:
        """Adds the images [N,3,S,S] that have patches over `threshold` at the detection block."""
        structure, rows = self.encoder.structure, self.encoder.patch_rows
        linears = structure.mlp_outputs[: len(self._sums)]
        with _recorded_inputs(linears) as hidden, recorded_norms(structure.blocks) as norms:
            self.encoder.tokens(images)
        extreme = norms[detect_layer][:, rows] > threshold
        used = extreme.any(dim=1)
        # A mean over each image's outliers; rows of images without any are dropped.
        weights = extreme[used].float()
        weights /= weights.sum(dim=1, keepdim=True)
        self.images += len(weights)
        self._patches += weights.numel()
        for layer, activations in enumerate(hidden):
            sizes = activations[used][:, rows].abs().float()
            self._sums[layer] += torch.einsum("bt,btd->d", weights, sizes)
            self._quiet[layer] += (sizes < _QUIET_ACTIVATION).sum(dim=(0, 1))

    def highest(
        self, count: int, chosen: Sequence[ScoredNeuron], *, sparse: bool
    ) -> list[ScoredNeuron]:
        """At most `count` units by score, without those already `chosen`; equal scores by depth."""
        if not self.images:
            return []
        scores = [(sums / self.images).cpu() for sums in self._sums]
        if sparse:
            for of_layer, quiet in zip(scores, self._quiet, strict=True):
                of_layer[quiet.cpu() < _QUIET_SHARE * self._patches] = 0
        for layer, unit, _ in chosen:
            if layer < len(scores):
                scores[layer][unit] = 0
        ends = torch.tensor([len(of_layer) for of_layer in scores]).cumsum(0)
        ranked = torch.cat(scores).sort(descending=True, stable=True)
        best = []
        for score, position in zip(
            ranked.values[:count].tolist(), ranked.indices[:count].tolist(), strict=True
        ):
            layer = int(torch.searchsorted(ends, position, right=True))
            unit = position - (int(ends[layer - 1]) if layer else 0)
            if score > 0:
                best.append(ScoredNeuron(layer, unit, score))
        return best


def first_outlier_layer(
    norms: Sequence[LayerNorms], detect_layer: int, max_outlier_ratio: float
) -> int:
    """First block of the unbroken run of blocks with outliers that ends at the detection block.

    Not the first such block of all: patches of a plain background can make the others look large
    in the first blocks, before there is any register neuron.
    """
    layer = detect_layer
    while layer > 0 and norms[layer - 1].outlier_ratio >= max_outlier_ratio:
        layer -= 1
    return layer


@contextlib.contextmanager
def _recorded_inputs(linears: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, forwards leave the input [B,N,hidden] of every linear in the list."""
    inputs: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    with removed([linear.register_forward_pre_hook(record) for linear in linears]):
        yield inputs


def _by_layer(neurons: Iterable[ScoredNeuron]) -> dict[int, tuple[int, ...]]:
    layers: dict[int, tuple[int, ...]] = {}
    for neuron in sorted(neurons):
        layers[neuron.layer] = (*layers.get(neuron.layer, ()), neuron.unit)
    return layers


def _treatment(neurons: Iterable[ScoredNeuron], settings: SearchSettings) -> RegisterTreatment:
    return RegisterTreatment(_by_layer(neurons), settings.maximum, settings.keep_first_patch)


def _layer(option: str, layer: int, depth: int) -> int:
    """The layer counted from the front. Raises InputError when there is none."""
    if not -depth <= layer < depth:
        raise InputError(
            found=f"{option} {layer} with an encoder of {depth} blocks",
            required=f"a block from 0 to {depth - 1}, or from -{depth} to -1 counted from the end",
            remedy=f"correct {option}",
        )
    return layer % depth
