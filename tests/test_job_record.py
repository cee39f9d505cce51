"""The record of an attempt, and `dsr-scale job` as launchers call it: stdout for bash, no torch."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsr_scale.checkpoint.directory import RUN_STATE_FILE, step_directory
from dsr_scale.cli.main import app
from dsr_scale.config.load import load_run
from dsr_scale.job import record
from dsr_scale.job.attempt import Attempt
from dsr_scale.job.failures import Failure, write_failure
from dsr_scale.job.policy import Decision

START = "import sys; sys.modules['torch'] = None\nfrom dsr_scale.cli.main import run\nrun()"
BEGIN = ("--job-id", "77", "--nodes", "n0,n1")


def fresh(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """`dsr-scale job` in a process of its own, where importing torch fails."""
    done = subprocess.run(
        [sys.executable, "-c", START, "job", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def command(*arguments: str | Path) -> Result:
    """The same in this process, which is quicker; it must succeed."""
    done = CliRunner().invoke(app, ["job", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run file that writes into `tmp_path`/run."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: t\ndirectory: {tmp_path}/run\ndata: {{shards: s, resolution: 64}}\n"
        "encoders: {image: {kind: pixels, patch: 8}, text: {kind: bytes}}\n"
        "model: {width: 64, depth: 4, heads: 4, conditioning: {kind: cross_attention}}\n"
        "training: {global_batch_images: 16, microbatch_images: 1}\n"
    )
    return path


def git(folder: Path, *arguments: str) -> str:
    """What git prints in `folder`."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one commit of one file, on branch `trunk`."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "--initial-branch=trunk")
    (folder / "a.py").write_text("one = 1\n")
    git(folder, "add", "a.py")
    git(folder, "commit", "-m", "first")
    return folder


def save(run: Path, step: int) -> None:
    """What makes a checkpoint count as complete."""
    directory = step_directory(run, step)
    directory.mkdir(parents=True)
    (directory / RUN_STATE_FILE).write_text("{}")


FAILURE = Failure(1, "n1", "error", "ValueError", "bad 7", 12, "optimizer", 100.0, "Traceback …")


def evaluated(lines: str) -> list[str]:
    """ACTION and REASON as bash has them after evaluating `lines`."""
    script = 'eval "$1"; printf "%s\\n" "$ACTION" "$REASON"'
    done = subprocess.run(
        ["bash", "-uc", script, "bash", lines], check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_begin_records_and_prints_only_the_directory(
    config: Path, checkout: Path, tmp_path: Path
) -> None:
    options = ("--grace-s", "300", "--source", checkout)
    done = fresh("begin", config, "training.steps=7", *BEGIN, *options)
    directory = tmp_path / "run" / "jobs" / "77" / "0"
    assert (done.stdout, done.stderr) == (f"{directory}\n", "")
    attempt = Attempt.read(directory)
    assert attempt == Attempt("77", 0, "", 0, ("n0", "n1"), 300.0, attempt.started)
    kept = directory / "record"
    assert load_run(kept / "config.yaml") == load_run(config, ["training.steps=7"])
    assert git(checkout, "rev-parse", "HEAD") in (kept / "git.txt").read_text()
    assert (kept / "git.diff").read_text() == ""
    environment = (kept / "environment.txt").read_text().splitlines()
    assert environment == sorted(environment, key=lambda line: line.partition("=")[0])
    assert f"PATH={os.environ['PATH']}" in environment
    pydantic = f"pydantic=={importlib.metadata.version('pydantic')}"
    assert pydantic in (kept / "packages.txt").read_text().splitlines()


def test_a_bad_config_leaves_nothing_behind(config: Path, tmp_path: Path) -> None:
    done = fresh("begin", config, "training.stepps=7", *BEGIN, expect=2)
    assert done.stdout == "" and "training.steps" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_record_that_cannot_be_had_stops_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "jobs" / "77" / "0" / "record" / "git.diff").mkdir(parents=True)
    done = command("begin", config, *BEGIN, "--source", tmp_path)
    kept = tmp_path / "run" / "jobs" / "77" / "0" / "record"
    assert (kept / "git.txt").read_text() == "not a git checkout\n"
    assert done.stderr.startswith("not recorded: git.diff: ")


