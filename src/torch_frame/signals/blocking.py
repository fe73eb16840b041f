"""Blocks signals while workers start: until a worker has installed its handlers, a signal would kill it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from torch_frame.signals.stop import SIGNALS

_BLOCKED = tuple(number for number in SIGNALS if number != signal.SIGINT)
"""Ctrl-C is left open: a start may hang (a spawned worker whose imports hang does not read its pipe), and must have an end."""


@contextlib.contextmanager
def signals_blocked(loader: Any) -> Iterator[frozenset[int]]:
    """Inside, SIGTERM, SIGUSR1 and SIGUSR2 are blocked in this thread and in the processes that it starts.

    What comes meanwhile comes at the end. A worker unblocks them when it has its handlers; a pin-memory thread keeps them
    blocked, so that it is the training thread that is woken.

    Args:
        loader: a DataLoader whose workers are started inside.

    Yields:
        What a worker has to unblock: the signals that were not blocked before.
    """
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):  # Windows has neither masks nor groups
        yield frozenset()
        return
    _start_servers((loader.multiprocessing_context or multiprocessing).get_start_method())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    others = set(multiprocessing.active_children())
    try:
        yield frozenset(_BLOCKED) - before
    except Exception:
        raise
    except BaseException:  # a Ctrl-C: nothing else knows yet what has been started
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_servers(method: str) -> None:
    """multiprocessing's own processes, which begin with what is blocked here as well, and keep it."""
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
