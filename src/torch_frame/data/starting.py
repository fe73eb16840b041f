"""Workers are deaf to signals while they start: one that still imports has no handlers, and would die."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from torch_frame import alarm
from torch_frame.stopping import SIGNALS

_AT_MOST_S = 10.0


@contextlib.contextmanager
def signals_held_back(loader: DataLoader[Any]) -> Iterator[frozenset[int]]:
    """Inside, `SIGNALS` are blocked in this thread and in the processes that it starts; what comes meanwhile comes at the end.

    A worker lets them in when it has its handlers (`WorkerInit`). A pin-memory thread keeps them blocked, so that it is the
    training thread that is woken. A start that hangs, as writing to a spawned worker does whose imports hang, is not held back
    for longer than `_AT_MOST_S`.

    Yields:
        What a worker has to let in: the signals that were not blocked before.
    """
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):  # Windows has neither masks nor groups
        yield frozenset()
        return
    method = (loader.multiprocessing_context or multiprocessing).get_start_method()
    _start_servers(method)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def let_in(frame: object = None) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    if method != "fork":
        alarm.call_in(_AT_MOST_S, let_in)
    others = set(multiprocessing.active_children())
    try:
        yield frozenset(SIGNALS) - before
    except Exception:
        raise
    except BaseException:  # a Ctrl-C that another thread was given: nobody else knows yet what has been started
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        alarm.give_back(let_in)
        let_in()


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
