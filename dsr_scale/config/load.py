"""From YAML files and `key=value` overrides to one checked-by-type `RunConfig`, and back.

A run is a stack of layers: the oldest ancestor named by `extends`, its children, then the command
line. Layers are merged before anything is validated, so a mistake is reported once, with the layer
it came from. What fits together across fields is the business of `checks.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dsr_scale.base.errors import InputError
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.problems import raise_problems
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.config.schema_paths import SchemaPlace, kinds_at, kinds_with, nearest, resolve
from dsr_scale.config.yaml_text import parse_yaml, to_yaml

COMMAND_LINE = "the command line"
_ABSENT = object()


class Layer(NamedTuple):
    """One source of settings: a file, or the command line."""

    source: str
    values: dict[str, Any]


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a diffusion transformer that the file at `path`, its ancestors and `key=value`
    overrides describe.

    Raises InputError naming every unknown key and wrong value at once.
    """
    run = load_any_run(path, overrides)
    if not isinstance(run, RunConfig):
        raise InputError(
            found=f"{path}, a run that trains a decoder",
            required="a run that trains a diffusion transformer, with a section model",
            remedy="give another run file; train, plan, serve and export take both",
        )
    return run


def load_any_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | DecoderRun:
    """The run that a file describes: of a decoder if it has a section `decoder`, else of a DiT.

    Raises InputError as `load_run`.
    """
    layers = _file_layers(Path(path))
    if overrides:
        layers.append(Layer(COMMAND_LINE, parse_overrides(overrides)))
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    kind = DecoderRun if "decoder" in values else RunConfig
    return _validated(kind, values, layers, source=str(path))


def parse_run(text: str, source: str) -> RunConfig:
    """The run in resolved YAML as `dump_run` writes it; `source` names it in errors."""
    values = _mapping(parse_yaml(text, source), source)
    return validated(values, [Layer(source, values)], source=source)


