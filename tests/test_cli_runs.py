"""`dsr-scale runs` on run directories made by hand: what it lists, draws, and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsr_scale.cli import runs
from dsr_scale.job.attempt import Attempt, attempt_directory
from dsr_scale.telemetry import terminal_curves
from dsr_scale.telemetry.run_table import RunRow, age, newest_record, number, short_count

COMMAND = Path(sys.executable).with_name("dsr-scale")
NODES = ("node1", "node2")


def command(*arguments: object, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb"}
    words = [str(COMMAND), "runs", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)


def record(step: int, **values: object) -> dict[str, object]:
    return {
        "step": step,
        "loss": 100 / step,
        "gradient_norm": 0.5,
        "images_per_s": 250.0 + step % 7,
        "samples_seen": 8 * step,
        "skipped_steps": 3,
        "corrupt_seen": 1,
        **values,
    }


def make_run(path: Path, *, steps: int, logged: int, saved: tuple[int, ...] = ()) -> Path:
    """A run with a record every ten steps and complete checkpoints."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"name: n\ntraining: {{steps: {steps}}}\n")
    lines = [json.dumps(record(step)) for step in range(10, logged + 1, 10)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for step in saved:
        checkpoint = path / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run_state.json").write_text("{}")
    return path


def add_attempt(run: Path, job: str, number: int, started: str, reason: str = "") -> Path:
    place = attempt_directory(run, job, number)
    Attempt(job, number, reason, 0, NODES, None, started).write(place)
    return place


def end_attempt(place: Path, **content: object) -> None:
    (place / "outcome.json").write_text(json.dumps(content))


def touch(path: Path, time_s: float) -> None:
    os.utime(path, (time_s, time_s))


def hold_lock(run: Path, seconds: float) -> None:
    (run / "run.lock").touch()
    touch(run / "run.lock", time.time() + seconds)


def row_of(run: Path) -> RunRow:
    return runs.read_run(run, name="x", now_s=time.time())


def test_states_follow_lock_and_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=100, logged=100, saved=(50, 90))
    assert row_of(run).status == "stopped"  # all steps logged, the last not saved
    make_run(tmp_path / "b", steps=100, logged=100, saved=(100,))
    assert row_of(tmp_path / "b").status == "finished"
    hold_lock(run, 60)
    assert row_of(run).status == "running"
    hold_lock(run, -60)
    assert row_of(run).status == "stopped"


def test_row_takes_the_newest_of_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=1000, logged=200, saved=(50, 150))
    (run / "checkpoints" / "step_00000200.partial").mkdir()
    touch(run / "checkpoints" / "step_00000150", time.time() - 90)
    with (run / "metrics.jsonl").open("a") as file:
        # The attempt after a crash goes back; skipped steps and torn lines are no intervals.
        file.write(json.dumps(record(160, loss=0.25)) + "\n")
        file.write(json.dumps({"step": 161, "loss": 9.0, "skipped": True}) + "\n")
        file.write('{"step": 170, "lo')
    row = row_of(run)
    assert (row.step, row.steps, row.loss) == (160, 1000, 0.25)
    assert row.checkpoint_step == 150
    assert row.checkpoint_age_s == pytest.approx(90, abs=5)
    assert row.restarts is None and row.cause is None


def test_newest_record_is_found_before_any_tail_of_skips(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=1000, logged=20)
    skip = json.dumps({"step": 21, "loss": 1.0, "skipped": True, "skipped_samples": ["s" * 500]})
    with (run / "metrics.jsonl").open("a") as file:
        file.write((skip + "\n") * 500)
    assert newest_record(run)["step"] == 20
    (run / "metrics.jsonl").write_text((skip + "\n") * 500)
    assert newest_record(run) == {}


def test_restarts_and_outcome_over_several_jobs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=1000, logged=200)
    # Job 9 came first although 10 sorts before it.
    first = add_attempt(run, "9", 0, "2026-01-01T08:00:00+00:00")
    second = add_attempt(run, "9", 1, "2026-01-01T09:00:00+00:00", "time limit")
    last = add_attempt(run, "10", 0, "2026-01-02T08:00:00+00:00")
    end_attempt(first, action="requeue", reason="time limit", cause=None)
    end_attempt(second, action="stop", reason="too often", cause="an old cause")
    assert (row_of(run).restarts, row_of(run).cause) == (2, None)
    end_attempt(last, action="requeue", reason="may pass", cause="rank 3 on node2: KilledError")
    row = row_of(run)
    assert (row.action, row.reason, row.cause) == (
        "requeue",
        "may pass",
        "rank 3 on node2: KilledError",
    )
    (last / "job.json").write_text('{"job_id": "1')
    (second / "outcome.json").write_text("{")
    assert (row_of(run).restarts, row_of(run).cause) == (1, None)


