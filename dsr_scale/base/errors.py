"""One error type for everything a person can put right.

A message has three parts, always in this order: what was found, what is required, what to do.
The command line prints them without a traceback and exits with status 2; `assert` stays for
mistakes of the programmer.
"""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a person: a config, a file, a directory, a checkpoint, a machine too small."""

    def __init__(self, *, found: str, required: str, remedy: str) -> None:
        self.found = found
        self.required = required
        self.remedy = remedy
        super().__init__(f"found: {found}\nrequired: {required}\nwhat to do: {remedy}")

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        # Errors cross process borders (data workers, packers); keyword-only arguments do not pickle.
        return _rebuild, (self.found, self.required, self.remedy)


def _rebuild(found: str, required: str, remedy: str) -> InputError:
    return InputError(found=found, required=required, remedy=remedy)
