"""The command's frame: version, help without torch, and how input mistakes are shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer.main

import dsr_scale
from dsr_scale.cli import main

ROOT = Path(__file__).parents[1]

START = "import sys; sys.modules['torch'] = None\nfrom dsr_scale.cli.main import run\nrun()"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dsr-scale` with arguments, in a process where importing torch fails."""
    return subprocess.run([sys.executable, "-c", START, *arguments], capture_output=True, text=True)


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"dsr-scale {dsr_scale.__version__}\n")


def test_help_needs_no_torch() -> None:
    done = command("--help")
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout
    assert command("plan", "--help").returncode == 0


def test_one_problem_has_three_parts_and_status_2(tmp_path: Path) -> None:
    done = command("plan", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    starts = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert starts == ["found", "required", "what to do"]
    assert "none.yaml" in done.stderr


def test_many_problems_are_numbered_and_show_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: t\ndirectory: d\nmodel: {width: '[red]64'}\ndata: {shards: s}\n")
    done = command("plan", str(path), "trainig.steps=3")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"2 problems in {path}"
    assert [line[:8] for line in lines[1:]].count("required") == 2
    assert lines[1].startswith("1. found: model.width") and "[red]64" in lines[1]
    assert any(line.startswith("2. found: trainig") for line in lines)
    assert "Traceback" not in done.stderr


def test_checks_run_before_anything_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: t\ndirectory: d\ndata: {shards: s, resolution: 64}\n"
        "encoders: {image: {kind: pixels, patch: 8}}\n"
        "model: {width: 64, depth: 2, heads: 3}\n"
    )
    done = command("plan", str(path), "--devices", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "model.heads = 3" in done.stderr
    assert "data-parallel ranks = 3" in done.stderr


def lines_of_documentation() -> list[list[str]]:
    """The words after each `dsr-scale` in README and docs, continued lines joined."""
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    lines = re.findall(r"\bdsr-scale +(\S.*)$", text.replace("\\\n", " "), re.M)
    return [re.split(r"\s#|[|;)`]|&&", line)[0].split() for line in lines]


def test_documentation_shows_every_command_and_only_options_that_exist() -> None:
    program: Any = typer.main.get_command(main.app)
    shown, unknown = set(), []
    for words in lines_of_documentation():
        command, path = program, []
        while words and words[0] in getattr(command, "commands", {}):
            path.append(words[0])
            command = command.commands[words.pop(0)]
        shown.add(path[0] if path else None)
        options = {option for parameter in command.params for option in parameter.opts}
        unknown += [
            " ".join([*path, word])
            for word in words
            if word.startswith("--") and word.partition("=")[0] not in options | {"--help"}
        ]
    assert set(program.commands) <= shown
    assert not unknown
