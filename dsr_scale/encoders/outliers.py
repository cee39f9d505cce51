"""Outlier treatments of a frozen vision transformer, and what they do to latents, as text.

- **Registers** (DSR §3, test-time registers Alg. 2): a zero token is appended and takes over the
  activation of a few MLP units, the register neurons, from the patches.
- **Zeroing**: the same units are silenced on the patches and nothing takes over.
- **Attention bias**: units silenced, and every layer attends to one constant key and value.
- **Clamp**: patch tokens are scaled down to a multiple of the median norm after every block. Before
  the last norm alone this would do nothing, as layer norm does not see a token's scale.

CLS and trained registers are never touched; they compete for the maximum like every token. The hooks
are in `outlier_hooks.py`. torch.compile does not compare hooks when it looks for code to use again, so
compile a whole network, never block by block, and after its treatment is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, assert_never

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    AttentionBias,
    NormClamp,
    NoTreatment,
    OutlierTreatment,
    TestTimeRegisters,
    Zeroing,
)
from dsr_scale.encoders.attention_bias import bias_fingerprint, load_attention_bias
from dsr_scale.encoders.outlier_hooks import (
    append_register,
    clamp_norms,
    move_to_register,
    set_row,
    sum_row,
    zero_units,
)
from dsr_scale.encoders.register_file import (
    EncoderIdentity,
    checked_neurons,
    load_register_file,
    require_units,
)
from dsr_scale.encoders.vit_structure import Structure

if TYPE_CHECKING:
    from dsr_scale.encoders.vit import VitEncoder


@dataclass(frozen=True)
class RegisterTreatment:
    """A zero token that takes over the activation of register neurons."""

    neurons: Mapping[int, Sequence[int]]
    """Layer to units of its MLP."""
    maximum: Literal["shared", "per_neuron"] = "shared"
    """One extreme for a layer's units, or each unit's own."""
    keep_first_patch: bool = False
    """Patch 0 keeps its activation; only where no CLS token stands before it."""


@dataclass(frozen=True)
class ZeroingTreatment:
    """Register neurons are zero on patches."""

    neurons: Mapping[int, Sequence[int]]
    """Layer to units of its MLP."""


@dataclass(frozen=True)
class BiasTreatment:
    """Register neurons are zero on patches; an extra token has the same key and value in every image.

    The token's own residual stream is never read: only its rows of keys and values, which are
    replaced. So each query attends to one constant more, as with a bias inside attention.
    """

    neurons: Mapping[int, Sequence[int]]
    """Layer to units of its MLP."""
    key: Tensor
    """[layers,C], heads side by side."""
    value: Tensor
    """[layers,C]."""


@dataclass(frozen=True)
class ClampTreatment:
    """Patch tokens of large norm are scaled down after every block."""

    max_over_median: float
    """Largest norm left, in units of the image's median patch norm."""


Treatment = RegisterTreatment | ZeroingTreatment | BiasTreatment | ClampTreatment


def appends_register(treatment: Treatment | None) -> bool:
    """Whether a token is added to the sequence."""
    return isinstance(treatment, RegisterTreatment | BiasTreatment)


def build_treatment(
    config: OutlierTreatment, structure: Structure, identity: EncoderIdentity
) -> Treatment | None:
    """The treatment that a config asks for, its files read; None for `kind: none`.

    Raises InputError when a file is missing, unreadable, of another encoder than `identity`, or
    does not fit the network.
    """
    match config:
        case NoTreatment():
            return None
        case NormClamp(max_over_median=limit):
            return ClampTreatment(limit)
    file = load_register_file(config.neurons)
    file.require_encoder(identity)
    require_units(file.neurons, structure.hidden_units)
    match config:
        case TestTimeRegisters(maximum=maximum, keep_first_patch=keep):
            return RegisterTreatment(file.neurons, maximum, keep)
        case Zeroing():
            return ZeroingTreatment(file.neurons)
        case AttentionBias():
            return BiasTreatment(file.neurons, *load_attention_bias(Path(config.bias), file))
        case _:
            assert_never(config)


def treatment_identity(config: OutlierTreatment) -> str:
    """What the treatment does to latents, as text that is equal only for equal treatments.

    Depends on the content of the files that `config` names, not on where they are nor on what a
    search noted in them. Raises InputError when one cannot be read.
    """
    match config:
        case NoTreatment():
            return "none"
        case NormClamp(max_over_median=limit):
            return f"clamp {limit}"
    file = load_register_file(config.neurons)
    match config:
        case TestTimeRegisters(maximum=maximum, keep_first_patch=keep):
            return f"registers {maximum} {file.fingerprint}" + " first patch kept" * keep
        case Zeroing():
            return f"zeroing {file.fingerprint}"
        case AttentionBias():
            bias = bias_fingerprint(*load_attention_bias(Path(config.bias), file))
            return f"attention bias {file.fingerprint} {bias}"
        case _:
            assert_never(config)


