"""Skips GPU tests where there is no GPU; begins with the groups of tests that take longest."""

from __future__ import annotations

import pytest

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # Each of these groups is one worker's from beginning to end: begun last, others would wait for it.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
