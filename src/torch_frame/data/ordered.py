"""A DataLoader whose order, augmentation and place are known: the source behind plain, persistent and infinite loaders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from torch_frame.data.batches import BatchPlace, BatchPlan, Fetched, GivenBatches, Loading, SampleBatches
from torch_frame.data.order import FromSampler, Order, Sequential, Shuffled
from torch_frame.data.starting import signals_held_back
from torch_frame.data.workers import Ending, as_it_is, no_second_warning, worker_settings

Placed = tuple[Any, int]
"""A batch, and the position where a run goes on that has consumed it."""


class Stateless:
    """A source that has nothing to save beside the position."""

    is_ours = False
    interruptible = True
    seed = 0

    _loader: Any

    @property
    def num_batches(self) -> int | None:
        try:
            return len(self._loader)
        except (TypeError, NotImplementedError):
            return None

    def close(self) -> None:
        """Nothing runs in the background between epochs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        """Nothing to take up."""


class OrderedSource(Stateless):
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
    def num_batches(self) -> int | None:
        try:
            return len(self.plan)
        except (TypeError, NotImplementedError):  # a sampler without a length
            return None

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
            with no_second_warning(), signals_held_back(self._loader) as blocked:
                self._ending = Ending(self._loader, blocked)
                self._stream = iter(_inner_loader(self._loader, self._cursor, self.seed, self._ending))
                self._ending.workers = getattr(self._stream, "_workers", ())
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
        ending, self._ending = self._ending, None
        self._stream = self._cursor = None
        if ending is not None:
            ending.come()
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
        collate_fn=as_it_is,
        **worker_settings(loader, seed, ending),
    )


def plan_of(loader: DataLoader[Any], seed: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
    """The batches that a loader describes, in an order of ours where its own is random."""
    if loader.batch_sampler is None:
        return GivenBatches(order_of(loader.sampler, seed), single=True)
    if type(loader.batch_sampler) is not BatchSampler:
        return GivenBatches(FromSampler(loader.batch_sampler, seed), single=False)
    sampler = loader.batch_sampler.sampler
    if isinstance(sampler, DistributedSampler):  # it has split the data itself
        rank, world_size = 0, 1
    sizes = loader.batch_sampler.batch_size, loader.batch_sampler.drop_last
    return SampleBatches(order_of(sampler, seed), *sizes, rank=rank, world_size=world_size)


def order_of(sampler: Any, seed: int) -> Order:
    if type(sampler) is SequentialSampler:
        return Sequential(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return Shuffled(len(sampler), seed)
    return FromSampler(sampler, seed)