def dump_run(run: AnyRun) -> str:
    """The run as YAML with every field spelled out, but a `model.head` left to the preset;
    `parse_run` gives back an equal run."""
    return to_yaml(run.model_dump(mode="json"))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["training.steps=10"]` as nested mappings; values are YAML, a later one wins.

    Raises InputError for text without `=`, a key with empty parts, or bad YAML.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise InputError(
                found=f"the override {text!r}",
                required="KEY=VALUE, with the key's sections joined by dots",
                remedy="write for example training.steps=1000, without spaces around the =",
            )
        block = tree
        for part in parts[:-1]:
            inner = block.get(part)
            if not isinstance(inner, dict):
                inner = block[part] = {}
            block = inner
        block[parts[-1]] = parse_yaml(value, f"the override {text!r}")
    return tree


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings merge, everything else is replaced.

    A block that names another `kind` replaces the block below whole: fields of a pixel encoder
    mean nothing to a ViT.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            another_kind = "kind" in value and value["kind"] != old.get("kind")
            merged[key] = dict(value) if another_kind else merge(old, value)
        else:
            merged[key] = value
    return merged


def validated(values: Mapping[str, Any], layers: Sequence[Layer], source: str) -> RunConfig:
    """`values` as a RunConfig. Raises InputError with every problem, each with its layer."""
    return _validated(RunConfig, values, layers, source)


_Kind = TypeVar("_Kind", bound=AnyRun)


def _validated(
    kind: type[_Kind], values: Mapping[str, Any], layers: Sequence[Layer], source: str
) -> _Kind:
    try:
        # Through JSON, pydantic's strict mode takes lists for tuples but no "10" for 10.
        return kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise_problems(source, _problems(kind, error.errors(), layers))
        raise


def _file_layers(path: Path) -> list[Layer]:
    """The file's layers, oldest ancestor first."""
    layers: list[Layer] = []
    seen: list[Path] = []
    wanted: str = ""
    while True:
        if not path.is_file():
            raise InputError(
                found=f"no file {path}" + (f", named by extends in {wanted}" if wanted else ""),
                required="an existing YAML file",
                remedy=(
                    "correct extends; it is relative to the file it stands in"
                    if wanted
                    else "correct the path, or start from a file under configs/"
                ),
            )
        resolved = path.resolve()
        if resolved in seen:
            raise InputError(
                found="files that extend each other: "
                + " → ".join(str(p.name) for p in [*seen[seen.index(resolved) :], resolved]),
                required="a chain of parents that ends",
                remedy="remove extends from one of them",
            )
        seen.append(resolved)
        values = dict(_mapping(parse_yaml(_read(path), str(path)), str(path)))
        parent = values.pop("extends", None)
        layers.insert(0, Layer(str(path), values))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise InputError(
                found=f"extends: {parent!r} in {path}",
                required="the name of one YAML file",
                remedy="extend one parent; let that parent extend another if there are more",
            )
        wanted, path = str(path), path.parent / parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            found=f"{path}, which cannot be read: {error}",
            required="a readable UTF-8 text file",
            remedy="check the path, its permissions and its encoding",
        ) from error


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(
            found=f"{type(value).__name__} at the top of {source}",
            required="a mapping of sections, such as `name: …` and `model: …`",
            remedy="see docs/configuration.md, or start from a file under configs/",
        )
    return value


def _problems(
    root: type[AnyRun], errors: Sequence[ErrorDetails], layers: Sequence[Layer]
) -> list[InputError]:
    """One InputError per path; the alternatives of a plain union are joined."""
    by_path: dict[str, tuple[SchemaPlace, list[ErrorDetails]]] = {}
    for error in errors:
        place = resolve(root, error["loc"])
        by_path.setdefault(place.path, (place, []))[1].append(error)
    return [_problem(root, place, group, layers) for place, group in by_path.values()]


def _problem(
    root: type[AnyRun],
    place: SchemaPlace,
    group: Sequence[ErrorDetails],
    layers: Sequence[Layer],
) -> InputError:
    path, first = place.path, group[0]
    origin = _origin(path, layers)
    match first["type"]:
        case "extra_forbidden":
            return _unknown_key(root, place, origin)
        case "missing" if path.endswith("]"):
            return InputError(
                found=f"{path.partition('[')[0]} with too few values{origin}",
                required=f"a value for {path}",
                remedy=f"add the missing values of {path.partition('[')[0]}",
            )
        case "missing":
            files = [layer.source for layer in layers if layer.source != COMMAND_LINE]
            return InputError(
                found=f"no {path}",
                required=f"a value for {path}",
                remedy=f"add {path} to {files[-1]}",
            )
        case "union_tag_not_found" | "union_tag_invalid":
            given = _value_at(f"{path}.kind", layers)
            return InputError(
                found=f"{path} without a kind{origin}"
                if given is _ABSENT
                else f"{path}.kind = {json.dumps(given)}{_origin(f'{path}.kind', layers)}",
                required=f"{path}.kind, one of {', '.join(kinds_at(root, path))}",
                remedy=f"set {path}.kind to one of these",
            )
    value = first["input"]
    shown = "a block of settings" if isinstance(value, dict) else json.dumps(value, default=str)
    requirements = [_requirement(error["msg"], error["type"]) for error in group]
    return InputError(
        found=f"{path} = {shown}{origin}",
        required=" or ".join(dict.fromkeys(requirements)),
        remedy=_remedy(path, value, group),
    )


def _remedy(path: str, value: Any, group: Sequence[ErrorDetails]) -> str:
    kinds = {error["type"] for error in group}
    if kinds == {"string_type"} and isinstance(value, (int, float)):
        return f'write it in quotes: "{str(value).lower()}"'
    if kinds & {"int_type", "float_type"} and isinstance(value, str):
        return "write the number without quotes and without a unit"
    if path.endswith("]"):
        return f"change {path}"
    return f"change {path}, or remove it to use its default"


def _requirement(message: str, kind: str) -> str:
    """pydantic's sentence, cut to what is required."""
    plain = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list, such as [a, b]",
        "model_type": "a block of settings",
        "model_attributes_type": "a block of settings",
    }
    text = message.removeprefix("Input should be ").replace("'", "")
    return plain.get(kind, text if text != message else text[:1].lower() + text[1:])


def _unknown_key(root: type[AnyRun], place: SchemaPlace, origin: str) -> InputError:
    assert place.section is not None, "only a section forbids keys"
    prefix = place.path.rpartition(".")[0]
    other_kinds = kinds_with(root, place.path)
    close = nearest(root, place.path, place.section)
    if other_kinds:
        remedy = f"remove it, or set {prefix}.kind to {' or '.join(other_kinds)}, which has it"
    else:
        remedy = f"did you mean {close}?" if close else f"remove {place.path}"
    return InputError(
        found=f"{place.path}{origin}, a key that does not exist",
        required=f"one of the keys of {prefix or 'a run'}: {', '.join(place.section.model_fields)}",
        remedy=remedy,
    )


def _origin(path: str, layers: Sequence[Layer]) -> str:
    """` (in FILE)` for the top layer that sets `path`, so a value is sought where it stands."""
    for layer in reversed(layers):
        if _value_at(path, [layer]) is not _ABSENT:
            return f" ({'on' if layer.source == COMMAND_LINE else 'in'} {layer.source})"
    return ""


def _value_at(path: str, layers: Sequence[Layer]) -> Any:
    """What the top layer that sets `path` says; `_ABSENT` when none does."""
    for layer in reversed(layers):
        block: Any = layer.values
        for key in path.split("."):
            name = key.partition("[")[0]
            block = block.get(name, _ABSENT) if isinstance(block, Mapping) else _ABSENT
        if block is not _ABSENT:
            return block
    return _ABSENT
