"""Running servers find their way into the registry, and dead ones out of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from fake_encoders import tiny_run

from dsr_scale.base.errors import InputError
from dsr_scale.encode_service import registry
from dsr_scale.encode_service.addresses import (
    is_loopback,
    join_address,
    reachable_host,
    split_address,
)


def write_entry(directory: Path, name: str, **changes) -> Path:
    entry = {
        "address": "127.0.0.1:1",
        "metrics": "127.0.0.1:2",
        "machine": socket.gethostname(),
        "process": os.getpid(),
        "started": "not this process",
    }
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({**entry, **changes}))
    return path


def test_a_server_stands_in_the_registry_while_it_runs(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    directory = registry.registry_directory(run)
    assert directory == tmp_path / "run" / "encoder_servers"
    assert registry.servers_in(directory) == []
    with (
        registry.announced(directory, "node-1:70", "node-1:71"),
        registry.announced(directory, "[::1]:70", "[::1]:71"),
    ):
        assert registry.servers_in(directory) == ["[::1]:70", "node-1:70"]
        machine = socket.gethostname()
        assert {path.name for path in directory.iterdir()} == {
            f"{machine}-__1-70.json",
            f"{machine}-node-1-70.json",
        }
    assert list(directory.iterdir()) == []
    elsewhere = tiny_run(tmp_path, f"encoder.registry={tmp_path / 'shared'}")
    assert registry.registry_directory(elsewhere) == tmp_path / "shared"


def test_other_files_and_halves_of_entries_are_passed_over(tmp_path: Path) -> None:
    write_entry(tmp_path, "good", address="node:5")
    write_entry(tmp_path, "no-address", address="node")
    write_entry(tmp_path, "a-number", address=5)
    whole = (tmp_path / "good.json").read_text()
    for size in range(0, len(whole), 7):
        (tmp_path / f"half-{size}.json").write_text(whole[:size])
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "text.txt").write_text(whole)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    assert registry.servers_in(tmp_path) == ["node:5"]


def test_entries_of_dead_processes_of_this_machine_are_swept_up(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = registry._start_time(os.getpid())
    assert living
    gone = [
        write_entry(tmp_path, "dead", process=dead.pid),
        write_entry(tmp_path, "number-given-anew", process=os.getpid()),
    ]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        kept = [
            write_entry(tmp_path, "living", started=living),
            write_entry(tmp_path, "elsewhere", machine="another", process=dead.pid),
            write_entry(tmp_path, "in-a-container", address=f"127.0.0.1:{port}"),
        ]
        with registry.announced(tmp_path, "127.0.0.1:3", "127.0.0.1:4"):
            assert not any(path.exists() for path in gone)
            assert all(path.exists() for path in kept)


def test_loopback_servers_of_machines_that_share_a_disk_stay_apart(tmp_path: Path) -> None:
    with registry.announced(tmp_path, "127.0.0.1:5", "127.0.0.1:6") as ours:
        with (
            mock.patch.object(socket, "gethostname", return_value="another"),
            registry.announced(tmp_path, "127.0.0.1:5", "127.0.0.1:6"),
        ):
            assert len(list(tmp_path.iterdir())) == 2
            write_entry(tmp_path, "theirs", machine="another", address="127.0.0.1:7")
            write_entry(tmp_path, "open", machine="another", address="node:8")
            assert registry.servers_in(tmp_path) == ["127.0.0.1:5", "127.0.0.1:7", "node:8"]
        assert registry.servers_in(tmp_path) == ["127.0.0.1:5", "node:8"]
        assert ours.exists()


def test_a_successor_on_the_same_port_keeps_its_entry(tmp_path: Path) -> None:
    with registry.announced(tmp_path, "node:5", "node:6") as path:
        write_entry(tmp_path, path.stem, address="node:5", process=1)
    assert registry.servers_in(tmp_path) == ["node:5"]


def test_a_registry_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="a path whose parents are directories"),
        registry.announced(tmp_path / "file" / "servers", "node:5", "node:6"),
    ):
        pass


@pytest.mark.parametrize("text", ["node", ":5", "node:", "node:x", "node:70000", "::1:5", ""])
def test_what_is_no_address_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="host:port"):
        split_address(text)


def test_addresses_are_read_as_they_are_written() -> None:
    for host, port in (("node-1.cluster", 5), ("10.0.0.3", 0), ("::1", 65_535)):
        assert split_address(join_address(host, port)) == (host, port)
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "10.0.0.3", "::", "node", "localhost.example.org", "127.0.0.1.evil"):
        assert not is_loopback(host)
    assert reachable_host("127.0.0.1", None) == "127.0.0.1"
    assert reachable_host("0.0.0.0", None) == reachable_host("::", None) == socket.gethostname()
    assert reachable_host("0.0.0.0", "node-ib0") == "node-ib0"