def test_table_lists_newest_first_with_a_line_per_cause(tmp_path: Path) -> None:
    old = make_run(tmp_path / "sets" / "old", steps=500, logged=500, saved=(500,))
    for name in ("metrics.jsonl", "config.yaml", "checkpoints", "checkpoints/step_00000500"):
        touch(old / name, 1e9)
    # That a run ended because it was done needs no line.
    end_attempt(
        add_attempt(old, "6", 0, "2026-01-01T08:00:00+00:00"),
        action="finished",
        reason="all steps done",
        cause="done",
    )
    new = make_run(tmp_path / "new", steps=100_000, logged=120)
    # What wandb keeps inside a run looks like a run's files, and is none.
    make_run(new / "wandb" / "files", steps=1, logged=10)
    end_attempt(
        add_attempt(new, "7", 0, "2026-01-01T08:00:00+00:00"),
        action="stop",
        reason="same step twice",
        cause="rank 1 on node1: ValueError: bad\nsecond line",
    )
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "new", "sets/old"]
    assert lines[1].split() == ["new", "stopped", "120/100k", "0.8333", "251", "none", "0"]
    assert lines[2].split()[1:3] == ["finished", "500/500"]
    assert lines[3] == ""
    assert lines[4:] == ["new: rank 1 on node1: ValueError: bad → stop: same step twice"]
    assert max(map(len, lines[:3])) <= 80
    listed = json.loads(command("--json", tmp_path).stdout)
    assert [(row["name"], row["status"], row["step"]) for row in listed] == [
        ("new", "stopped", 120),
        ("sets/old", "finished", 500),
    ]
    assert listed[0]["cause"].startswith("rank 1 on node1")
    assert command("ls", tmp_path).stdout == done.stdout
    assert json.loads(command(old, "--json").stdout)[0]["name"] == "old"


def test_show_draws_plain_text_of_the_terminals_width(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=5000, logged=2000, saved=(1500,))
    place = add_attempt(run, "7", 0, "2026-01-01T08:00:00+00:00")
    end_attempt(place, action="requeue", reason="may pass", cause="rank 1 on node1: OSError")
    add_attempt(run, "7", 1, "2026-01-01T09:00:00+00:00", "a crash")
    with (run / "metrics.jsonl").open("a") as file:
        # Comes after the line of its step.
        slow = {"step": 1990, "slowest_node": "node2", "slowest_over_median": 1.314}
        file.write(json.dumps(slow) + "\n")
    for columns in (80, 120):
        done = command("show", run, columns=columns)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        curves, _, summary = done.stdout.partition("\n\n")
        widths = [len(line) for line in curves.splitlines()]
        assert columns - 2 <= max(widths) <= columns
        for metric in terminal_curves.DEFAULT_METRICS:
            assert f"{metric}  now" in curves
        assert "now 0.05, least 0.05, most 10" in curves
        facts = {line[:15].strip(): line[15:] for line in summary.splitlines()}
        assert facts["steps"] == "2000/5k"
        assert facts["samples seen"] == "16,000"
        assert facts["checkpoint"].startswith("1500, ")
        assert facts["skipped steps"] == "3"
        assert facts["unusable"] == "1 images"
        assert facts["attempts"] == "2"
        assert facts["slowest node"] == "node2, 1.31 × median"
        assert "attempt 1, 2 nodes  after a crash" in summary
        assert "    rank 1 on node1: OSError\n    → requeue: may pass\n" in summary


def test_curve_falls_from_top_left_to_bottom_right() -> None:
    records = [record(step) for step in range(10, 2001, 10)]
    drawn = terminal_curves.draw(
        [terminal_curves.curve(records, "loss")], [], width=80, height=10
    ).plain.splitlines()
    rows = [line[10:] for line in drawn[1:-3]]
    places = [row.find(dots) for row in rows for dots in [row.strip("│ ")[:1]] if dots]
    assert places == sorted(places) and places[0] < 5 and places[-1] > 40
    assert any("┤" in line and line.split("┤")[0].strip() == "0.1" for line in drawn)


