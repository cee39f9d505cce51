"""YAML as people expect it: 1.2 scalars, and a key given twice is an error, not the last one.

PyYAML follows YAML 1.1, where `off` is a boolean, `1e-4` a string and `2026-01-31` a date. Run
files hold `wandb: off` and `learning_rate: 1e-4`, so the scalars of YAML 1.2 are used instead.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from dsr_scale.base.errors import InputError

_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN"),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", re.compile(r"^(?:<<)$"), "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and unique keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise InputError(
                    found=f"the key {key_node.value!r} twice, in lines "
                    f"{seen[key_node.value]} and {line}{_of(key_node.start_mark.name)}",
                    required="each key once in its block",
                    remedy="remove one of the two",
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen[key_node.value] = line
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes strings which only YAML 1.2 would read as numbers."""

    def represent_short_list(self, values: list[Any]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}",
        _pattern,
        [*_first, *([""] if _name == "null" else [])],
    )
_Dumper.add_representer(list, _Dumper.represent_short_list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, source: str) -> Any:
    """The value of one YAML document. Raises InputError for bad syntax or a repeated key."""
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(
            found=f"{getattr(error, 'problem', None) or error}{place}{_of(source)}",
            required="valid YAML",
            remedy="check the indentation, the colons and the quotes there",
        ) from error
    finally:
        loader.dispose()


def to_yaml(value: Any) -> str:
    """`value` as YAML, keys in their order, lists in brackets."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _of(source: str) -> str:
    return f" of {source}" if source else ""
