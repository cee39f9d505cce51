"""What an attempt ran with, kept beside its logs: config, launcher, code, environment, packages.

A record explains a run afterwards and must never stop one: a part that cannot be had is replaced by a
line that says why. Values of the environment that look secret are left out by name and by form, which
hides some harmless ones too.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsr_scale.base import atomic_files
from dsr_scale.config.load import dump_run
from dsr_scale.config.run import AnyRun
from dsr_scale.config.yaml_text import parse_yaml

RECORD_DIRECTORY = "record"
CONFIG_FILE = "config.yaml"
GIT_FILE, DIFF_FILE = "git.txt", "git.diff"
ENVIRONMENT_FILE, PACKAGES_FILE = "environment.txt", "packages.txt"

HIDDEN = "(hidden)"
NO_CHECKOUT = "not a git checkout"
MOST_DIFF_BYTES = 10 << 20
_GIT_TIMEOUT_S = 20
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SECRET_URL = re.compile(r"://[^\s/]*@|://[^\s/:]+:\S*@")
_SECRET_LEAST = 8
"""Shorter values of secret variables are words such as `false`, not worth seeking elsewhere."""
_SHOWN_SETTINGS = 6


def write_record(
    attempt: Path,
    run: AnyRun,
    *,
    source: Path,
    environment: Mapping[str, str],
) -> list[str]:
    """Writes the record of the attempt in directory `attempt`; returns what could not be written.

    `source` is a directory of the code, whose git revision is kept. The launcher adds its own script.
    """
    directory, problems = attempt / RECORD_DIRECTORY, []
    parts: dict[str, Callable[[], bytes]] = {
        CONFIG_FILE: lambda: dump_run(run).encode(),
        GIT_FILE: lambda: git_state(source).encode(),
        DIFF_FILE: lambda: git_diff(source),
        ENVIRONMENT_FILE: lambda: environment_text(environment).encode(),
        PACKAGES_FILE: lambda: packages_text().encode(),
    }
    for name, content in parts.items():
        try:
            written = content()
        except Exception as error:
            written = f"not recorded: {error}\n".encode()
            problems.append(f"{name}: {error}")
        try:
            atomic_files.write_bytes(directory / name, written)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return problems


def git_state(source: Path) -> str:
    """Revision, branch and changed files of the checkout that `source` lies in."""
    if not _in_checkout(source):
        return NO_CHECKOUT + "\n"
    branch = _git(source, "branch", "--show-current").decode().strip() or "(none)"
    changed = _git(source, "status", "--porcelain").decode(errors="replace")
    files = "".join(f"  {line}\n" for line in changed.splitlines())
    return (
        f"revision: {_revision(source)}\nbranch: {branch}\n"
        f"changed files: {len(changed.splitlines())}\n{files}"
    )


def git_diff(source: Path, most_bytes: int = MOST_DIFF_BYTES) -> bytes:
    """Changes since the revision, then the names of untracked files; cut after `most_bytes`."""
    if not _in_checkout(source):
        return f"{NO_CHECKOUT}\n".encode()
    against = ["HEAD"] if _revision(source) != "none yet" else ["--cached"]
    diff = _git(source, "diff", "--no-color", "--no-ext-diff", *against, most_bytes=most_bytes + 1)
    if len(diff) > most_bytes:
        diff = diff[:most_bytes] + f"\n# cut: longer than {most_bytes} bytes\n".encode()
    status = _git(source, "status", "--porcelain").decode(errors="replace")
    untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
    names = "".join(f"# untracked: {name}\n" for name in untracked)
    return diff + names.encode()


def environment_text(environment: Mapping[str, str]) -> str:
    """`NAME=value` lines, sorted; secrets hidden by name, by form, and where they stand in others."""
    secrets = {
        value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LEAST
    }

    def shown(name: str, value: str) -> str:
        if _SECRET_NAME.search(name) or _SECRET_URL.search(value):
            return HIDDEN
        if any(secret in value for secret in secrets):
            return HIDDEN
        return value.replace("\n", "\\n")

    return "".join(f"{name}={shown(name, environment[name])}\n" for name in sorted(environment))


def packages_text() -> str:
    """`name==version` of everything that can be imported here, sorted."""
    found = {
        f"{distribution.metadata['Name']}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
    }
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def changes(before: Path, now: Path) -> str:
    """What differs between the records of two attempts, on one line; empty where nothing does.

    Parts that one of them lacks are not compared.
    """
    found = []
    revisions = [_recorded_revision(attempt) for attempt in (before, now)]
    if None not in revisions and revisions[0] != revisions[1]:
        found.append(f"revision {revisions[0]} → {revisions[1]}")
    diffs = [_recorded_diff(attempt) for attempt in (before, now)]
    if None not in diffs and diffs[0] != diffs[1]:
        found.append("uncommitted changes to the code")
    settings = [_settings(attempt) for attempt in (before, now)]
    if settings[0] and settings[1]:
        found += _changed_settings(settings[0], settings[1])
    return ", ".join(found)


def _changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    shown = [f"{name} {before.get(name)} → {now.get(name)}" for name in names[:_SHOWN_SETTINGS]]
    more = len(names) - len(shown)
    return shown + ([f"{more} more settings"] if more else [])


def _settings(attempt: Path) -> dict[str, Any]:
    text = _read(attempt, CONFIG_FILE)
    try:
        return dict(_leaves(parse_yaml((text or b"").decode(), CONFIG_FILE)))
    except ValueError:
        return {}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{path}.{name}" if path else str(name))


def _recorded_revision(attempt: Path) -> str | None:
    text = _read(attempt, GIT_FILE) or b""
    match = re.search(rb"^revision: (\S+)", text)
    return None if match is None else match[1].decode()[:12]


def _recorded_diff(attempt: Path) -> bytes | None:
    """Without untracked files: logs and results of the job itself are among them."""
    diff = _read(attempt, DIFF_FILE)
    return None if diff is None else re.sub(rb"(?m)^# untracked: .*\n", b"", diff)


def _read(attempt: Path, name: str) -> bytes | None:
    try:
        return (attempt / RECORD_DIRECTORY / name).read_bytes()
    except OSError:
        return None


def _in_checkout(source: Path) -> bool:
    try:
        return _git(source, "rev-parse", "--is-inside-work-tree").strip() == b"true"
    except RuntimeError as error:
        # Any other refusal, such as an owner that git does not trust, is worth its words.
        if "not a git repository" in str(error):
            return False
        raise


def _revision(source: Path) -> str:
    try:
        return _git(source, "rev-parse", "--verify", "HEAD").decode().strip()
    except RuntimeError:
        return "none yet"


def _git(source: Path, *arguments: str, most_bytes: int = MOST_DIFF_BYTES) -> bytes:
    """What git prints, up to `most_bytes`. Raises RuntimeError with its words when it fails."""
    # Through a file: a diff of gigabytes must neither fill the memory nor block git's pipe.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(source), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=_GIT_TIMEOUT_S,
            )
        except FileNotFoundError as error:
            raise RuntimeError("no git on this machine") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"git took longer than {_GIT_TIMEOUT_S} s") from error
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(words[0] if words else f"git ended with status {done.returncode}")
        output.seek(0)
        return output.read(most_bytes)
