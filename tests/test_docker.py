"""Images without an engine: linted, their context whole, their scripts run here.

`docker/install.sh` is run against an image that is none: a folder of packages with a torch as NVIDIA
builds it, a pre-release with a local version, and an index that holds a newer one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))
IMAGE_TORCH = "2.12.0a0+5aff3928d8.nv26.05"
INSTALL = ROOT / "docker" / "install.sh"


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def copied(dockerfile: Path) -> list[str]:
    """Sources of all COPY lines."""
    lines = [line.split() for line in dockerfile.read_text().splitlines() if line[:5] == "COPY "]
    words = [[word for word in line[1:] if not word.startswith("--")] for line in lines]
    return [source for line in words for source in line[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps this file of the context out: a pattern fits it or a parent."""
    parts = path.split("/")
    tops = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        assert not pattern.startswith("!"), "this matcher knows no exceptions"
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, top) for top in tops):
            return True
    return False


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    assert len(DOCKERFILES) == 3
    found = run(Path(sys.executable).with_name("hadolint"), dockerfile)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_copied_source_is_in_the_context(dockerfile: Path) -> None:
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert source == "." or not ignored(source), source


def test_context_leaves_out_results_and_secrets_and_nothing_of_the_project() -> None:
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/quickstart/registers/config.yaml",
        "dsr_scale/cli/__pycache__/runs.pyc",
        "wandb/offline/run.wandb",
        "launchers/site.env",
        "docker/.env",
        "dsr_scale.egg-info/PKG-INFO",
    ):
        assert ignored(path), path
    listed = run("git", "-C", ROOT, "ls-files", "-z")
    tracked = listed.stdout.split("\0")[:-1] if listed.returncode == 0 else ["pyproject.toml"]
    assert [path for path in tracked if ignored(path)] == []


def test_base_images_are_pinned_and_shared() -> None:
    bases = {
        path.stem: re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)
        for path in DOCKERFILES
    }
    assert bases["train"] == bases["encoder"]
    for [base] in bases.values():
        assert re.search(r":\d+\.\d+(\.\d+)?-", base), base


def test_installed_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dockerfile in DOCKERFILES:
        for names in re.findall(r"'\.\[(.+?)\]'", dockerfile.read_text()):
            assert set(names.split(",")) <= set(extras["optional-dependencies"]), names


def wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    """A wheel with one module that knows its version."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """Environment of a build in NVIDIA's image: its packages, an index with a newer torch."""
    packages = tmp_path / "image"
    for name, version in (("torch", IMAGE_TORCH), ("torchvision", "0.27.0a0"), ("numpy", "2.0.0")):
        zipfile.ZipFile(wheel(tmp_path / "made", name, version)).extractall(packages)
    for part in Path(sysconfig.get_paths()["purelib"]).glob("pip*"):
        (packages / part.name).symlink_to(part)
    index = tmp_path / "index"
    wheel(index, "torch", "2.13.0")
    wheel(index, "torchvision", "0.28.0")
    wheel(index, "numpy", "2.1.3")
    wheel(index, "numpy", "2.9.0")
    # What the image constrains must not bind this install.
    (tmp_path / "constraint.txt").write_text("numpy==2.0.0\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.1.3\n")
    return {
        "PYTHONPATH": str(packages),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONSTRAINT": str(tmp_path / "constraint.txt"),
    }


def test_constraints_name_the_images_torch(image: dict[str, str]) -> None:
    done = run(INSTALL, "torch-constraints", **image)
    assert done.returncode == 0, done.stderr
    pinned = dict(line.split("==") for line in done.stdout.splitlines())
    # pip writes nv26.05 as nv26.5, which is the same version.
    assert {name: Version(text) for name, text in pinned.items()} == {
        "torch": Version(IMAGE_TORCH),
        "torchvision": Version("0.27.0a0"),
    }


