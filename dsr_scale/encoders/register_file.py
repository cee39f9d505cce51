"""Lists of register neurons on disk: which MLP units of which encoder push outlier tokens.

A file names the encoder it was found for and is refused for any other: units have no meaning in
another network. What the search noted about itself travels along but takes no part in the
fingerprint, which changes only with what changes latents. The two lists published with the paper
ship as `package:siglip2_base_patch16_256` and `package:siglip2_so400m_patch14_224`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsr_scale.base.atomic_files import write_json
from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import vit_geometry
from dsr_scale.config.encoders import VitImage

FORMAT = "dsr-scale register neurons"
VERSION = 1
PACKAGE_SCHEME = "package:"

_SEARCH = "find them for this encoder with dsr-scale registers"


class EncoderIdentity(NamedTuple):
    """Which network, at which size, register neurons belong to."""

    encoder: str
    """What the encoder is called: `encoders.image.name`, or else `encoders.image.model`."""
    revision: str | None
    """Commit of the hub repository, if pinned."""
    input_size: int
    """Side of the square image at the encoder, in pixels."""


def encoder_identity(image: VitImage) -> EncoderIdentity:
    """The identity of a configured encoder. Raises InputError when its size is not known."""
    return EncoderIdentity(image.known_as, image.revision, vit_geometry(image).input_size)


@dataclass(frozen=True)
class RegisterFile:
    """Register neurons of one encoder. Raises InputError unless `checked_neurons` accepts them."""

    encoder: str
    """As in `EncoderIdentity`."""
    revision: str | None
    """None where the list is not tied to a commit."""
    input_size: int
    """Side of the square image at the encoder, in pixels."""
    neurons: Mapping[int, Sequence[int]]
    """Layer, counted from 0, to units of its MLP."""
    source: str
    """Where the list comes from."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Settings and findings of the search, for people."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "neurons", checked_neurons(self.neurons))

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the neurons, whatever their order."""
        lists = sorted((layer, sorted(units)) for layer, units in self.neurons.items())
        return hashlib.blake2b(json.dumps(lists).encode(), digest_size=16).hexdigest()

    def require_encoder(self, identity: EncoderIdentity) -> None:
        """Raises InputError unless the neurons are those of this encoder.

        Revisions are compared where both are given.
        """
        found = EncoderIdentity(self.encoder, self.revision, self.input_size)
        if None in (found.revision, identity.revision):
            found = found._replace(revision=identity.revision)
        if found != identity:
            raise InputError(
                found=f"register neurons of {_described(found)}",
                required=f"register neurons of {_described(identity)}",
                remedy=f"{_SEARCH}, or set encoders.image.name if the model is a copy of that one",
            )


def checked_neurons(neurons: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Neurons in the order of their layers.

    Raises InputError for an empty list, negative numbers, and a unit that is named twice.
    """
    if not any(neurons.values()):
        raise _bad_neurons("no register neurons")
    for layer, units in neurons.items():
        if layer < 0 or not units or min(units) < 0:
            raise _bad_neurons(f"units {list(units)} of layer {layer}")
        if len(set(units)) < len(units):
            twice = next(unit for unit in units if units.count(unit) > 1)
            raise _bad_neurons(f"unit {twice} of layer {layer} twice")
    return {layer: tuple(neurons[layer]) for layer in sorted(neurons)}


def require_units(neurons: Mapping[int, Sequence[int]], hidden_units: Sequence[int]) -> None:
    """Raises InputError for neurons outside a network with `hidden_units` [layers] MLP units."""
    for layer, units in neurons.items():
        if layer >= len(hidden_units):
            raise _bad_neurons(f"layer {layer} in an encoder with {len(hidden_units)} layers")
        if max(units) >= hidden_units[layer]:
            raise _bad_neurons(
                f"unit {max(units)} of layer {layer}, whose MLP has {hidden_units[layer]} units"
            )


def load_register_file(name: str) -> RegisterFile:
    """The file at a path, or the published list `package:NAME`.

    Raises InputError when it is missing or not a register file.
    """
    text = _read(name)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _not_a_register_file(name, f"is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _not_a_register_file(name, "is some other JSON file")
    if content.get("version") != VERSION:
        raise _not_a_register_file(name, f"has version {content.get('version')}")
    match content:
        case {
            "encoder": str(encoder),
            "revision": str() | None as revision,
            "input_size": int(input_size),
            "neurons": dict(neurons),
            "source": str(source),
            "search": dict(search),
        } if all(map(_is_list_of_units, neurons.items())):
            lists = {int(layer): tuple(units) for layer, units in neurons.items()}
            try:
                return RegisterFile(encoder, revision, input_size, lists, source, search)
            except InputError as error:
                found = f"{name} with {error.found}"
                raise InputError(
                    found=found, required=error.required, remedy=error.remedy
                ) from error
    raise _not_a_register_file(name, f"has other fields or types: {sorted(content)}")


def save_register_file(path: Path, file: RegisterFile) -> None:
    """Writes the file atomically. Raises InputError when the path cannot be written."""
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "encoder": file.encoder,
            "revision": file.revision,
            "input_size": file.input_size,
            "neurons": {str(layer): list(units) for layer, units in file.neurons.items()},
            "source": file.source,
            "search": dict(file.search),
        },
    )


def _read(name: str) -> bytes:
    if name.startswith(PACKAGE_SCHEME):
        return _published(name.removeprefix(PACKAGE_SCHEME))
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise InputError(
            found=f"{name} could not be read: {error.strerror}",
            required="a register file",
            remedy=f"correct the path, or {_SEARCH}",
        ) from error


def _published(name: str) -> bytes:
    directory = importlib.resources.files("dsr_scale.encoders") / "registers"
    lists = {
        file.name.removesuffix(".json"): file
        for file in directory.iterdir()
        if file.name.endswith(".json")
    }
    if name not in lists:
        raise InputError(
            found=f"{PACKAGE_SCHEME}{name}, of which no register neurons are published",
            required=f"one of {', '.join(PACKAGE_SCHEME + known for known in sorted(lists))}",
            remedy=_SEARCH,
        )
    return lists[name].read_bytes()


def _is_list_of_units(item: tuple[str, Any]) -> bool:
    layer, units = item
    return layer.isdecimal() and isinstance(units, list) and all(type(u) is int for u in units)


def _described(identity: EncoderIdentity) -> str:
    revision = f" at revision {identity.revision}" if identity.revision else ""
    return f"{identity.encoder}{revision} with input size {identity.input_size}"


def _bad_neurons(found: str) -> InputError:
    return InputError(
        found=found,
        required="at least one unit, each named once and inside the encoder's MLPs",
        remedy=f"correct the list, or {_SEARCH}",
    )


def _not_a_register_file(name: str, what: str) -> InputError:
    return InputError(
        found=f"{name} {what}",
        required=f"a register file of version {VERSION} with encoder, revision, input_size, "
        "neurons (layer to list of units), source and search",
        remedy=f"name the file that dsr-scale registers wrote, or {_SEARCH}",
    )
