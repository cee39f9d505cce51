"""The parts of mosaicml-streaming that are used here, without the rest of that package.

`import streaming` also loads its ready-made data sets and with them transformers, scikit-learn and
torchvision: seconds of CPU and a hundred MB in every rank and every data worker (docs/decisions/0012).
Shard formats, hashes and downloaders need none of that, so they are imported below stand-ins for the
two packages above them, whose `__init__` does not run. The stand-ins are gone afterwards: whoever
imports `streaming` later gets all of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from importlib.machinery import PathFinder
from types import ModuleType

_ABOVE = ("streaming", "streaming.base")
_ONE_AT_A_TIME = threading.Lock()
"""A thread must not take away the stand-ins below which another imports."""


@functools.cache
def streaming_part(name: str) -> ModuleType:
    """The module `streaming.base.{name}`. Raises `ModuleNotFoundError` without mosaicml-streaming."""
    with _ONE_AT_A_TIME:
        stand_ins = [package for package in _ABOVE if package not in sys.modules]
        try:
            for package in stand_ins:
                _stand_in(package)
            # Its modules import each other in a circle that opens only from here, as the package does.
            importlib.import_module("streaming.base.format")
            return importlib.import_module(f"streaming.base.{name}")
        finally:
            for package in stand_ins:
                sys.modules.pop(package, None)


def _stand_in(package: str) -> None:
    parent, _, own = package.rpartition(".")
    path = sys.modules[parent].__path__ if parent else None
    spec = PathFinder.find_spec(package, path)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = sys.modules[package] = importlib.util.module_from_spec(spec)
    if parent:
        setattr(sys.modules[parent], own, module)