def test_without_git_the_record_says_so(
    checkout: Path, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = record.write_record(tmp_path, load_run(config), source=checkout, environment={})
    assert problems == [f"{name}: no git on this machine" for name in ("git.txt", "git.diff")]
    assert (tmp_path / "record" / "git.txt").read_text() == "not recorded: no git on this machine\n"


def test_git_state_and_diff_show_what_is_not_committed(checkout: Path) -> None:
    (checkout / "a.py").write_text("one = 2\n")
    (checkout / "new.py").write_text("secret\n")
    state = record.git_state(checkout).splitlines()
    assert state == [
        f"revision: {git(checkout, 'rev-parse', 'HEAD')}",
        "branch: trunk",
        "changed files: 2",
        "   M a.py",
        "  ?? new.py",
    ]
    diff = record.git_diff(checkout).decode()
    assert "-one = 1\n+one = 2\n" in diff and diff.endswith("# untracked: new.py\n")
    assert "secret" not in diff
    git(checkout, "checkout", "--detach")
    assert "branch: (none)" in record.git_state(checkout)


def test_a_diff_is_cut_with_a_note(checkout: Path) -> None:
    (checkout / "a.py").write_text("x = 3\n" * 1000)
    whole = record.git_diff(checkout, most_bytes=100_000)
    assert b"# cut" not in whole
    cut = record.git_diff(checkout, most_bytes=500)
    assert cut == whole[:500] + b"\n# cut: longer than 500 bytes\n"


def test_a_checkout_without_a_commit_is_recorded(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("one = 1\n")
    git(tmp_path, "add", "a.py")
    assert record.git_state(tmp_path).startswith("revision: none yet\n")
    assert b"+one = 1\n" in record.git_diff(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("WANDB_API_KEY", "abc", True),
        ("HF_TOKEN", "abc", True),
        ("aws_secret_access", "abc", True),
        ("PGPASSWORD", "abc", True),
        ("MY_CREDENTIALS", "abc", True),
        ("PROXY", "http://user:pass@proxy:80/", True),
        ("PROXY", "http://user:pa/ss@proxy:80/", True),
        ("INDEX", "https://ghp_x@pypi.example.org/simple", True),
        ("SBATCH_EXPORT", "ALL,WANDB=hush-hush-hush", True),
        ("PROXY", "http://proxy:80/", False),
        ("MAIL", "someone@example.org", False),
        ("SLURM_JOB_ID", "77", False),
    ],
)
def test_secrets_are_hidden(name: str, value: str, hidden: bool) -> None:
    text = record.environment_text({"A_TOKEN": "hush-hush-hush", name: value})
    assert (f"{name}=(hidden)\n" in text) == hidden
    assert (f"{name}={value}\n" in text) != hidden
    assert "hush" not in text


def test_values_of_several_lines_stay_on_one() -> None:
    assert record.environment_text({"F": "() {\n a\n}", "B": "1"}) == "B=1\nF=() {\\n a\\n}\n"


def test_what_changed_since_the_last_attempt_is_said(
    config: Path, checkout: Path, tmp_path: Path
) -> None:
    def begin(*overrides: str) -> str:
        return command("begin", config, *overrides, *BEGIN, "--source", checkout).stderr

    assert begin() == ""
    (checkout / "slurm-77.out").write_text("a log is no change of the code\n")
    assert begin() == ""
    said = begin("training.steps=9", "seed=3")
    assert said == "changed since attempt 1: seed 0 → 3, training.steps 100000 → 9\n"
    (checkout / "a.py").write_text("one = 2\n")
    assert begin("training.steps=9", "seed=3") == (
        "changed since attempt 2: uncommitted changes to the code\n"
    )
    before = git(checkout, "rev-parse", "HEAD")
    git(checkout, "commit", "--all", "-m", "second")
    now = git(checkout, "rev-parse", "HEAD")
    assert f"revision {before[:12]} → {now[:12]}" in begin("training.steps=9", "seed=3")
    torn = tmp_path / "run" / "jobs" / "77" / "4" / "record" / "config.yaml"
    torn.write_text("name: [")
    assert begin("training.steps=10", "seed=3") == ""


def test_a_job_through_failure_repeat_and_stop(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin = ("begin", config, *BEGIN)
    first = Path(command(*begin).stdout.strip())
    write_failure(first / "rank_00001.failure.json", FAILURE)
    (first / "rank_00000.log").write_text("rank 0 speaks\n")
    save(run, 10)
    end = fresh("end", config, "--attempt", first, "--status", "1")
    assert end.stdout == "ACTION=requeue\nREASON='rank 1 on n1: ValueError: bad 7'\n"
    assert evaluated(end.stdout) == ["requeue", "rank 1 on n1: ValueError: bad 7"]
    assert end.stderr == (
        "==== why job 77 attempt 0 ended ====\n"
        "cause:  rank 1 on n1: ValueError: bad 7\n"
        "at:     step 12, optimizer; newest checkpoint of step 10\n"
        "others: 1 rank ended because of it\n"
        f"log:    {first}/rank_00001.log\n"
        "next:   requeued, nothing excluded (failure 1 of at most 10 without a new checkpoint)\n"
    )
    assert (first / "summary.txt").read_text().startswith(end.stderr)

    second = Path(command(*begin).stdout.strip())
    begun = Attempt.read(second)
    assert (begun.number, begun.failures) == (1, 1)
    assert begun.reason == "rank 1 on n1: ValueError: bad 7"
    # The batch script's node died: no outcome. Then the same failure, with another number in it.
    third = Path(command(*begin).stdout.strip())
    assert Attempt.read(third).reason == "node of the batch script lost, or preempted"
    assert Attempt.read(third).failures == 1
    write_failure(third / "rank_00001.failure.json", replace(FAILURE, message="bad 8"))
    end = command("end", config, "--attempt", third, "--status", "1")
    assert evaluated(end.stdout)[0] == "stop"
    assert "the same failure twice at step 12" in end.stderr

    # Another job of the run knows nothing of this one.
    other = Path(command("begin", config, "--job-id", "78", "--nodes", "n0").stdout.strip())
    assert other == run / "jobs" / "78" / "0"
    assert (Attempt.read(other).failures, Attempt.read(other).reason) == (0, "")
    write_failure(other / "rank_00001.failure.json", FAILURE)
    end = command("end", config, "--attempt", other, "--status", "1")
    assert evaluated(end.stdout)[0] == "requeue"
    # With a checkpoint since, earlier failures no longer count.
    save(run, 20)
    assert Attempt.read(Path(command(*begin).stdout.strip())).failures == 0


def test_a_checkpoint_that_is_gone_ends_the_job_instead_of_beginning_anew(
    config: Path, tmp_path: Path
) -> None:
    command("begin", config, *BEGIN)
    attempt = tmp_path / "run" / "jobs" / "77" / "0"
    saved = tmp_path / "run" / "checkpoints" / "step_00000040"
    saved.mkdir(parents=True)
    (saved / "run_state.json").write_text("{}")
    command("end", config, "--attempt", attempt, "--status", "138", "--stopped", "time_limit")
    command("begin", config, *BEGIN)
    (saved / "run_state.json").unlink()
    refused = fresh("begin", config, *BEGIN, expect=2)
    assert "no checkpoint of step 40" in refused.stderr and "none at all" in refused.stderr
    assert not attempt.with_name("2").exists()
    command("begin", config, "--job-id", "78", "--nodes", "n0")


def test_a_reason_given_by_the_launcher_is_kept(config: Path) -> None:
    directory = command("begin", config, *BEGIN, "--reason", "a restart in place").stdout.strip()
    assert Attempt.read(Path(directory)).reason == "a restart in place"


@pytest.mark.parametrize("encoders", ["hetjob", "colocated"])
def test_servers_that_nobody_would_ask_are_refused(config: Path, encoders: str) -> None:
    nodes = ("nodes", config, "--available", "1", "--gpus-per-node", "1", "--encoders")
    done = fresh(*nodes, encoders, "encoder.mode=inline", expect=2)
    assert f"ENCODERS={encoders}, and encoder.mode is inline" in done.stderr
    assert fresh(*nodes, encoders, "encoder.mode=service").stdout == "1\n"
    assert fresh(*nodes, "external", "encoder.mode=inline").stdout == "1\n"


def test_lost_nodes_are_excluded_or_done_without(config: Path, tmp_path: Path) -> None:
    def excluded() -> str:
        return command("excluded", config, "--job-id", "77").stdout.strip()

    directory = command("begin", config, *BEGIN).stdout.strip()
    assert excluded() == ""
    lost = ("--attempt", directory, "--status", "137", "--lost-nodes", "n1", "--gpus-per-node", "8")
    end = command("end", config, *lost, "--remaining", "1")
    assert evaluated(end.stdout)[0] == "requeue" and excluded() == "n1"
    end = command("end", config, "recovery.shrink=true", *lost, "--remaining", "1")
    assert evaluated(end.stdout)[0] == "restart" and excluded() == "n1"
    assert "with 1 of the nodes that are left" in end.stdout
    # No node is left on which 16 images divide.
    end = command("end", config, "recovery.shrink=true", *lost, "--remaining", "0")
    assert evaluated(end.stdout)[0] == "requeue" and excluded() == "n1"


def test_a_stop_that_was_asked_for_is_no_failure(config: Path) -> None:
    directory = command("begin", config, *BEGIN).stdout.strip()
    end = ("end", config, "--attempt", directory, "--status")
    stopped = command(*end, "138", "--stopped", "time_limit")
    assert evaluated(stopped.stdout) == ["requeue", "the time limit came near"]
    assert "failure" not in stopped.stderr
    assert evaluated(command(*end, "143", "--stopped", "cancelled").stdout)[0] == "stop"
    assert evaluated(command(*end, "0", "--stopped", "none").stdout)[0] == "finished"


def test_words_from_ranks_are_harmless_to_bash(config: Path, tmp_path: Path) -> None:
    directory = Path(command("begin", config, *BEGIN).stdout.strip())
    message = f'it\'s "$(touch {tmp_path}/pwned)" `touch {tmp_path}/pwned`; #'
    write_failure(directory / "rank_00001.failure.json", replace(FAILURE, message=message))
    end = command("end", config, "--attempt", directory, "--status", "1")
    assert evaluated(end.stdout)[1] == f"rank 1 on n1: ValueError: {message}"
    assert not (tmp_path / "pwned").exists()


def test_an_attempt_is_judged_though_its_files_or_the_config_are_broken(
    config: Path, tmp_path: Path
) -> None:
    directory = Path(command("begin", config, "recovery.most_failures=1", *BEGIN).stdout.strip())
    (directory / "job.json").write_text('{"job_id"')
    (directory / "rank_00001.failure.json").write_text("{")
    config.write_text("name: [")
    end = command("end", config, "--attempt", directory, "--status", "9")
    assert evaluated(end.stdout)[0] == "stop"
    assert "judging by" in end.stderr and "why job 77 attempt 0 ended" in end.stderr
    decision = Decision.read(directory)
    assert decision is not None and (decision.kind, decision.status) == ("unknown", 9)


def test_end_asks_for_the_directory_of_an_attempt(config: Path, tmp_path: Path) -> None:
    done = fresh("end", config, "--attempt", tmp_path, "--status", "1", expect=2)
    assert "dsr-scale job begin" in done.stderr and done.stdout == ""


def test_a_decision_is_printed_though_it_cannot_be_kept(config: Path) -> None:
    directory = Path(command("begin", config, *BEGIN).stdout.strip())
    (directory / "outcome.json").mkdir()
    end = command("end", config, "--attempt", directory, "--status", "0")
    assert evaluated(end.stdout)[0] == "finished"
    assert "not kept" in end.stderr


def test_nodes_prints_one_number(config: Path) -> None:
    assert command("nodes", config, "--available", "2", "--gpus-per-node", "8").stdout == "2\n"
    refused = fresh("nodes", config, "--available", "3", "--gpus-per-node", "4", expect=2)
    assert "1, 2, 4" in refused.stderr and refused.stdout == ""
    shrunk = command(
        "nodes", config, "recovery.shrink=true", "--available", "3", "--gpus-per-node", "4"
    )
    assert shrunk.stdout == "2\n"
