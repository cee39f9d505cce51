"""launchers/evaluate.sh starts what its variables ask for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def launch(tmp_path: Path):
    """Runs the launcher with a `dsr-scale` that prints its arguments."""
    command = tmp_path / "dsr-scale"
    command.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    command.chmod(0o755)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1",
            "SLURM_TASKS_PER_NODE": "1",
            "SITE": "/nonexistent",
        }
        return subprocess.run(
            ["bash", str(ROOT / "launchers" / "evaluate.sh")],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_prompts_are_drawn(launch) -> None:
    done = launch(BUNDLE="b", PROMPTS="my prompts.txt", OPTIONS="--steps 2")
    assert done.stdout == (
        "[sample][b][--prompts-file][my prompts.txt][--out][b/samples.png][--steps][2]"
    ), done.stderr


def test_metrics_are_computed(launch) -> None:
    done = launch(BUNDLE="b", METRICS="fid,geneval", OPTIONS="--geneval g.jsonl", OUT="numbers")
    assert done.stdout == (
        "[evaluate][b][--metrics][fid,geneval][--out][numbers][--geneval][g.jsonl]"
    ), done.stderr


@pytest.mark.parametrize("variables", [{}, {"PROMPTS": "p", "METRICS": "fid"}])
def test_neither_or_both_are_refused(launch, variables: dict[str, str]) -> None:
    done = launch(BUNDLE="b", **variables)
    assert done.returncode == 2 and "either PROMPTS" in done.stderr and not done.stdout
