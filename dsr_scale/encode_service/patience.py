"""How long a request waits for somebody to answer it, and what a person is told meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dsr_scale.config.run import AnyRun
from dsr_scale.data.encoded import EncodersLost
from dsr_scale.encode_service.registry import registry_directory

PAUSE_S = 0.2
"""Between two rounds over all servers when none answers."""

BUSY_PAUSE_S = 0.02
"""The same when some are well but have given out all credits."""


class Patience:
    """Of one request: `encoder.give_up_after_s` from its start, whatever the reason."""

    def __init__(self, run: AnyRun, *, speaks: bool) -> None:
        self._run = run
        self._speaks = speaks
        self._since_s = time.monotonic()
        self._told = False

    def attempt_s(self) -> float:
        """How long the next attempt may take: no longer than what is left."""
        left_s = self._run.encoder.give_up_after_s - (time.monotonic() - self._since_s)
        return max(PAUSE_S, min(self._run.encoder.request_timeout_s, left_s))

    def go_on(self, errors: Sequence[str], *, busy: bool) -> None:
        """A round brought no answer: waits a moment. Raises EncodersLost when that has lasted too long."""
        waited_s = time.monotonic() - self._since_s
        patience_s = self._run.encoder.give_up_after_s
        tried = "; ".join(error for error in errors if error)
        if busy:
            tried = "; ".join(filter(None, (tried, "the others have no room")))
        tried = tried or "none is registered and encoder.servers names none"
        if not busy and not self._told:
            self._told = True
            self._say(f"no encoder server answers, waiting {patience_s - waited_s:.0f} s ({tried})")
        if waited_s > patience_s:
            raise EncodersLost(
                found=f"no encoder server answered for {patience_s:g} s ({tried})",
                required="a running 'dsr-scale serve' of this run's encoders",
                remedy="start it with the same run file (its registry is "
                f"{registry_directory(self._run)}), then give the same command again",
            )
        time.sleep(BUSY_PAUSE_S if busy else PAUSE_S)

    def answered(self) -> None:
        """Somebody did."""
        if self._told:
            waited_s = time.monotonic() - self._since_s
            self._say(f"an encoder server answers after {waited_s:.1f} s")

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, file=sys.stderr, flush=True)
