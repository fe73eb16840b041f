"""Where the trainer's batches come from: a loader whose order and place in it are known, or one that can only be iterated."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import operator
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    get_worker_info,
)

from torch_frame.data.batches import (
    BatchPlace,
    BatchPlan,
    Fetched,
    GivenBatches,
    Loading,
    SampleBatches,
    StreamCollating,
    Streaming,
)
from torch_frame.data.order import FromSampler, Order, Sequential, Shuffled

_logger = logging.getLogger("torch_frame")


Placed = tuple[Any, int]
"""A batch, and the position where a run goes on that has consumed it."""


class Source(Protocol):
    """What the trainer iterates.

    Attributes:
        exact: an epoch can be resumed inside, bitwise.
        is_ours: order and augmentation of a user's loader are replaced by ours.
        interruptible: a wait for a batch may be broken off; what was fetched is fetched again.
        length: of an epoch, as (number, of what), or None where it is not known.
    """

    exact: bool
    is_ours: bool
    interruptible: bool
    seed: int

    @property
    def length(self) -> tuple[int, str] | None: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        """The epoch's batches from position `start` on; a position of 0 is the epoch's beginning."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        """Take up a state that was saved at position `start`; the training's random numbers are restored afterwards."""
        ...


def source_of(loader: Iterable[Any], seed: int, *, take_over: bool = True, last_epoch: int | None = None) -> Source:
    """How this loader is iterated: see the classes below."""
    seed = operator.index(seed)
    if isinstance(loader, InfiniteDataLoader):
        own_seed = seed if loader.seed is None else loader.seed
        return OrderedSource(loader, own_seed, endless=True, last_epoch=last_epoch)
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return StatefulSource(loader)
    if isinstance(loader, Sequence):
        return SequenceSource(loader)
    if take_over and can_take_over(loader):
        assert isinstance(loader, DataLoader)
        if isinstance(loader.dataset, IterableDataset):
            return StreamSource(loader, seed)
        return OrderedSource(loader, seed, endless=loader.persistent_workers, last_epoch=last_epoch)
    return ReplaySource(loader)


