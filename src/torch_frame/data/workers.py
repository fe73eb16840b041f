"""The worker processes of a loader: their settings, and who may end them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.util import register_after_fork
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from torch_frame.data.rng import numpy_random

_logger = logging.getLogger("torch_frame")

_told: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
_KILLED_S = 5.0  # for which a killed process is waited for


def keep_parents_garbage(owner: object) -> None:
    """While `owner` lives, a forked worker, of any loader, never collects the cycles that it found when it began.

    They are the training process's. A CUDA tensor or event among them would be freed where CUDA does not work, which aborts the
    worker ("CUDA error: initialization error"; seen at the second epoch's start); others would delete the files of theirs.
    """
    register_after_fork(owner, _freeze)


def _freeze(owner: object) -> None:
    gc.freeze()


@contextlib.contextmanager
def no_second_warning() -> Iterator[None]:
    """The user's own loader has said already that it has many workers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def worker_settings(loader: DataLoader[Any], seed: int, ending: Ending) -> dict[str, Any]:
    """The user's settings of workers and memory, and a generator: torch would draw from the training's random numbers."""
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "generator": torch.Generator().manual_seed(seed & (2**63 - 1)),
    }
    if not getattr(loader, "in_order", True) and loader not in _told:
        _told.add(loader)
        _logger.warning(
            "in_order=False is not used: the order of batches is a function of the seed. take_over=False keeps it."
        )
    if loader.num_workers > 0:
        settings |= {
            "worker_init_fn": WorkerInit(loader.worker_init_fn, ending),
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
            "persistent_workers": loader.persistent_workers,
        }
    return settings


def as_it_is(batch: Any) -> Any:
    return batch


class Ending:
    """What a loader's workers are told by the training process: their end has come.

    A signal that asks the run to end reaches the workers too, and they are still needed: they ignore it. But torch and
    multiprocessing end workers by the same SIGTERM, so a worker has to know which of the two it is. One that still imports has
    SIGTERM blocked, and multiprocessing would wait for it for ever: it is killed, which is safe as it holds no lock yet.

    Args:
        blocked: the signals that workers begin with blocked.

    Attributes:
        workers: the processes, once they are started.
    """

    def __init__(self, loader: DataLoader[Any], blocked: frozenset[int] = frozenset()) -> None:
        self.blocked = blocked
        self.workers: Sequence[Any] = ()
        self._permits: Any = (
            None  # a semaphore: one for each worker, taken for good, so that none hides it from another
        )
        self._entries: list[Any] = []  # a semaphore of 1 for each worker: taken by it when it begins, or by its end
        self._num_workers = loader.num_workers
        self._training_process = os.getpid()
        if loader.num_workers > 0:
            context: Any = loader.multiprocessing_context or multiprocessing
            self._permits = context.Semaphore(0)
            self._entries = [context.Semaphore(1) for _ in range(loader.num_workers)]
            atexit.register(self.come)  # before multiprocessing's own, which was registered when it was imported

    def come(self) -> None:
        """Say so; the training process alone does."""
        if self._permits is None or os.getpid() != self._training_process:
            return
        for _ in range(self._num_workers):
            self._permits.release()
        imports = [entry.acquire(block=False) for entry in self._entries]
        for worker in itertools.compress(self.workers, imports):
            with contextlib.suppress(RuntimeError):  # torch's, whose handler of SIGCHLD takes it for a failure
                worker.kill()
                worker.join(_KILLED_S)
        atexit.unregister(self.come)

    def enter(self, worker_id: int) -> None:
        """A worker begins, and hears signals from now on; it ends here where its end has come before."""
        if not self._entries[worker_id].acquire(block=False):
            os._exit(0)

    def has_come(self) -> bool:
        """Whether it has been said; a worker that hears so ends, and does not ask again."""
        return bool(self._permits.acquire(block=False))


class WorkerInit:
    """Runs first in a worker: signals that ask the run to end are the training process's business, which ends its workers.

    Args:
        users: the user's `worker_init_fn`.
        ending: says when SIGTERM is meant for the worker.
    """

    def __init__(self, users: Callable[[int], None] | None, ending: Ending) -> None:
        self._users = users
        self._ending = ending

    def __call__(self, worker_id: int) -> None:
        for name in ("SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if os.name != "nt":  # there SIGTERM is no signal that anybody could catch
            self._watch_for_sigterm()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._ending.blocked)
        self._ending.enter(worker_id)
        info = get_worker_info()
        assert info is not None
        numpy_random.set_bit_generator(np.random.MT19937(0))  # a forked worker may have another kind from the user
        np.random.seed(info.seed % 2**32)
        wrapped: Any = info.dataset  # Loading or Streaming; a user's function and dataset look for their own there
        object.__setattr__(info, "dataset", wrapped.dataset)
        if self._users is not None:
            self._users(worker_id)

    def _watch_for_sigterm(self) -> None:
        """In a thread: python runs a handler between two instructions, and a wait that has just begun may last seconds."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _nothing)
        threading.Thread(target=self._end_when_told, args=(reading, os.getppid()), daemon=True).start()

    def _end_when_told(self, signals: int, parent: int) -> None:
        while True:
            number = os.read(signals, 1)[0]
            if number == signal.SIGTERM and (self._ending.has_come() or os.getppid() != parent):
                os._exit(0)  # as torch's own handler does: the training process takes another status for a failure


def _nothing(number: int, frame: Any) -> None:
    """A handler that ignores: with SIG_IGN nobody would be woken."""
