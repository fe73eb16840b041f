"""Signals that ask a run to end: it finishes what cannot be left open, saves, and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch_frame.distributed.strategy import Strategy
from torch_frame.signals.interruption import INTERRUPTION, StopRequested

# SIGUSR1 and SIGUSR2 are what SLURM sends some time before the end: --signal=USR1@120
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
_OF_USERS = ("SIGUSR1", "SIGUSR2")
_PASSED_ON_S = 1.0  # torchrun passes a Ctrl-C on that its processes may have got already: so soon it is the same one
_SIGCHLD: Any = getattr(signal, "SIGCHLD", None)  # None on Windows


class StopSignals:
    """Notes the first signal; the trainer looks at it at its safe points, in evaluation, and where it waits for data.

    A second Ctrl-C stops at once. A signal that is ignored (nohup, a background job's SIGINT) stays ignored, and one that a C
    library handles (faulthandler) is left to it. From the first signal on, a loader's worker that dies is no error by itself:
    the same signal may have ended it, and the run is to be saved. A handler writes and logs nothing.

    Args:
        on_first: called in the handler, so that the trainer looks at its next safe point.
        phase: says in words where the run, and the frame that was interrupted, is; called in the handler.

    Attributes:
        received: the first signal of this run, or None.
        is_told: `told` has been asked.
    """

    def __init__(self, on_first: Callable[[], None], phase: Callable[[FrameType | None], str] = str) -> None:
        self.received: signal.Signals | None = None
        self.is_told = False
        self._on_first = on_first
        self._phase = phase
        self._came = 0.0, ""  # when, and where the run was
        self._got: list[int] = []  # by this process, in their order
        self._before: dict[int, Any] = {}  # the handlers that ours have replaced

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers of ours inside, in the main thread; elsewhere python allows none, and nothing is done."""
        self.received, self.is_told, self._before, self._got = None, False, {}, []
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        INTERRUPTION.reset()
        try:
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None) and not _is_handled_by_c(number):
                    self._replace(number, self._handle)
            yield
        finally:
            INTERRUPTION.reset()
            for number, before in self._before.items():
                is_ours = getattr(signal.getsignal(number), "__self__", None) is self
                if is_ours:  # a hook may have set another one, for what comes after the run
                    signal.signal(number, before)

    def _replace(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._before[number] = signal.getsignal(number)
        signal.signal(number, handler)

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
        when, where = self._came
        of_ranks = strategy.gather((int(self.received or 0), time.monotonic() - when, where))
        rank, (number, seconds, where) = next((rank, told) for rank, told in enumerate(of_ranks) if told[0])
        if self.received is None:
            self._came = time.monotonic() - seconds, f"on rank {rank}, {where}"
            self.received = signal.Signals(number)
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._got.append(number)
        if self.received is not None:
            if number == signal.SIGINT and not self._is_the_same():
                raise KeyboardInterrupt
            return
        self._came = time.monotonic(), self._phase(frame)
        self.received = signal.Signals(number)
        self._let_workers_die()
        self._on_first()
        INTERRUPTION.came = True
        INTERRUPTION.end_if_wanted()

    def _is_the_same(self) -> bool:
        """A Ctrl-C of which another rank has told already, or which torchrun has passed on, is no second one."""
        is_soon = time.monotonic() - self._came[0] < _PASSED_ON_S and "TORCHELASTIC_RUN_ID" in os.environ
        return len(self._got) == 1 or (is_soon and self.received == signal.SIGINT)

    def _let_workers_die(self) -> None:
        """torch raises in its handler of SIGCHLD, wherever the process is, in the middle of the last save too."""
        if _SIGCHLD is not None and callable(signal.getsignal(_SIGCHLD)):  # not one of SIG_DFL, SIG_IGN, None
            self._replace(_SIGCHLD, self._see_worker_die)

    def _see_worker_die(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # who waits for that worker's batch is told by the loader itself
            self._before[number](number, frame)

    def told(self) -> str:
        """Which signal came, how long ago, and where the run was."""
        assert self.received is not None
        self.is_told = True
        when, where = self._came
        return f"{self.received.name} came {time.monotonic() - when:.1f} s ago, {where}"

    def end(self) -> None:
        """End as the signal would have ended the process: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 140 for SIGUSR2.

        A user's own handler of SIGUSR1 or SIGUSR2 (which queues the job again, say) is called instead; before the end, if that
        signal came behind another one, as SLURM's time limit sends SIGTERM as well. Likewise, for each signal, the handler of a
        run around this one (a hook trains a probe): that run is to be saved too.
        """
        assert self.received is not None
        number, self.received = self.received, None
        others = {n: h for n, h in self._before.items() if _is_called(n, h)}
        for asked in dict.fromkeys([number, *self._got]):
            if asked in others:
                others[asked](asked, sys._getframe())
        if number not in others:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _is_called(number: int, handler: Any) -> bool:
    """It is a user's, of SIGUSR1 or SIGUSR2, or that of a run around this one."""
    is_of_a_run = isinstance(getattr(handler, "__self__", None), StopSignals)
    return is_of_a_run or (signal.Signals(number).name in _OF_USERS and callable(handler))


def _is_handled_by_c(number: int) -> bool:
    """Whether the process has a handler of which python knows nothing: faulthandler's, say. Linux tells."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False
