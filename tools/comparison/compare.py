"""All runs of a comparison, then its report; a run that fails is named and the others go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError
from dsr_scale.evaluate.report import library_versions
from tools.comparison import commands
from tools.comparison.measures import Questions, measure_run
from tools.comparison.report import write_report
from tools.comparison.runs import PlannedRun, train
from tools.comparison.table import Comparison


def compare(
    runs: Sequence[PlannedRun],
    questions: Questions,
    out: Path,
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    trainer: commands.Trainer = commands.in_a_process,
) -> dict[str, str]:
    """Trains and measures every run and writes the report; returns what failed and why, by run.

    The report is written anew after every training, so that what is there can be read meanwhile. Raises
    InputError when there is nothing to report: every run failed.
    """
    records: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    not_computed: dict[str, str] = {}
    variants = list(dict.fromkeys(one.variant for one in runs))
    seeds = len({one.seed for one in runs})
    described = {
        "variants": ", ".join(variants),
        "seeds of each": seeds,
        **(facts or {}),
        **{f"version of {name}": version for name, version in library_versions().items()},
    }

    def write() -> None:
        write_report(
            Comparison.of(records, variants),
            runs,
            out,
            title=title,
            prompts=questions.prompts,
            failures=failures,
            not_computed=not_computed,
            facts=described,
        )

    for number, one in enumerate(runs, start=1):
        commands.console.print(f"{number}/{len(runs)} {one.title}", style="bold green")
        trained_before = one.is_trained
        problem = train(one, trainer)
        if problem is None:
            try:
                record = measure_run(one, questions)
            except Exception as error:  # the others' hours count more than this one's traceback
                problem = f"measuring failed: {type(error).__name__}: {error}"
            else:
                records.append(record)
                not_computed |= record["not_computed"]
        if problem is not None:
            failures[one.title] = problem
            commands.console.print(f"{one.title} failed: {problem}", style="red", markup=False)
        elif not trained_before and number < len(runs):
            write()
    if not records:
        raise InputError(
            found="no run that could be trained and measured: "
            + "; ".join(f"{run}: {why}" for run, why in failures.items()),
            required="at least one",
            remedy="correct what is named",
        )
    write()
    return failures
