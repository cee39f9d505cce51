"""One attempt of a job: a start of the trainers, and the directory where all of it is kept.

    <run>/jobs/<job id>/<attempt>/       attempt counts from 0, over requeues and restarts in place
        job.json                         this file's `Attempt`, written when the attempt begins
        record/                          config.yaml, launcher.sh, git.txt, git.diff, environment.txt, packages.txt
        preflight/                       one file per node
        rank_00003.log                   output of a rank
        rank_00003.failure.json          why it failed, in its own words (`failures.Failure`)
        rank_00003.end                   how its process ended: node and exit status, one line
        rank_00003.stacks                stacks of all threads, after a hang
        outcome.json                     what the attempt came to and what was decided (`policy.Decision`)

The launcher passes the directory in `DSR_JOB`; a run without a launcher has none and loses only these files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsr_scale.base import atomic_files

JOB_VARIABLE = "DSR_JOB"
JOB_FILE = "job.json"


@dataclass(frozen=True)
class Attempt:
    """What is known when an attempt begins."""

    job_id: str
    number: int
    """0 for the first."""
    reason: str
    """Why this attempt follows another, in a few words; empty for the first."""
    failures: int
    """Attempts before it that failed without a new checkpoint since."""
    nodes: tuple[str, ...]
    """Names of the trainers' nodes, in order."""
    grace_s: float | None
    """Seconds between the signal before the time limit and the kill; None when unknown."""
    started: str
    """ISO 8601, UTC."""

    def write(self, directory: Path) -> None:
        """Makes `directory` and keeps this in it."""
        atomic_files.write_json(directory / JOB_FILE, asdict(self))

    @staticmethod
    def read(directory: Path) -> Attempt:
        """What `write` kept."""
        values = json.loads((directory / JOB_FILE).read_bytes())
        return Attempt(**{**values, "nodes": tuple(values["nodes"])})


def jobs_directory(run_directory: Path) -> Path:
    """Where all jobs of a run keep their attempts."""
    return run_directory / "jobs"


def attempt_directory(run_directory: Path, job_id: str, number: int) -> Path:
    """Where one attempt is kept."""
    return jobs_directory(run_directory) / job_id / str(number)


def attempts_of(run_directory: Path, job_id: str) -> list[Path]:
    """Directories of a job's attempts, in order."""
    directories = jobs_directory(run_directory).joinpath(job_id).glob("*/" + JOB_FILE)
    return sorted((path.parent for path in directories), key=lambda path: int(path.name))


def current_attempt(environment: Mapping[str, str] = os.environ) -> tuple[Path, Attempt] | None:
    """The attempt that this process belongs to; None without a launcher."""
    directory = environment.get(JOB_VARIABLE)
    return None if not directory else (Path(directory), Attempt.read(Path(directory)))
