"""Loader workers and signals: which of them end a worker."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from torch_frame.signals.interruption import INTERRUPTION

_IGNORED = ("SIGINT", "SIGUSR1", "SIGUSR2")
_KILLED_S = 5.0  # for which a killed process is waited for


class WorkerShutdown:
    """Tells a loader's workers that a SIGTERM is meant for them, and not for the run.

    A signal that asks the run to end reaches the workers too (torchrun and SLURM send it to the group), and they are still
    needed: they ignore it. But torch and multiprocessing end workers by the same SIGTERM, so it is announced before. A worker
    that still imports has SIGTERM blocked, and multiprocessing would wait for it for ever: it is killed, which is safe as it
    holds no lock yet.

    Args:
        loader: a DataLoader.
        blocked: the signals that workers begin with blocked.

    Attributes:
        workers: the processes, once they are started.
    """

    def __init__(self, loader: Any, blocked: frozenset[int] = frozenset()) -> None:
        self.workers: Sequence[Any] = ()
        self._blocked = blocked
        self._permits: Any = None  # one for each worker, which never gives it back: so none takes another's
        self._entries: list[Any] = []  # a semaphore of 1 for each worker: taken by it when it begins, or by its end
        self._num_workers = loader.num_workers
        self._training_process = os.getpid()
        if loader.num_workers > 0:
            context: Any = loader.multiprocessing_context or multiprocessing
            self._permits = context.Semaphore(0)
            self._entries = [context.Semaphore(1) for _ in range(loader.num_workers)]
            atexit.register(self.announce)  # before multiprocessing's own, which was registered when it was imported

    def announce(self) -> None:
        """Say so; only the training process does."""
        if self._permits is None or os.getpid() != self._training_process:
            return
        for _ in range(self._num_workers):
            self._permits.release()
        still_import = [entry.acquire(block=False) for entry in self._entries]
        for worker in itertools.compress(self.workers, still_import):
            with contextlib.suppress(RuntimeError):  # torch's, whose handler of SIGCHLD takes it for a failure
                worker.kill()
                worker.join(_KILLED_S)
        atexit.unregister(self.announce)

    def announced(self) -> bool:
        """Whether it has been said; a worker that hears so ends, and does not ask again."""
        return bool(self._permits.acquire(block=False))

    def worker_started(self, worker_id: int) -> None:
        """In a worker, before all else: from now on signals that ask the run to end do not end it."""
        INTERRUPTION.reset()  # a forked one has the training's
        for name in _IGNORED:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if os.name != "nt":  # there SIGTERM is no signal that anybody could catch
            self._watch_for_sigterm()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._blocked)
        if not self._entries[worker_id].acquire(block=False):
            os._exit(0)

    def _watch_for_sigterm(self) -> None:
        """In a thread: python runs a handler between two instructions, and a wait that has just begun may last seconds."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # with SIG_IGN the thread would not be woken
        threading.Thread(target=self._end_when_told, args=(reading, os.getppid()), daemon=True).start()

    def _end_when_told(self, signals: int, parent: int) -> None:
        while True:
            number = os.read(signals, 1)[0]
            if number == signal.SIGTERM and (self.announced() or os.getppid() != parent):
                os._exit(0)  # as torch's own handler does: the training process takes another status for a failure
