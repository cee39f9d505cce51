"""Dotted paths through the schema: which keys exist, and which one a misspelt key was meant to be.

pydantic reports a location such as ('encoders', 'image', 'vit', 'chanels'), where 'vit' is the tag
of a union and no key of the file. Everything said to a person uses the path in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

from dsr_scale.config.section import Section


class SchemaPlace(NamedTuple):
    """A pydantic error location, resolved."""

    path: str
    """As written on the command line: `encoders.image.channels`, `betas[1]`."""
    section: type[Section] | None
    """The section that holds the last key; None inside a plain value."""


def sections_in(annotation: Any) -> list[type[Section]]:
    """Every Section class inside an annotation such as `Section | None` or a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def tag_of(section: type[Section]) -> str | None:
    """The `kind` that selects this section in a union; None for a section outside unions."""
    field = section.model_fields.get("kind")
    return str(field.default) if field else None


def resolve(root: type[Section], location: Sequence[str | int]) -> SchemaPlace:
    """The path and section of a pydantic error location, with union tags taken out."""
    path = ""
    choices = [root]
    holder: type[Section] | None = None
    for part in location:
        tagged = [choice for choice in choices if tag_of(choice) == part]
        if len(choices) > 1 and tagged:
            choices = tagged
            continue
        holder = choices[0] if len(choices) == 1 else None
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        if holder is None:
            break  # the name of a plain union's member, such as `float`
        path += f".{part}" if path else part
        field = holder.model_fields.get(part)
        choices = sections_in(field.annotation) if field else []
    return SchemaPlace(path, holder)


def kinds_at(root: type[Section], path: str) -> list[str]:
    """The `kind`s that the union at a dotted `path` offers."""
    return [tag for choice in _choices_at(root, path) if (tag := tag_of(choice))]


def kinds_with(root: type[Section], path: str) -> list[str]:
    """The `kind`s of the union at the parent of `path` that have its last key."""
    parent, _, key = path.rpartition(".")
    choices = [choice for choice in _choices_at(root, parent) if key in choice.model_fields]
    return [tag for choice in choices if (tag := tag_of(choice))]


def _choices_at(root: type[Section], path: str) -> list[type[Section]]:
    """The sections that a block at a dotted `path` may be; the root for an empty path."""
    choices = [root]
    for name in path.split(".") if path else []:
        fields = [choice.model_fields[name] for choice in choices if name in choice.model_fields]
        choices = [section for field in fields for section in sections_in(field.annotation)]
    return choices


def leaf_paths(root: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields, those of every member of a union included."""
    for name, field in root.model_fields.items():
        path = prefix + name
        yield path
        for section in sections_in(field.annotation):
            yield from leaf_paths(section, path + ".")


def nearest(root: type[Section], path: str, section: type[Section]) -> str | None:
    """The existing path closest to the unknown `path`, whose last key is not in `section`.

    Names of the same section come first, then the same name anywhere, then a similar name anywhere.
    """
    prefix, _, key = path.rpartition(".")
    siblings = difflib.get_close_matches(key, list(section.model_fields), n=1, cutoff=0.6)
    if siblings:
        return f"{prefix}.{siblings[0]}" if prefix else siblings[0]
    paths = list(dict.fromkeys(leaf_paths(root)))
    names = {candidate.rpartition(".")[2] for candidate in paths}
    similar = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.75)
    if not similar:
        return None
    same_name = [candidate for candidate in paths if candidate.rpartition(".")[2] == similar[0]]
    return difflib.get_close_matches(path, same_name, n=1, cutoff=0.0)[0]
