"""Many problems, one error: a run file is read once and everything wrong with it is said at once.

Whoever launches a cluster job fixes a file in one go instead of once per queue wait. The error
is an `InputError`, so callers that know only that type print it correctly.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsr_scale.base.errors import InputError


class ConfigError(InputError):
    """Several `InputError`s of one source; its text lists each with its own three parts."""

    def __init__(self, source: str, problems: Sequence[InputError]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(
            found="; ".join(problem.found for problem in problems),
            required="; ".join(problem.required for problem in problems),
            remedy="; ".join(problem.remedy for problem in problems),
        )

    def __str__(self) -> str:
        blocks = [
            f"{number}. found: {problem.found}\n"
            f"   required: {problem.required}\n"
            f"   what to do: {problem.remedy}"
            for number, problem in enumerate(self.problems, start=1)
        ]
        return f"{len(self.problems)} problems in {self.source}\n" + "\n".join(blocks)

    def __reduce__(self) -> tuple[object, tuple[str, tuple[InputError, ...]]]:
        return ConfigError, (self.source, self.problems)


def raise_problems(source: str, problems: Sequence[InputError]) -> None:
    """Raise the one problem itself, or several in a ConfigError; nothing when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(source, problems)
