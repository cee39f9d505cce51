"""The short form of `tools/service_soak.py`: nothing lost, doubled, reordered or changed by kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.service_soak import soak


@pytest.mark.extended
@pytest.mark.xdist_group("ranks")
def test_clients_get_every_batch_once_and_in_order_while_servers_are_killed(tmp_path: Path) -> None:
    report = soak(tmp_path, seconds=8, servers=2, clients=2, kill_every_s=3)
    assert report.kills >= 2
    assert report.microbatches > 100
    assert report.wrong == 0
