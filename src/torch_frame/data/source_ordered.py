"""A DataLoader whose order, augmentation and place are known: the sources behind plain, persistent and infinite loaders."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader

from torch_frame.data.loading import Fetched, Loading
from torch_frame.data.order import hash_ints, may_vary
from torch_frame.data.plan import BatchPlace, BatchPlan, plan_of
from torch_frame.data.source_base import BatchAndPosition, StatelessSource, length_of
from torch_frame.data.workers import as_it_is, no_second_warning, worker_settings
from torch_frame.signals.blocking import signals_blocked
from torch_frame.signals.interruption import INTERRUPTION
from torch_frame.signals.workers import WorkerShutdown

_logger = logging.getLogger("torch_frame")


class OrderedSource(StatelessSource):
    """A map-style DataLoader whose order and augmentation are a function of (seed, epoch, position).

    Everything else is as torch has it: lengths, batch size and sampler are read when an epoch begins, a sampler is asked for no
    more than torch would ask it for, and workers live for an epoch, or with `persistent_workers` for the run.

    Args:
        loader: how samples are loaded: dataset, workers, collate function, pinning, ...
        seed: of the run.
        rank, world_size: which part of each global batch this process has.
        short: what happens to an epoch's last samples if they are fewer than the ranks: "wrap" or "drop".
    """

    is_ours = True

    def __init__(
        self, loader: DataLoader[Any], seed: int, *, rank: int = 0, world_size: int = 1, short: str = "wrap"
    ) -> None:
        super().__init__(loader)
        self.seed = seed
        self._rank = rank
        self._world_size = world_size
        self._short = short
        self._has_told = False
        self._places: Iterator[BatchPlace] = iter(())
        self._sent: deque[BatchPlace] = deque()  # of them those that workers were asked for, and have not brought yet
        self._inner: DataLoader[Any] | None = None
        self._stream: Iterator[Fetched] | None = None
        self._shutdown: WorkerShutdown | None = None
        self._iteration = 0
        self._has_started_again = False
        self._drawn: int | None = None  # the generators that the dataset has been seen to draw from
        # position -> of the indices up to there, of the last batches that were fetched
        self._hashes: dict[int, int] = {}
        self._expected: int | None = None  # that hash in a state that is resumed, until the first batch

    @property
    def plan(self) -> BatchPlan:
        """The batches of an epoch, as the loader is now."""
        return plan_of(self._loader, self.seed, self._rank, self._world_size, self._short)

    def plan_of_epoch(self, epoch: int) -> BatchPlan:
        """The same, for an epoch whose indices are drawn from now on."""
        self.before_order(epoch)
        return self.plan

    @property
    def num_batches(self) -> int | None:
        return length_of(self.plan)

    def num_left(self, position: int, num_dealt: int) -> int | None:
        try:
            return self.plan.num_left(position, num_dealt)
        except (TypeError, NotImplementedError):
            return None

    @property
    def told(self) -> str | None:
        return self.plan.told

    @property
    def length(self) -> tuple[int, str] | None:
        try:
            return self.plan.num_samples, "samples"
        except (TypeError, NotImplementedError):  # a sampler without a length
            return None

    @property
    def length_varies(self) -> bool:
        """A sampler of the user's gives the length."""
        loader = self._loader
        return may_vary(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        """The epoch's batches from position `start` on.

        Raises:
            RuntimeError: in an iteration that continues after another one has begun.
        """
        self._iteration += 1
        iteration = self._iteration
        try:
            stream, is_sent = self._begin_epoch(epoch, start), self._loader.num_workers > 0
            while True:
                self._check_iteration(iteration)
                if is_sent:
                    INTERRUPTION.begin()
                try:  # here and in EndlessSource: a method for both would be a frame more above a dataset's error
                    fetched = next(stream, None)
                except RuntimeError:
                    if not self._has_lost_workers():
                        raise
                    stream = self._start_again(epoch)
                    continue
                INTERRUPTION.here = False
                if fetched is None:
                    self._check_open(stream)
                    break
                self._forget_sent(fetched.place)
                self._note(fetched)
                yield fetched.batch, fetched.place.stop
        except GeneratorExit:
            raise
        except BaseException:
            if iteration == self._iteration:
                self.close()  # workers that failed are not asked again
            raise
        finally:
            INTERRUPTION.here = False
            if iteration == self._iteration:
                self._expected = None
                if not self._loader.persistent_workers:
                    self.close()

    def _begin_epoch(self, epoch: int, start: int) -> Iterator[Fetched]:
        """Workers are started, or those that live for the run are told of the epoch."""
        if not self._loader.persistent_workers:
            self.close()
        self._places = self.plan_of_epoch(epoch).places(epoch, start)
        self._sent.clear()
        return self._start_stream(epoch)

    def _start_stream(self, epoch: int) -> Iterator[Fetched]:
        if self._loader.num_workers == 0 and not self._loader.pin_memory:
            # A DataLoader around it would take 8 us a batch.
            self._stream = map(self._loading().__getitems__, self._places)
            return self._stream
        with no_second_warning(), signals_blocked(self._loader) as blocked:
            if self._inner is None:
                self._shutdown = WorkerShutdown(self._loader, blocked)
                self._inner = self._inner_loader(epoch, self._shutdown)
            self._stream = iter(self._inner)
            assert self._shutdown is not None
            self._shutdown.workers = getattr(self._stream, "_workers", ())
        return self._stream

    def _has_lost_workers(self) -> bool:
        """A Ctrl-C that asks the run to end has ended workers that were only being started: it is not blocked in them."""
        workers = () if self._shutdown is None else self._shutdown.workers
        may_be = INTERRUPTION.came and not self._has_started_again  # once: workers may die of something else, too
        return may_be and any(worker.exitcode is not None for worker in workers)

    def _start_again(self, epoch: int) -> Iterator[Fetched]:
        """Go on with new workers where those that have ended stood, so that the window under way can be completed."""
        INTERRUPTION.here = False
        self._has_started_again = True
        self.close()
        self._places = chain(list(self._sent), self._places)
        self._sent.clear()
        return self._start_stream(epoch)

    def _inner_loader(self, epoch: int, shutdown: WorkerShutdown) -> DataLoader[Any]:
        """A DataLoader with the user's workers and settings that loads by our places."""
        loader = self._loader
        return DataLoader(
            self._loading(),  # type: ignore[arg-type]  # asked through __getitems__ only
            batch_sampler=_Places(self),  # type: ignore[arg-type]  # places instead of lists of indices
            collate_fn=as_it_is,
            **worker_settings(loader, hash_ints(self.seed, epoch), shutdown),  # workers have other seeds in each epoch
        )

    def _loading(self) -> Loading:
        loader, single = self._loader, self._loader.batch_sampler is None
        return Loading(loader.dataset, loader.collate_fn, single=single, seed=self.seed, drawn=self._drawn)

    def _note(self, fetched: Fetched) -> None:
        """Remember what a batch tells: which generators its dataset draws from, and which indices there have been."""
        if fetched.drawn is not None:
            self._drawn = fetched.drawn | (self._drawn or 0)
        if fetched.place.repeats and not self._has_told:
            self._has_told = True
            _logger.warning(
                "The epoch's last batches have fewer samples than there are ranks, so some samples are on two ranks and count "
                "twice. DDP(short_batch='drop') leaves them out."
            )
        before, after = fetched.place.hashes
        self._hashes = dict([*self._hashes.items(), (fetched.place.stop, after)][-3:]) if after else {}
        expected, self._expected = self._expected, None
        if expected is not None and before != expected:
            self._warn_of_other_indices()

    def _forget_sent(self, place: BatchPlace) -> None:
        for index, sent in enumerate(self._sent):  # the first one, unless the loader has in_order=False
            if (sent.stop, sent.epoch, sent.generation) == (place.stop, place.epoch, place.generation):
                del self._sent[index]
                return

    def _warn_of_other_indices(self) -> None:
        _logger.warning(
            "The sampler has drawn other indices than in the run that is resumed, so in this epoch some samples may be "
            "trained on twice and others not at all. A sampler that follows something outside of it (losses, weights, a "
            "counter) has to be given what it followed before train() begins."
        )

    def _check_open(self, stream: Iterator[Fetched]) -> None:
        if self._stream is not stream:
            raise RuntimeError("This loader was closed while it was iterated.")

    def _check_iteration(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError(
                "This loader is iterated anew while an earlier iteration is under way; it can do one at a time."
            )

    def state_dict(self, position: int) -> dict[str, Any]:
        order_hash = self._hashes.get(position)
        state: dict[str, Any] = {"order": self.plan.kind, "drawn": self._drawn}
        return state if order_hash is None else {**state, "order_hash": order_hash}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        self._drawn = state_dict.get("drawn")
        if not start:
            return
        if state_dict.get("order", self.plan.kind) != self.plan.kind:
            self._warn_of_other_indices()
        else:
            self._expected = state_dict.get("order_hash")

    def close(self) -> None:
        """End the workers; the next epoch starts new ones."""
        # Shut down explicitly: a traceback or a user's variable may keep the iterator alive.
        end_workers = getattr(self._stream, "_shutdown_workers", None)
        shutdown, self._shutdown = self._shutdown, None
        self._stream = self._inner = None
        if shutdown is not None:
            shutdown.announce()
        if end_workers is not None:
            end_workers()


class _Places:
    """The batch sampler of an inner loader: the places that its source has set, when an epoch begins."""

    def __init__(self, source: OrderedSource) -> None:
        self._source = weakref.ref(source)  # no circle: a source that is let go ends its workers at once

    def __iter__(self) -> Iterator[BatchPlace]:
        source = self._source()
        assert source is not None
        return _Whole(source._places, source._sent)


class _Whole(Iterator[BatchPlace]):
    """Places that are made while a batch is waited for, and the sampler's numbers with them: not to be interrupted.

    Args:
        places: one after the other.
        sent: those that workers have been asked for are added to it.
    """

    def __init__(self, places: Iterator[BatchPlace], sent: deque[BatchPlace]) -> None:
        self._places = places
        self._sent = sent

    def __next__(self) -> BatchPlace:
        may_be_interrupted, INTERRUPTION.here = INTERRUPTION.here, False
        place = next(self._places)
        self._sent.append(place)
        if may_be_interrupted:
            INTERRUPTION.begin()
        return place


class EndlessSource(OrderedSource):
    """An InfiniteDataLoader: workers live for the run, and fetch the next epoch while this one is trained.

    Args:
        loader, seed, rank, world_size, short: as in OrderedSource.
        last_epoch: nothing is fetched beyond it.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        *,
        last_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        short: str = "wrap",
    ) -> None:
        super().__init__(loader, seed, rank=rank, world_size=world_size, short=short)
        self._last_epoch = last_epoch
        self._next = (0, 0)
        self._cursor: _EndlessPlaces | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        self._iteration += 1
        iteration = self._iteration
        try:
            stream, generation = self._stream_at(epoch, start)
            is_sent = self._loader.num_workers > 0
            while True:
                self._check_iteration(iteration)
                if is_sent:
                    INTERRUPTION.begin()
                try:
                    fetched = next(stream, None)
                except RuntimeError:
                    if not self._has_lost_workers():
                        raise
                    stream = self._start_again(epoch)
                    continue
                INTERRUPTION.here = False
                if fetched is None:  # the epoch has no batch
                    self._check_open(stream)
                    break
                place = fetched.place
                self._forget_sent(place)
                if place.generation != generation:  # it was fetched before a jump
                    continue
                self._next = (epoch + 1, 0) if place.is_last else (epoch, place.stop)
                self._note(fetched)
                yield fetched.batch, place.stop
                if place.is_last:
                    break
        except GeneratorExit:
            raise
        except BaseException:
            if iteration == self._iteration:
                self.close()
            raise
        finally:
            INTERRUPTION.here = False
            if iteration == self._iteration:
                self._expected = None

    def _stream_at(self, epoch: int, start: int) -> tuple[Iterator[Fetched], int]:
        """The stream, and the generation of what it will bring for this place."""
        if self._last_epoch is not None and epoch > self._last_epoch:  # max_epochs was raised
            self._last_epoch = epoch
            self.close()
        if self._cursor is not None and self._next != (epoch, start):
            self._cursor.jump(epoch, start)
        if self._cursor is not None and self._cursor.exhausted and self._next != (epoch, start):
            self.close()
        if self._stream is None or self._cursor is None:
            source = weakref.proxy(self)
            self._cursor = _EndlessPlaces(lambda epoch: source.plan_of_epoch(epoch), epoch, start, self._last_epoch)
            self._places = iter(self._cursor)
            self._sent.clear()
            self._start_stream(epoch)
        assert self._stream is not None
        self._next = (epoch, start)
        return self._stream, self._cursor.generation


class _EndlessPlaces:
    """The places of one epoch after the other, or from a place that it is told to jump to."""

    def __init__(self, plan: Callable[[int], BatchPlan], epoch: int, start: int, last_epoch: int | None) -> None:
        self.generation = 0
        self.exhausted = False
        self._plan = plan
        self._last_epoch = last_epoch
        self._target = (epoch, start)

    def jump(self, epoch: int, start: int) -> None:
        """Continue at another place; what is fetched already is of an older generation."""
        self.generation += 1
        self._target = (epoch, start)

    def __iter__(self) -> Iterator[BatchPlace]:
        while True:
            generation = self.generation
            epoch, start = self._target
            self._target = (epoch + 1, 0)
            # The plan of the loader as it is when fetching of this epoch begins.
            places = self._plan(epoch).places(epoch, start)
            place = next(places, None)
            if place is None:  # the stream ends with an epoch that has no batch
                self.exhausted = True
                return
            while place is not None:
                following = next(places, None)
                yield place._replace(is_last=following is None, generation=generation)
                if self.generation != generation:
                    break
                place = following
            else:
                if self._last_epoch is not None and epoch >= self._last_epoch:
                    self.exhausted = True
                    return
