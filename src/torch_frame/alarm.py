"""The process's one alarm (SIGALRM), borrowed where nobody else uses it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Call = Callable[[FrameType | None], Any]
"""Is given the frame that the main thread was in."""


class _Ring:
    """A handler of SIGALRM; its class tells it from other people's."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.call(frame)


def call_in(seconds: float, call: Call) -> bool:
    """Call it once in the main thread, amid what that does then; of two calls the sooner one is kept.

    Returns:
        False where nothing is done: outside the main thread, on Windows, where a sooner call waits, or where somebody else uses
        the alarm.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return False
    handler, left = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    if not isinstance(handler, _Ring) and (handler != signal.SIG_DFL or left):
        return False
    if 0 < left <= seconds:
        return False
    signal.signal(signal.SIGALRM, _Ring(call))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return True


def give_back(call: Call) -> None:
    """Give the alarm back, if it is borrowed for this call."""
    ring = signal.getsignal(signal.SIGALRM) if hasattr(signal, "SIGALRM") else None
    if isinstance(ring, _Ring) and ring.call == call:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
