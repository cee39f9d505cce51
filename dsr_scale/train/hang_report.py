"""What a hang looks like from inside one rank: all stacks, and the collectives that did not end.

Read on every rank together it says who waits for whom: the rank whose last collective has the lowest
number is the one the others wait for. Whatever hangs may hold a disk or a lock of Python, so this is
written by a thread that nobody waits for for long.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

MOST_COLLECTIVES = 20
"""Unfinished ones that are listed."""

_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Of torch's flight recorder: for NCCL in builds that have it, and for all others."""


def write_report(path: Path | None, header: str) -> None:
    """Writes `header`, the stacks of all threads and the state of collectives to `path`, or stderr."""
    if path is None:
        _write(sys.stderr, header)
        return
    try:
        with path.open("a") as file:
            _write(file, header)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr, flush=True)
        _write(sys.stderr, header)


def main_frame() -> FrameType | None:
    """Where the main thread is."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def waited_for() -> str:
    """Name of what the main thread is in: a collective if there is one, else the innermost function."""
    names = [
        (frame.f_code.co_name, frame.f_code.co_filename)
        for frame, _ in traceback.walk_stack(main_frame())
    ]
    collectives = [name for name, file in names if file.endswith("distributed_c10d.py")]
    # The outermost: all_reduce, not what it calls.
    return collectives[-1] if collectives else names[0][0] if names else "unknown"


def _write(file: TextIO, header: str) -> None:
    print(header, file=file)
    for thread in threading.enumerate():
        print(f"thread 0x{thread.ident:016x} is {thread.name}", file=file)
    file.flush()
    faulthandler.dump_traceback(file=file, all_threads=True)
    # Last: it asks the device, and may not come back.
    for line in collectives():
        print(line, file=file, flush=True)


def collectives() -> Iterator[str]:
    """Lines about the collectives of this process, by torch's flight recorder."""
    found = False
    for name in _RECORDERS:
        dump = getattr(_distributed_module(), name, None)
        if dump is None:
            continue
        try:
            lines = list(described(json.loads(dump()), time.time_ns()))
        except Exception as error:
            yield f"{name}: {error!r}"
            continue
        found = found or bool(lines)
        yield from lines
    if not found:
        yield (
            f"no collectives on record (TORCH_FR_BUFFER_SIZE = 0, or none yet); the main thread is in "
            f"{waited_for()}"
        )


def _distributed_module() -> Any:
    """torch's, if it was imported: a hang while importing is not to import it again."""
    return sys.modules.get("torch._C._distributed_c10d")


def described(record: dict[str, Any], now_ns: int) -> Iterator[str]:
    """Lines for one record of the flight recorder: each group's counts, then what did not end."""
    entries = record.get("entries", [])
    names = {str(entry["pg_id"]): " ".join(entry["process_group"]) for entry in entries}
    for group, status in sorted(record.get("pg_status", {}).items(), key=lambda item: int(item[0])):
        yield (
            f"group {names.get(group, group)}: last enqueued {status['last_enqueued_collective']}, "
            f"last completed {status['last_completed_collective']}"
        )
    open_entries = [e for e in entries if not e["retired"] and e["state"] != "completed"]
    for entry in open_entries[-MOST_COLLECTIVES:]:
        age_s = (now_ns - entry["time_created_ns"]) / 1e9
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        yield (
            f"not ended: {entry['profiling_name']} number {number} of group "
            f"{' '.join(entry['process_group'])}, {entry['state']}, begun {age_s:.1f} s ago, "
            f"inputs {entry['input_sizes']} {entry['input_dtypes']}, "
            f"thread {entry.get('thread_name', '')}"
        )