def test_one_spike_among_many_steps_is_drawn() -> None:
    records = [
        record(step, loss=90.0 if step == 70_010 else 1.0) for step in range(10, 100_010, 10)
    ]
    one = terminal_curves.curve(records, "loss")
    drawn = terminal_curves.draw([one], [], width=80, height=10).plain.splitlines()
    # Nothing but the spike reaches the upper half.
    spike = {len(line) - 1 for line in drawn[2:5]}
    assert len(spike) == 1 and 55 < spike.pop() < 65


def test_restarts_are_marked_where_the_count_changes() -> None:
    records = [
        record(step, restarts=0 if 400 < step <= 1000 else 1) for step in range(10, 2001, 10)
    ]
    assert terminal_curves.restart_steps(records) == [410, 1010]
    one = terminal_curves.curve(records, "images_per_s")
    with_marks = terminal_curves.draw([one], [410, 1010], width=80, height=10).plain
    assert with_marks.splitlines()[1].count("┊") + with_marks.splitlines()[2].count("┊") >= 2
    assert with_marks.endswith("┊ restart")
    assert "┊" not in terminal_curves.draw([one], [], width=80, height=10).plain
    assert terminal_curves.restart_steps([record(1), record(2)]) == []


def test_skipped_and_infinite_values_are_no_points() -> None:
    records = [
        record(10),
        {"step": 15, "loss": 1e9, "skipped": True},
        record(20, skipped=True),
        record(30, loss=None),
    ]
    assert terminal_curves.curve(records, "loss").steps == [10, 20]
    assert "skipped" not in terminal_curves.metrics_in(records)


def test_chosen_metrics_and_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=100, logged=100)
    picture = tmp_path / "curves.png"
    done = command("show", run, "--metric", "samples_seen", "--metric", "loss", "--png", picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("samples_seen  now") < done.stdout.index("loss  now")
    assert "gradient_norm" not in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = command("show", run, "--metric", "lss")
    assert wrong.returncode == 2
    assert "no metric lss" in wrong.stderr and "gradient_norm" in wrong.stderr


def test_a_run_before_its_first_metrics_and_one_value(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=100, logged=0)
    done = command("show", run)
    assert done.returncode == 0, done.stderr
    assert "steps          –/100" in done.stdout
    (run / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    assert command("show", run).returncode == 0
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints").mkdir()
    (run / "config.yaml").write_text("training: [")
    assert row_of(run).steps is None
    assert command("show", run).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("none",), "no directory"),
        (("empty",), "no run in"),
        (("file",), "is a file"),
        (("show", "none"), "no directory"),
        (("show", "."), "no run in"),
    ],
)
def test_wrong_paths_are_named(tmp_path: Path, arguments: tuple[str, ...], found: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = command(*arguments[:-1], tmp_path / arguments[-1])
    assert done.returncode == 2
    assert found in done.stderr.splitlines()[0]
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        "found",
        "required",
        "what to do",
    ]


def test_help_names_both_forms_and_needs_no_torch() -> None:
    start = "import sys; sys.modules['torch'] = None\nfrom dsr_scale.cli.main import run\nrun()"
    done = subprocess.run(
        [sys.executable, "-c", start, "runs", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "DIR | show RUN" in done.stdout


def test_listing_does_not_read_all_of_a_long_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=10**6, logged=10)
    line = json.dumps(record(20, epoch=1.0)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line * 300_000)
    started = time.perf_counter()
    assert row_of(run).step == 20
    assert time.perf_counter() - started < 0.5


def test_numbers_read_well() -> None:
    assert [age(s) for s in (-1, 45, 750, 7300, 108_000, 777_600)] == [
        "0s",
        "45s",
        "12m",
        "2h",
        "30h",
        "9d",
    ]
    assert [number(v) for v in (None, 0.123456, 999.96, 12345.6)] == [
        "–",
        "0.1235",
        "1000",
        "12346",
    ]
    assert [short_count(c) for c in (999, 1000, 1234, 2_500_000)] == ["999", "1k", "1234", "2.5M"]
