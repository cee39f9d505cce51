"""What a worker killed while it hands a tensor over leaves in shared memory is removed later."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsr_scale.data import shared_memory
from dsr_scale.data.loader import BatchStream
from dsr_scale.data.shared_memory import remove_abandoned


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_only_old_files_of_dead_processes_of_this_user_go(tmp_path: Path) -> None:
    dead = dead_pid()
    kept = [f"torch_{os.getpid()}_1_0", f"torch_{dead}_2_0", f"sem.mp-{dead}", f"torch_{dead}x_1"]
    gone = [f"torch_{dead}_1_0", f"torch_{dead}_884_17"]
    for name in kept + gone:
        (tmp_path / name).write_bytes(b"x")
    long_ago = time.time() - 120
    for name in [*gone, kept[0], kept[2], kept[3]]:
        os.utime(tmp_path / name, (long_ago, long_ago))
    assert sorted(path.name for path in remove_abandoned(tmp_path)) == sorted(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert remove_abandoned(tmp_path / "nowhere") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_names_its_files_by_their_process() -> None:
    """The naming that the clean-up relies on; the file is unlinked already, its mapping tells."""
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    tensor = torch.ones(1000).share_memory_()
    mapped = re.findall(r"/dev/shm/(\S+) \(deleted\)", Path("/proc/self/maps").read_text())
    ours = [name for name in mapped if shared_memory.NAME.fullmatch(name)]
    assert any(name.split("_")[1] == str(os.getpid()) for name in ours)
    assert tensor.is_shared()


def test_a_stream_cleans_up_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsr_scale.config.data import DataConfig
    from dsr_scale.data import loader

    called = []
    monkeypatch.setattr(loader, "remove_abandoned", lambda: called.append(True))
    config = DataConfig(shards="package:emoji", resolution=32, workers=1)
    BatchStream(
        loader.open_samples(config),
        config,
        seed=0,
        global_batch_images=2,
        microbatch_images=2,
        rank=0,
        world_size=1,
    )
    assert called
