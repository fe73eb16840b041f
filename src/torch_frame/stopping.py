"""Signals that ask a run to end: it finishes what cannot be left open, saves, and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from torch_frame import alarm
from torch_frame.distributed.strategy import Strategy

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # SIGUSR1 is what SLURM sends some time before the end: --signal=USR1@120
_SIGCHLD: Any = getattr(signal, "SIGCHLD", None)  # None on Windows
_LOOK_AGAIN_S = 0.2
# Where a user's dataset and collate function are called in this process, in functions of these names, and what else they call.
_LOADING = "torch_frame.data.loading"
_CALL_A_DATASET = ("_load", "__iter__", "__call__")
_NO_DATASETS = (
    "torch_frame.data.order",
    "torch_frame.data.rng",
    "torch_frame.data.rng_guard",
    "torch_frame.data.rng_memory",
)
_WAITING_MODULES = ("multiprocessing.connection", "multiprocessing.queues", "selectors", "queue", "threading")


class StopRequested(BaseException):
    """The run is to end here, with its state as it is. Not an Exception: nobody's `except Exception` is meant."""


class StopSignals:
    """Notes the first signal; the trainer looks at it at its safe points, in evaluation, and where it waits for data.

    A second Ctrl-C stops at once. A signal that is ignored (nohup, a background job's SIGINT) stays ignored. From the first
    signal on, a loader's worker that dies is no error by itself: the same signal may have ended it, and the run is to be saved.

    Args:
        on_first: called in the handler, so that somebody comes and looks.

    Attributes:
        received: the first signal of this run, or None.
        may_interrupt: the process waits for data and nothing is open, so the wait itself may be broken off.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.received: signal.Signals | None = None
        self.may_interrupt = False
        self._on_first = on_first
        self._sigchld: tuple[Any, Any] = (None, None)  # our handler, and the one before

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers of ours inside, in the main thread; elsewhere python allows none, and nothing is done."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}
        try:
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by C code, not ours to replace
                    before[number] = signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._put_back_the_others()

    def begin_wait(self, may_interrupt: bool) -> None:
        """A wait for data begins; `may_interrupt` says whether the run may end here and now.

        Raises:
            StopRequested: where it may, and a signal has come already.
        """
        self.may_interrupt = may_interrupt
        if may_interrupt and self.received is not None:
            raise StopRequested

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
        self._let_workers_die()
        self._on_first()
        self._break_off(frame)

    def _break_off(self, frame: FrameType | None) -> None:
        """End a wait that may be broken off; one that is about to begin in a moment."""
        if not self.may_interrupt:
            return
        if _is_waiting(frame) and not self._is_held_back():
            raise StopRequested
        alarm.call_in(_LOOK_AGAIN_S, self._break_off)  # python cannot begin a wait and let a signal in at the same time

    def _is_held_back(self) -> bool:
        """Workers are being started, with signals blocked; another thread was given this one."""
        return hasattr(signal, "pthread_sigmask") and self.received in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def _let_workers_die(self) -> None:
        """torch raises in its handler of SIGCHLD, wherever the process is, in the middle of the last save too."""
        told = None if _SIGCHLD is None else signal.getsignal(_SIGCHLD)
        if callable(told):  # not one of SIG_DFL, SIG_IGN, None
            self._sigchld = (_without_errors(told), told)
            signal.signal(_SIGCHLD, self._sigchld[0])

    def _put_back_the_others(self) -> None:
        alarm.give_back(self._break_off)
        ours, before = self._sigchld
        if ours is not None and signal.getsignal(_SIGCHLD) is ours:
            signal.signal(_SIGCHLD, before)

    def end(self) -> NoReturn:
        """End as the signal would have ended the process: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
        assert self.received is not None
        number, self.received = self.received, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _is_waiting(frame: FrameType | None) -> bool:
    """The signal came while data was waited for, and not amid code of ours that has something half done."""
    return frame is not None and (_module_of(frame) in _WAITING_MODULES or _is_in_a_dataset(frame))


def _is_in_a_dataset(frame: FrameType) -> bool:
    """A user's dataset loads a sample in this process: it may be broken off as by any Ctrl-C; what is ours is put back."""
    called = frame
    while _module_of(called) != _LOADING and (caller := called.f_back) is not None:
        if _module_of(caller) == _LOADING:
            return caller.f_code.co_name in _CALL_A_DATASET and _module_of(called) not in _NO_DATASETS
        called = caller
    return False


def _module_of(frame: FrameType) -> str | None:
    return frame.f_globals.get("__name__")


def _without_errors(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    def quiet(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # who waits for that worker's batch is told by the loader itself
            handler(number, frame)

    return quiet
