"""The manual of every setting, written from the schema: `python -m dsr_scale.config.reference`.

The text stands in the docstrings of the schema alone; docs/configuration.md holds this output, and
a test says when it has fallen behind.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.config.schema_paths import sections_in, tag_of
from dsr_scale.config.section import Section

_SIGNS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def reference() -> str:
    """Markdown: a heading for each section, a table row for each field; then what decoders add."""
    return "\n".join([*_section(RunConfig, ""), *_decoder_sections()]).rstrip() + "\n"


def _decoder_sections() -> Iterator[str]:
    """Sections that runs of decoders have in place of those of a transformer."""
    yield "### A run that trains a decoder"
    yield ""
    yield "Has `decoder` where the others have `model`, `diffusion` and `grid`, and its own `evaluation`."
    yield ""
    for name, field in DecoderRun.model_fields.items():
        if name not in AnyRun.model_fields:
            for section in sections_in(field.annotation):
                yield from _section(section, name)


def _section(section: type[Section], path: str) -> Iterator[str]:
    """The table of one section, then the sections inside it."""
    kind = tag_of(section)
    title = f"`{path}`" if path else "The top of a run file"
    yield f"### {title}" + (f", kind `{kind}`" if kind else "")
    yield ""
    yield " ".join(inspect.cleandoc(section.__doc__ or "").split())
    yield ""
    plain = {
        name: field
        for name, field in section.model_fields.items()
        if name != "kind" and not sections_in(field.annotation)
    }
    if plain:
        yield "| field | type | default | |"
        yield "|---|---|---|---|"
        for name, field in plain.items():
            about = " ".join((field.description or "").split()).replace("|", "\\|")
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {about} |"
        yield ""
    for name, field in section.model_fields.items():
        choices = sections_in(field.annotation)
        inner = f"{path}.{name}" if path else name
        if len(choices) > 1:
            yield f"`{inner}.kind` is one of {', '.join(f'`{tag_of(c)}`' for c in choices)}; " + (
                f"without the block it is `{tag_of(type(field.default))}`."
                if isinstance(field.default, Section)
                else "it must be given."
            )
            yield ""
        elif choices and field.default is None:
            yield f"`{inner}` is left out by default."
            yield ""
        for choice in choices:
            yield from _section(choice, inner)


def _type(field: FieldInfo) -> str:
    return ", ".join([_spelled(field.annotation), *_limits(field)])


def _limits(field: FieldInfo) -> list[str]:
    """The bounds of a number, such as `> 0`."""
    return [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for kind, name, sign in _SIGNS
        if isinstance(limit, kind)
    ]


def _spelled(annotation: Any) -> str:
    """An annotation in the words of a run file."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is Annotated:
        bounds = [
            limit for part in inner[1:] if isinstance(part, FieldInfo) for limit in _limits(part)
        ]
        return " ".join([_spelled(inner[0]), " and ".join(bounds)]).rstrip()
    if origin in (Union, types.UnionType):
        return " or ".join(_spelled(part) for part in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_spelled(inner[0])}"
        return f"[{', '.join(_spelled(part) for part in inner)}]"
    plain = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return "null" if annotation is type(None) else plain[annotation]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower()}`".replace("none", "null")
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
