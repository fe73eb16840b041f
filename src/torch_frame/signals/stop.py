"""Signals that ask a run to end: it finishes what cannot be left open, saves, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch_frame.distributed.strategy import Strategy
from torch_frame.signals.interruption import INTERRUPTION, StopRequested

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)  # SIGUSR1 and SIGUSR2 are what SLURM sends some time before the end: --signal=USR1@120
_OF_USERS = ("SIGUSR1", "SIGUSR2")
_SIGCHLD: Any = getattr(signal, "SIGCHLD", None)  # None on Windows
_LIBRARIES = (
    str(Path(__file__).parents[1]) + os.sep,
    *(path + os.sep for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)


class StopSignals:
    """Notes the first signal; the trainer looks at it at its safe points, in evaluation, and where it waits for data.

    A second Ctrl-C stops at once. A signal that is ignored (nohup, a background job's SIGINT) stays ignored, and one that a C
    library handles (faulthandler) is left to it. From the first signal on, a loader's worker that dies is no error by itself:
    the same signal may have ended it, and the run is to be saved. A handler writes and logs nothing.

    Args:
        on_first: called in the handler, so that the trainer looks at its next safe point.
        phase: says in words where the run is; called in the handler.

    Attributes:
        received: the first signal of this run, or None.
    """

    def __init__(self, on_first: Callable[[], None], phase: Callable[[], str] = str) -> None:
        self.received: signal.Signals | None = None
        self._on_first = on_first
        self._phase = phase
        self._came: tuple[float, str] | None = None  # when, and where the run was; None: another rank got it
        self._users: dict[int, Any] = {}  # the handlers before
        self._sigchld: tuple[Any, Any] = (None, None)  # our handler, and the one before

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers of ours inside, in the main thread; elsewhere python allows none, and nothing is done."""
        self.received = self._came = None
        self._users = {}
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        INTERRUPTION.reset()
        try:
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None) and not _is_handled_by_c(number):
                    self._users[number] = signal.signal(number, self._handle)
            yield
        finally:
            INTERRUPTION.reset()
            for number, handler in self._users.items():
                signal.signal(number, handler)
            ours, before = self._sigchld
            if ours is not None and signal.getsignal(_SIGCHLD) is ours:
                signal.signal(_SIGCHLD, before)

    def begin_wait(self, may_interrupt: bool) -> None:
        """A wait for data begins; `may_interrupt` says whether the run may end here and now.

        Raises:
            StopRequested: if it may, and a signal has come already.
        """
        INTERRUPTION.allowed = may_interrupt
        if may_interrupt and self.received is not None:
            raise StopRequested

    def end_wait(self) -> None:
        """A batch has come, or none will."""
        INTERRUPTION.allowed = False

    def agree(self, strategy: Strategy) -> bool:
        """Whether a signal came on any rank; it counts as received on all of them then."""
        if not strategy.agree(self.received is not None):
            return False
        received = strategy.gather(0 if self.received is None else int(self.received))
        self.received = self.received or signal.Signals(max(received))
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        self._came = time.monotonic(), self._phase() + _users_place(frame)
        self._let_workers_die()
        self._on_first()
        INTERRUPTION.came = True
        INTERRUPTION.end_if_wanted()

    def _let_workers_die(self) -> None:
        """torch raises in its handler of SIGCHLD, wherever the process is, in the middle of the last save too."""
        told = None if _SIGCHLD is None else signal.getsignal(_SIGCHLD)
        if callable(told):  # not one of SIG_DFL, SIG_IGN, None
            self._sigchld = (_without_errors(told), told)
            signal.signal(_SIGCHLD, self._sigchld[0])

    def told(self) -> str:
        """Which signal came, how long ago, and where the run was: phase, file and line of the user's code."""
        assert self.received is not None
        if self._came is None:
            return f"{self.received.name} came on another rank"
        when, where = self._came
        return f"{self.received.name} came {time.monotonic() - when:.1f} s ago, {where}"

    def end(self) -> None:
        """End as the signal would have ended the process: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 140 for SIGUSR2.

        A user's own handler of SIGUSR1 or SIGUSR2 (which queues the job again, say) is called instead.
        """
        assert self.received is not None
        number, self.received = self.received, None
        handler = self._users.get(number)
        if number.name in _OF_USERS and callable(handler):
            handler(number, sys._getframe())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)


def _is_handled_by_c(number: int) -> bool:
    """Whether the process has a handler of which python knows nothing: faulthandler's, say. Linux tells."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False


def _users_place(frame: FrameType | None) -> str:
    """The line of the user's code that the main thread was in: of the innermost file that is in no library."""
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_LIBRARIES):
            return f" ({os.path.basename(path)}, line {frame.f_lineno}, in {frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def _without_errors(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    def quiet(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # who waits for that worker's batch is told by the loader itself
            handler(number, frame)

    return quiet