class _Stateless:
    """A source that has nothing to save beside the position."""

    is_ours = False
    interruptible = True
    seed = 0

    def close(self) -> None:
        """Nothing runs in the background between epochs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        """Nothing to take up."""


class SequenceSource(_Stateless):
    """A list of batches: any of them is reached directly."""

    exact = True

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        batches = self._batches
        return zip(batches[start:] if start else batches, range(start + 1, len(batches) + 1), strict=False)

    @property
    def length(self) -> tuple[int, str]:
        return len(self._batches), "batches"


class ReplaySource(_Stateless):
    """Any iterable: to go on inside an epoch, what was consumed is loaded again and left out."""

    exact = False

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        self._set_epoch(epoch)
        if start:
            _logger.warning(
                "Resuming inside an epoch of a loader whose order is its own: %d batches are loaded again and left out, "
                "which takes its time, and they need not be those of the interrupted epoch. "
                "A DataLoader with take_over=True has no such cost.",
                start,
            )
        return islice(((batch, i) for i, batch in enumerate(self._loader, 1)), start, None)

    @property
    def length(self) -> tuple[int, str] | None:
        return _batches_of(self._loader)

    def _set_epoch(self, epoch: int) -> None:
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)


class StatefulSource(_Stateless):
    """A loader that knows its own place (torchdata's StatefulDataLoader): it is saved and restored through its `state_dict`."""

    exact = True
    interruptible = False  # it may have counted what was never handed out

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._resumed: Iterator[Any] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        batches, self._resumed = self._resumed or iter(self._loader), None
        return ((batch, i) for i, batch in enumerate(batches, start + 1))

    @property
    def length(self) -> tuple[int, str] | None:
        return _batches_of(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        self._loader.load_state_dict(state_dict["loader"])
        if start:  # an iteration under way has drawn its random numbers before those of the checkpoint were saved
            self._resumed = iter(self._loader)


class StreamSource(_Stateless):
    """A DataLoader over an IterableDataset: its order is its own; random numbers are of (seed, epoch, worker, count).

    To go on inside an epoch, what was consumed is loaded again and left out; the batches are those of the interrupted epoch
    where the dataset yields the same samples again.
    """

    exact = True
    is_ours = True

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self.seed = seed
        self._ending: Ending | None = None

    def close(self) -> None:
        """The workers of an iteration end with it; they may be ended by force from now on."""
        if self._ending is not None:
            self._ending.come()

    @property
    def length(self) -> tuple[int, str] | None:
        return _batches_of(self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        if start:
            _logger.warning(
                "Resuming inside an epoch of an IterableDataset: %d batches are loaded again and left out, which takes its time.",
                start,
            )
        streaming = Streaming(self._loader.dataset, self.seed, epoch)
        self.close()
        self._ending = Ending(self._loader)
        with _no_second_warning():
            inner = DataLoader(
                streaming,
                batch_size=self._loader.batch_size,
                drop_last=self._loader.drop_last,
                collate_fn=StreamCollating(self._loader.collate_fn, self.seed, epoch),
                **_settings(self._loader, self.seed, self._ending),
            )
            stream = iter(inner)
        return islice(((batch, i) for i, batch in enumerate(stream, 1)), start, None)


class OrderedSource(_Stateless):
    """A map-style DataLoader whose order, augmentation and position are ours: a function of (seed, epoch, position).

    Args:
        loader: how samples are loaded: dataset, workers, collate function, pinning, ...
        seed: of the run.
        endless: workers live for the whole run and fetch across the epoch's border; else an epoch has workers of its own.
        last_epoch: an endless source fetches nothing beyond it.
    """

    exact = True
    is_ours = True

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        *,
        endless: bool,
        last_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.plan = plan_of(loader, seed, rank, world_size)
        self.seed = seed
        self.last_epoch = last_epoch
        self._loader = loader
        self._endless = endless
        self._cursor: _Cursor | None = None
        self._stream: Iterator[Fetched] | None = None
        self._ending: Ending | None = None
        self._next = (0, 0)
        self._turn = 0

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def length(self) -> tuple[int, str] | None:
        try:
            return self.plan.num_samples, "samples"
        except TypeError:  # a sampler without a length
            return None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        """The epoch's batches from position `start` on.

        Raises:
            RuntimeError: in an iteration that goes on after another one has begun.
        """
        self._turn += 1
        turn = self._turn
        if not self._endless:
            self.close()
        if self._has_no_batch(epoch, start):
            return
        stream, generation = self._stream_at(epoch, start)
        try:
            while True:
                self._check_turn(turn)
                fetched = next(stream)
                if fetched.generation != generation:  # an endless stream had fetched it for another place
                    continue
                self._next = (epoch + 1, 0) if fetched.is_last else (epoch, fetched.stop)
                yield fetched.batch, fetched.stop
                if fetched.is_last:
                    break
        except Exception:
            if turn == self._turn:
                self.close()  # workers that failed are not asked again
            raise
        finally:
            if not self._endless and turn == self._turn:
                self.close()

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError(
                "This loader is iterated anew while an earlier iteration goes on; it can do one at a time."
            )

    def _stream_at(self, epoch: int, start: int) -> tuple[Iterator[Fetched], int]:
        """The stream, and the generation of what it will bring for this place."""
        if self._stream is not None and self._cursor is not None and self._next != (epoch, start):
            self._cursor.jump(epoch, start)
            if self._cursor.exhausted:
                self.close()
        if self._stream is None or self._cursor is None:
            self._cursor = _Cursor(self.plan, epoch, start, endless=self._endless, last_epoch=self.last_epoch)
            with _no_second_warning():
                self._ending = Ending(self._loader)
                self._stream = iter(_inner_loader(self._loader, self._cursor, self.seed, self._ending))
        self._next = (epoch, start)
        return self._stream, self._cursor.generation

    def _has_no_batch(self, epoch: int, start: int) -> bool:
        if start == 0:
            with contextlib.suppress(TypeError):
                return len(self.plan) == 0
        return next(iter(self.plan.places(epoch, start)), None) is None

    def close(self) -> None:
        """End the workers; the next epoch starts new ones."""
        # By torch's own method and not by letting go: a traceback, or somebody's variable, may hold the iterator.
        shutdown = getattr(self._stream, "_shutdown_workers", None)
        self._stream = self._cursor = None
        if self._ending is not None:
            self._ending.come()
        if shutdown is not None:
            shutdown()


class _Cursor:
    """The batch sampler behind a stream: goes on where it stands, or jumps."""

    def __init__(
        self, plan: BatchPlan, epoch: int, start: int, *, endless: bool, last_epoch: int | None = None
    ) -> None:
        self.generation = 0
        self.exhausted = False
        self._plan = plan
        self._endless = endless
        self._last_epoch = last_epoch
        self._target = (epoch, start)

    def jump(self, epoch: int, start: int) -> None:
        """Go on at another place; what is fetched already is of an older generation."""
        self.generation += 1
        self._target = (epoch, start)

    def __iter__(self) -> Iterator[BatchPlace]:
        while True:
            generation = self.generation
            epoch, start = self._target
            self._target = (epoch + 1, 0)
            for place in self._plan.places(epoch, start):
                yield place._replace(generation=generation) if generation else place
                if self.generation != generation:
                    break
            else:
                if not self._endless or (self._last_epoch is not None and epoch >= self._last_epoch):
                    self.exhausted = True
                    return


def _inner_loader(loader: DataLoader[Any], cursor: _Cursor, seed: int, ending: Ending) -> DataLoader[Any]:
    """A DataLoader with the user's workers and settings that loads by our places."""
    loading = Loading(loader.dataset, loader.collate_fn, single=loader.batch_sampler is None, seed=seed)
    return DataLoader(
        loading,  # type: ignore[arg-type]  # asked through __getitems__ alone
        batch_sampler=cursor,  # type: ignore[arg-type]  # places instead of lists of indices
        collate_fn=_as_it_is,
        **_settings(loader, seed, ending),
    )


def _batches_of(loader: Any) -> tuple[int, str] | None:
    try:
        return len(loader), "batches"
    except (TypeError, NotImplementedError):
        return None


@contextlib.contextmanager
def _no_second_warning() -> Iterator[None]:
    """The user's own loader has said already that it has many workers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _settings(loader: DataLoader[Any], seed: int, ending: Ending) -> dict[str, Any]:
    """The user's settings of workers and memory, and a generator: torch would draw from the training's random numbers."""
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "generator": torch.Generator().manual_seed(seed & (2**63 - 1)),
    }
    if not getattr(loader, "in_order", True):
        _logger.warning(
            "in_order=False is not used: the order of batches is a function of the seed. take_over=False keeps it."
        )
    if loader.num_workers > 0:
        settings |= {
            "worker_init_fn": WorkerInit(loader.worker_init_fn, ending),
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return settings


def _as_it_is(batch: Any) -> Any:
    return batch


class Ending:
    """What a loader's workers are told by the training process: their end has come.

    A signal that asks the run to end reaches the workers too, and they are still needed: they ignore it. But torch and
    multiprocessing end workers by the same SIGTERM, so a worker has to know which of the two it is.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._has_come: Any = None  # a semaphore: raised once, never taken for long
        if loader.num_workers > 0:
            context: Any = loader.multiprocessing_context or multiprocessing
            self._has_come = context.Semaphore(0)
            atexit.register(self.come)  # before multiprocessing's own, which was registered when it was imported

    def come(self) -> None:
        """Say so; the training process alone does."""
        if self._has_come is not None:
            self._has_come.release()
            atexit.unregister(self.come)

    def has_come(self) -> bool:
        """Whether it has been said."""
        if not self._has_come.acquire(block=False):
            return False
        self._has_come.release()
        return True


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
        _numpy_global.set_bit_generator(np.random.MT19937(0))  # a forked worker may have another kind from the user
        info = get_worker_info()
        assert info is not None
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


_numpy_global: Any = np.random
"""numpy's global generator; its stubs leave out the function that exchanges it."""


def plan_of(loader: DataLoader[Any], seed: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
    """The batches that a loader describes, in an order of ours where its own is random."""
    if loader.batch_sampler is None:
        return GivenBatches(_order_of(loader.sampler, seed), single=True)
    if type(loader.batch_sampler) is not BatchSampler:
        return GivenBatches(FromSampler(loader.batch_sampler, seed), single=False)
    sampler = loader.batch_sampler.sampler
    if isinstance(sampler, DistributedSampler):  # it has split the data itself
        rank, world_size = 0, 1
    sizes = loader.batch_sampler.batch_size, loader.batch_sampler.drop_last
    return SampleBatches(_order_of(sampler, seed), *sizes, rank=rank, world_size=world_size)


def _order_of(sampler: Any, seed: int) -> Order:
    if type(sampler) is SequentialSampler:
        return Sequential(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return Shuffled(len(sampler), seed)
    return FromSampler(sampler, seed)


def can_take_over(loader: Iterable[Any]) -> bool:
    """A DataLoader that is iterated as torch's own class is."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and not (isinstance(loader.dataset, IterableDataset) and loader.persistent_workers)
    )


class InfiniteDataLoader(DataLoader[Any]):
    """A DataLoader whose workers live for the whole run and fetch the next epoch while this one is trained.

    Each `for` over it is an epoch, in an order of its own: a function of (seed, epoch), the same for every number of workers; so
    is each sample's augmentation, which draws from random numbers seeded with (seed, epoch, position). The dataset's `set_epoch`
    is called in the workers when an epoch begins. Breaking out of an epoch is fine; the next `for` is the next epoch.

    Args:
        dataset: map-style.
        batch_size, shuffle, sampler, ...: as for DataLoader.
        seed: of order and augmentation; None: `torch.initial_seed()`, or in a Trainer the run's.

    >>> loader = InfiniteDataLoader(range(4), batch_size=2, shuffle=True, seed=0)
    >>> len(loader), [sorted(torch.cat(list(loader)).tolist()) for epoch in range(2)]
    (2, [[0, 1, 2, 3], [0, 1, 2, 3]])
    """

    def __init__(
        self, dataset: Any, batch_size: int | None = 1, shuffle: bool | None = None, *args: Any, **settings: Any
    ) -> None:
        seed = settings.pop("seed", None)
        self.seed: int | None = None if seed is None else operator.index(seed)
        if isinstance(dataset, IterableDataset):
            raise TypeError("InfiniteDataLoader takes a map-style dataset; an IterableDataset has no order to compute.")
        settings.setdefault("persistent_workers", settings.get("num_workers", 0) > 0)
        super().__init__(dataset, batch_size, shuffle, *args, **settings)
        self._source: OrderedSource | None = None
        self._next_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next `for` is this epoch."""
        self._next_epoch = epoch

    def __len__(self) -> int:
        return len(plan_of(self, 0))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator of batches, with torch's loader behind it
        if self._source is None:
            seed = torch.initial_seed() if self.seed is None else self.seed
            # A weak reference: with its last strong one a loader ends its workers, and does not wait for the collector.
            self._source = OrderedSource(weakref.proxy(self), seed, endless=True)
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self._batches(self._source, epoch)

    def _batches(self, source: OrderedSource, epoch: int) -> Iterator[Any]:
        for batch, _ in source.epoch(epoch):
            yield batch

    def close(self) -> None:
        """End the workers; another `for` starts new ones."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
