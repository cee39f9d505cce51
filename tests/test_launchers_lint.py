"""Shell of the launchers and images: shellcheck has nothing to say, and bash can read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
PATTERNS = ("launchers/*.sh", "launchers/*.example", "docker/*.sh")
SCRIPTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))


def test_every_place_has_scripts() -> None:
    assert {path.parent.name for path in SCRIPTS} == {"launchers", "docker"}
    assert any(path.suffix == ".example" for path in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_is_clean(script: Path) -> None:
    check = [str(SHELLCHECK), "-x", "-s", "bash", "-S", "style", "-P", "SCRIPTDIR", str(script)]
    found = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    read = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
