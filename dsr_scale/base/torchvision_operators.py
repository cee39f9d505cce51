"""Lets torchvision from PyPI load beside a CPU build of torch.

PyPI's torchvision is a CUDA build. Beside a CPU torch its import fails with "operator
torchvision::nms does not exist", and mosaicml-streaming and transformers import it whenever it is
installed. Only the declarations are missing: declaring the operators that its metadata module
names lets the import pass. None of those operators is called by this package.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path


@functools.cache
def declare_torchvision_operators() -> None:
    """Call before the first import of torchvision, transformers or streaming. Idempotent."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or spec is None or spec.origin is None:
        return
    registrations = Path(spec.origin).parent / "_meta_registrations.py"
    text = registrations.read_text()
    names = set(re.findall(r'register_fake\("torchvision::(\w+)"\)', text))
    names |= set(re.findall(r'register_meta\("(\w+)"\)', text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)


_LIBRARIES: list[object] = []
"""Declarations live as long as their library object."""
