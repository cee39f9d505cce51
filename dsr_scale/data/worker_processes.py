"""Worker processes that never outlive their parent and leave signals to it.

A data worker whose training process was killed can block for ever on a full pipe (measured: minutes
with PyTorch's DataLoader), so on Linux the kernel is asked to kill it with its parent. The other
half: Slurm and the terminal signal every process of a job, but stopping is the parent's decision,
after its last checkpoint; so workers ignore those signals unless the parent itself sent them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def tie_to_parent(parent_pid: int) -> None:
    """Call first in a worker: die with `parent_pid`, ignore signals that are meant for it.

    The kernel watches the *thread* that started the worker: start workers from a thread that lives
    as long as they should.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before prctl was called
            os._exit(1)
        # In torch's worker SIGTERM must still work when the parent sends it: that is how it stops
        # a stuck worker. sigwaitinfo tells the sender, which a handler cannot.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(parent_pid,), daemon=True).start()
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


def _obey_parent(parent_pid: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent_pid:
            os._exit(0)
