"""Skips GPU tests where there is no GPU; begins with the groups of tests that take longest.

A file's tests stay on one worker, so that what they share is made once.
"""

from __future__ import annotations

import pytest

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()


LONGEST = ("slurm", "ranks")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # Each of these groups is one worker's from beginning to end: begun last, others would wait for it.
    items.sort(key=lambda item: _group(item) not in LONGEST)

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]