def test_packages_are_pinned_and_leave_torch_alone(tmp_path: Path, image: dict[str, str]) -> None:
    project = wheel(
        tmp_path / "made", "project", "1.0", "torch>=2.11,<2.14", "torchvision", "numpy>=2.1"
    )
    venv = tmp_path / "venv"
    done = run(INSTALL, "packages", venv, tmp_path / "constraints.txt", project, **image)
    assert done.returncode == 0, done.stdout + done.stderr
    program = "import torch, torchvision, project; print(torch.__version__, torchvision.__file__)"
    seen = run(venv / "bin" / "python", "-c", program, **image)
    assert seen.stdout.split()[0] == IMAGE_TORCH
    assert str(tmp_path / "image") in seen.stdout
    inside = {path.name for path in (venv / "lib").glob("python*/site-packages/*.dist-info")}
    assert inside == {"project-1.0.dist-info", "numpy-2.1.3.dist-info"}


def test_a_torch_that_does_not_fit_ends_the_build(tmp_path: Path, image: dict[str, str]) -> None:
    project = wheel(tmp_path / "made", "project", "1.0", "torch>=2.13")
    done = run(
        INSTALL, "packages", tmp_path / "venv", tmp_path / "constraints.txt", project, **image
    )
    assert done.returncode != 0
    assert "conflict" in done.stdout and "torch>=2.13" in done.stdout
    assert not list(tmp_path.glob("venv/lib/python*/site-packages/*"))
    shutil.rmtree(tmp_path / "image" / f"torch-{IMAGE_TORCH}.dist-info")
    assert "no torch in this image" in run(INSTALL, "torch-constraints", **image).stderr


def test_flash_attn_of_the_image_is_taken(tmp_path: Path, image: dict[str, str]) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    built = tmp_path / "image" / "flash_attn.py"
    built.touch()
    taken = run(INSTALL, "flash-attn", tmp_path / "venv", ROOT / "pyproject.toml", **image)
    assert (taken.returncode, taken.stdout) == (0, "flash-attn: the image's\n")
    built.unlink()
    # Without it pip is asked for what pyproject.toml names; here no index has it.
    missing = run(INSTALL, "flash-attn", tmp_path / "venv", ROOT / "pyproject.toml", **image)
    assert missing.returncode != 0
    assert "flash-attn<3,>=2.7" in missing.stderr


def smoke(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "DSR_CONFIGS": str(ROOT / "configs"), "OMP_NUM_THREADS": "1"}
    return run("bash", ROOT / "docker" / script, **{**settings, **environment})


@pytest.mark.slow
def test_smoke_of_train_and_cpu() -> None:
    done = smoke("smoke_train.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("1 of 1 checkpoints intact\nsmoke test passed\n")


def test_smoke_of_encoder_needs_only_its_extra(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # Distributions of the train extra that the serve extra lacks, by the names they are imported by.
    only_training = {
        "deepspeed": "deepspeed",
        "megatron-core": "megatron",
        "mosaicml-streaming": "streaming",
        "webdataset": "webdataset",
        "wandb": "wandb",
        "pyarrow": "pyarrow",
        "matplotlib": "matplotlib",
        "flufl.lock": "flufl",
        "plotext": "plotext",
        "psutil": "psutil",
        "grpcio": "grpc",
        "grpcio-health-checking": "grpc_health",
        "prometheus-client": "prometheus_client",
        "cryptography": "cryptography",
        "xxhash": "xxhash",
        "diskcache": "diskcache",
    }
    served = " ".join(project["optional-dependencies"]["serve"])
    away = {module for name, module in only_training.items() if f"{name}>" not in served}
    assert "deepspeed" in away and "grpc" not in away
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Away:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {away!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is not in the image', name=name)\n"
        "sys.meta_path.insert(0, Away())\n"
    )
    done = smoke("smoke_encoder.sh", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "serving 127.0.0.1:" in done.stdout
    assert done.stdout.endswith("smoke test passed\n")
    broken = smoke("smoke_encoder.sh", DSR_CONFIGS=str(tmp_path))
    assert broken.returncode != 0 and "passed" not in broken.stdout
