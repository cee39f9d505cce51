"""Work that ranks do apart and leave together, whether it is done, fails, or a stop is asked for.

Work of minutes has no place where all ranks meet: their shares differ. So a rank that fails or is asked to
stop leaves a key in the store of the process group, and the others look for it as often as they can stop.
Who has done its share waits where it still notices a signal, and only then in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar, cast

from dsr_scale.base.errors import InputError
from dsr_scale.parallel.groups import Ranks

_LONGEST_PAUSE_S = 1.0
"""Between two questions to the store, which all ranks ask while they wait."""

T = TypeVar("T")


class Stopped(Exception):
    """A stop was asked for on some rank, and all leave."""


class Agreement:
    """One piece of work, in parts after each of which the ranks wait for each other."""

    def __init__(
        self, ranks: Ranks, name: str, *, asked: Callable[[], bool], touch: Callable[[], None]
    ) -> None:
        """`name` is of this piece of work alone. `asked` says whether this rank has been asked to stop;
        `touch` is called whenever it looks for that."""
        self._ranks = ranks
        self._key = f"dsr_scale/{name}"
        self._asked = asked
        self._touch = touch
        self._parts = 0

    def look(self) -> None:
        """Raises Stopped when this rank is not to go on."""
        self._touch()
        store = self._ranks.store
        if self._asked() or (store is not None and store.check([self._key])):
            raise Stopped

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives, once all ranks have come to its end; what it raises on any, all raise."""
        self._parts += 1

        def watched() -> T:
            try:
                self.look()
                return action()
            except Exception:
                self._tell_others()
                raise
            finally:
                self._await_others()

        return together(watched, self._ranks)

    def _tell_others(self) -> None:
        if self._ranks.store is not None:
            self._ranks.store.set(self._key, "")

    def _await_others(self) -> None:
        store, arrived = self._ranks.store, f"{self._key}/{self._parts}"
        if store is None:
            return
        store.add(arrived, 1)
        pause_s = 0.01
        while store.add(arrived, 0) < self._ranks.world_size:
            if self._asked():
                self._tell_others()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def together(action: Callable[[], T], ranks: Ranks) -> T:
    """What `action` gives on this rank; what it raises on any, all raise. A collective.

    Of several errors the worst, the same kind everywhere, since some kinds are survived: an error that is
    none of ours (elsewhere as RuntimeError), then InputError, then Stopped.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    ours = failure is None or isinstance(failure, InputError | Stopped)
    # Only errors of ours are known to survive the journey to other processes.
    told = ranks.gather_on_host([] if failure is None else [failure if ours else repr(failure)])
    for text in told:
        if isinstance(text, str):
            if failure is not None and not ours:
                raise failure
            raise RuntimeError(f"on another rank: {text}")
    for error in told:
        if isinstance(error, InputError):
            raise error
    if told:
        raise Stopped
    return cast("T", result)
