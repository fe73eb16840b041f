"""The worker processes of loaders: their settings, and how an evaluation starts those of the user's own loader."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.util import register_after_fork
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from torch_frame.data.rng import numpy_random
from torch_frame.signals.blocking import signals_blocked
from torch_frame.signals.workers import WorkerShutdown

_logger = logging.getLogger("torch_frame")

_told: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()


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


def worker_settings(loader: DataLoader[Any], seed: int, shutdown: WorkerShutdown) -> dict[str, Any]:
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
            "worker_init_fn": WorkerInit(loader.worker_init_fn, shutdown),
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
            "persistent_workers": loader.persistent_workers,
        }
    return settings


def as_it_is(batch: Any) -> Any:
    return batch


class WorkerInit:
    """Runs first in a worker: signals that ask the run to end are the training process's business, which ends its workers.

    Args:
        users: the user's `worker_init_fn`.
        shutdown: says when SIGTERM is meant for the worker.
    """

    def __init__(self, users: Callable[[int], None] | None, shutdown: WorkerShutdown) -> None:
        self._users = users
        self._shutdown = shutdown

    def __call__(self, worker_id: int) -> None:
        self._shutdown.worker_started(worker_id)
        info = get_worker_info()
        assert info is not None
        numpy_random.set_bit_generator(np.random.MT19937(0))  # a forked worker may have another kind from the user
        np.random.seed(info.seed % 2**32)
        wrapped: Any = info.dataset  # Loading or Streaming; a user's function and dataset look for their own there
        object.__setattr__(info, "dataset", wrapped.dataset)
        if self._users is not None:
            self._users(worker_id)


def iterate(loader: Any) -> Iterator[Any]:
    """Begin to iterate the loader of an evaluation. If it starts workers, a signal to the whole process group does not end them.

    The workers of training are started so, too (`worker_settings`). A loader that iterates in its own way is left as it is.
    """
    if not _starts_workers(loader):
        return iter(loader)
    users = loader.worker_init_fn
    with signals_blocked(loader) as blocked:
        shutdown = WorkerShutdown(loader, blocked)
        loader.worker_init_fn = _InitOfEvaluation(users, shutdown)
        try:
            batches: Iterator[Any] = iter(loader)
        finally:
            loader.worker_init_fn = users
        shutdown.workers = getattr(batches, "_workers", ())
    weakref.finalize(batches, shutdown.announce)  # persistent workers live as long as their loader
    return batches


def _starts_workers(loader: Any) -> bool:
    is_torchs = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return is_torchs and loader.num_workers > 0 and getattr(loader, "_iterator", None) is None


class _InitOfEvaluation:
    """Runs first in a worker of an evaluation, then the user's `worker_init_fn`."""

    def __init__(self, users: Callable[[int], None] | None, shutdown: WorkerShutdown) -> None:
        self._users = users
        self._shutdown = shutdown

    def __call__(self, worker_id: int) -> None:
        self._shutdown.worker_started(worker_id)
        if self._users is not None:
            self._users(worker_id)