def apply_treatment(
    treatment: Treatment, structure: Structure, special_tokens: int
) -> list[RemovableHandle]:
    """Hooks the treatment into a network with `special_tokens` rows before its patches.

    Raises InputError, before any hook, when it does not fit the network.
    """
    match treatment:
        case ClampTreatment(limit):
            hook = clamp_norms(limit, first_patch=special_tokens)
            return [block.register_forward_hook(hook) for block in structure.blocks]
        case RegisterTreatment():
            return _apply_registers(treatment, structure, special_tokens)
        case ZeroingTreatment(neurons):
            units = _units(neurons, structure)
            return _zero(units, structure, first_patch=special_tokens)
        case BiasTreatment():
            return _apply_bias(treatment, structure, special_tokens)
        case _:
            assert_never(treatment)


@contextlib.contextmanager
def treated(encoder: VitEncoder, treatment: Treatment | None) -> Iterator[None]:
    """Inside, `encoder` has this treatment and no other; None is the network as it is.

    Raises InputError when the treatment does not fit the network.
    """
    before = encoder.treatment
    encoder.treat(treatment)
    try:
        yield
    finally:
        encoder.treat(before)


def record_attention_bias(
    encoder: VitEncoder, treatment: RegisterTreatment, batches: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Key and value float32 [layers,C] of the register, averaged over the images of `batches`.

    `batches` are uint8 [B,3,H,W], at least one image in all. What `BiasTreatment` takes.
    """
    structure, images = encoder.structure, 0
    shape = (2, len(structure.blocks), encoder.channels)
    sums = torch.zeros(shape, dtype=torch.float64, device=structure.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(treated(encoder, treatment))
        row = encoder.register_row
        assert row is not None
        for part, projections in enumerate((structure.keys, structure.values)):
            for layer, projection in enumerate(projections):
                handle = projection.register_forward_hook(sum_row(row, sums[part, layer]))
                stack.callback(handle.remove)
        for batch in batches:
            encoder.tokens(batch)
            images += len(batch)
    key, value = (sums / images).float().cpu()
    return key, value


def _apply_registers(
    treatment: RegisterTreatment, structure: Structure, special_tokens: int
) -> list[RemovableHandle]:
    if treatment.keep_first_patch and special_tokens:
        raise InputError(
            found=f"keep_first_patch with an encoder that has {special_tokens} tokens before its "
            "patches",
            required="keep_first_patch only for encoders without CLS token, such as SigLIP2",
            remedy="remove encoders.image.outliers.keep_first_patch",
        )
    units = _units(treatment.neurons, structure)
    handles = [structure.embeddings.register_forward_hook(append_register(special_tokens))]
    for layer, of_layer in units.items():
        hook = move_to_register(
            of_layer,
            row=special_tokens,
            first_patch=special_tokens + 1 + treatment.keep_first_patch,
            maximum=treatment.maximum,
        )
        handles.append(structure.mlp_outputs[layer].register_forward_pre_hook(hook))
    return handles


def _apply_bias(
    treatment: BiasTreatment, structure: Structure, special_tokens: int
) -> list[RemovableHandle]:
    units = _units(treatment.neurons, structure)
    wanted = (len(structure.blocks), structure.keys[0].out_features)
    for name, constant in (("key", treatment.key), ("value", treatment.value)):
        if tuple(constant.shape) != wanted:
            raise InputError(
                found=f"an attention bias whose {name} has shape {list(constant.shape)}",
                required=f"shape {list(wanted)}: layers and channels of the encoder",
                remedy="record it for this encoder with dsr-scale registers",
            )
    handles = [structure.embeddings.register_forward_hook(append_register(special_tokens))]
    for projections, constants in (
        (structure.keys, treatment.key),
        (structure.values, treatment.value),
    ):
        for projection, constant in zip(projections, constants, strict=True):
            hook = set_row(special_tokens, constant.to(structure.device, structure.dtype))
            handles.append(projection.register_forward_hook(hook))
    return handles + _zero(units, structure, first_patch=special_tokens + 1)


def _zero(
    units: Mapping[int, Tensor], structure: Structure, *, first_patch: int
) -> list[RemovableHandle]:
    return [
        structure.mlp_outputs[layer].register_forward_pre_hook(
            zero_units(of_layer, first_patch=first_patch)
        )
        for layer, of_layer in units.items()
    ]


def _units(neurons: Mapping[int, Sequence[int]], structure: Structure) -> dict[int, Tensor]:
    """Units of each layer as int64 [R] on the network's device. Raises InputError for bad ones."""
    checked = checked_neurons(neurons)
    require_units(checked, structure.hidden_units)
    return {layer: torch.tensor(units, device=structure.device) for layer, units in checked.items()}
