"""Workers are deaf to signals while they start: one that still imports has no handlers, and would die."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""They ask a run to end; whole process groups get them."""


@contextlib.contextmanager
def signals_held_back(loader: DataLoader[Any]) -> Iterator[frozenset[int]]:
    """Inside, `SIGNALS` are blocked in this thread and in the processes that it starts; what comes meanwhile comes at the end.

    A worker lets them in when it has its handlers (`WorkerInit`). A pin-memory thread keeps them blocked, so that it is the
    training thread that is woken.

    Yields:
        What a worker has to let in: the signals that were not blocked before.
    """
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):  # Windows has neither masks nor groups
        yield frozenset()
        return
    _start_servers(loader.multiprocessing_context or multiprocessing)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield frozenset(SIGNALS) - before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_servers(context: Any) -> None:
    """multiprocessing's own processes, which begin with what is blocked here as well, and keep it."""
    method = context.get_start_method()
    if method == "fork":  # has none
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which sees to SIGINT and SIGTERM itself, and would die of SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if method == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()  # with nothing blocked, or all its children would be deaf, other people's too
