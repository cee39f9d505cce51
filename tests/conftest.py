"""Skips GPU tests where there is no GPU."""

from __future__ import annotations

import pytest

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
