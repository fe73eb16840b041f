"""Where the trainer's batches come from: which source a loader gets, and those that are not ordered by us."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch.utils.data
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.loading import StreamCollating, Streaming
from torch_frame.data.order import hash_ints
from torch_frame.data.plan import splits_by_itself
from torch_frame.data.source_base import BatchAndPosition, Source, StatelessSource, length_of
from torch_frame.data.source_ordered import EndlessSource, OrderedSource
from torch_frame.data.workers import no_second_warning, worker_settings
from torch_frame.distributed.accelerate import is_accelerates_loader
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.signals.blocking import signals_blocked
from torch_frame.signals.interruption import INTERRUPTION
from torch_frame.signals.workers import WorkerShutdown

__all__ = ["Source", "length_of", "source_of"]

_logger = logging.getLogger("torch_frame")

_PIPES = tuple(
    getattr(torch.utils.data, name) for name in ("IterDataPipe", "MapDataPipe") if hasattr(torch.utils.data, name)
)
"""torch means to take them away one day."""


def source_of(
    loader: Iterable[Any],
    seed: int,
    strategy: Strategy | None = None,
    *,
    take_over: bool = True,
    last_epoch: int | None = None,
) -> Source:
    """How this loader is iterated: see the classes below.

    Args:
        loader: any iterable of batches.
        seed: of the run.
        strategy: says which part of a taken-over loader's batches this process has; None: all.
        take_over: give a plain DataLoader an order and augmentation of ours.
        last_epoch: nothing is fetched beyond it.
    """
    seed = operator.index(seed)
    is_split = strategy is None or strategy.world_size == 1 or strategy.own_shards or is_accelerates_loader(loader)
    rank, world_size = (0, 1) if is_split or strategy is None else (strategy.rank, strategy.world_size)
    part: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "short": "wrap" if strategy is None else strategy.short_batch,
    }
    if isinstance(loader, InfiniteDataLoader):
        own_seed = seed if loader.seed is None else loader.seed
        return EndlessSource(loader, own_seed, last_epoch=last_epoch, **part)
    takes_over = take_over and can_take_over(loader) and not _keeps_a_state(loader)
    if world_size > 1 and not splits_by_itself(loader):
        _check_can_be_split(loader, takes_over, world_size)
    if _keeps_a_state(loader):
        return StatefulSource(loader)
    if isinstance(loader, Sequence):
        return SequenceSource(loader)
    if takes_over:
        assert isinstance(loader, DataLoader)
        if isinstance(loader.dataset, IterableDataset):
            return StreamSource(loader, seed)
        return OrderedSource(loader, seed, **part)
    return ReplaySource(loader)


def _check_can_be_split(loader: Any, takes_over: bool, world_size: int) -> None:
    """Each rank gets a part of its own, and not all of the data.

    Raises:
        SettingError: for a loader that cannot be split.
    """
    is_stream = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    if takes_over and not is_stream:
        return
    what = "a DataLoader of an IterableDataset" if is_stream else f"a {type(loader).__name__}"
    what = "a DataLoader with take_over=False" if isinstance(loader, DataLoader) and not is_stream else what
    raise SettingError(
        f"data_loader is {what}, of which each of the {world_size} ranks would train on all. Pass a plain DataLoader of a "
        "map-style dataset, whose samples are split over the ranks, or one with a DistributedSampler; if it gives each rank a "
        "part of its own already, say so: strategy=DDP(own_shards=True), or own_shards=True of AccelerateTrainer."
    )


def can_take_over(loader: Iterable[Any]) -> bool:
    """A DataLoader that is iterated as torch's own class is, over a dataset for which torch itself does nothing more."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and not isinstance(loader.dataset, _PIPES)  # torch shuffles and splits these by itself
        and not (isinstance(loader.dataset, IterableDataset) and loader.persistent_workers)
    )


def _keeps_a_state(loader: Any) -> bool:
    """A loader that knows its own place, as torchdata's StatefulDataLoader does.

    accelerate's loaders have the methods in any case, and something behind them only with `use_stateful_dataloader`.
    """
    has_methods = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return has_methods and bool(getattr(loader, "use_stateful_dataloader", True))


class SequenceSource(StatelessSource):
    """A list of batches: any of them is reached directly."""

    def __init__(self, loader: Sequence[Any]) -> None:
        super().__init__(loader)
        self.interruptible = type(loader) not in (list, tuple)  # whose batches are there: none is waited for

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        batches = self._loader
        return zip(batches[start:] if start else batches, range(start + 1, len(batches) + 1), strict=False)


class ReplaySource(StatelessSource):
    """Any iterable: to resume inside an epoch, what was consumed is loaded again and skipped.

    An iterator cannot begin anew by itself: the one that a resumed run is given is taken as it is.
    """

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        self.before_order(epoch)
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        if is_accelerates_loader(self._loader):  # it counts its iterations from 0 in a resumed run, too
            self._loader.set_epoch(epoch)
        if not start:
            is_sent = isinstance(self._loader, DataLoader) and self._loader.num_workers > 0
            batches = _waited_for(iter(self._loader)) if is_sent else self._loader
            return ((batch, i) for i, batch in enumerate(batches, 1))
        if isinstance(self._loader, Iterator):
            _logger.warning(
                "Resuming inside an epoch over an iterator, which cannot be put back: the epoch begins anew with what it yields "
                "now, after %d batches that were trained.",
                start,
            )
            return ((batch, i) for i, batch in enumerate(self._loader, start + 1))
        _logger.warning(
            "Resuming inside an epoch of a loader whose order is its own: %d batches are loaded again and skipped, which takes "
            "its time, and they need not be those of the interrupted epoch. %s",
            start,
            self._advice(),
        )
        return islice(((batch, i) for i, batch in enumerate(self._loader, 1)), start, None)

    def _advice(self) -> str:
        if can_take_over(self._loader):
            return "A DataLoader with take_over=True has no such cost."
        return "A plain torch DataLoader, or one with state_dict() and load_state_dict(), has no such cost."


class StatefulSource(StatelessSource):
    """A loader that knows its own place (torchdata's StatefulDataLoader): it is saved and restored through its `state_dict`.

    Nothing is fetched ahead of it, so that its state is that of the batch that is trained.
    """

    interruptible = False  # it may have counted what was never handed out
    may_fetch_ahead = False

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._batches: Iterator[Any] | None = None  # of the epoch under way, until the loader has no more
        self._last: BatchAndPosition | None = None  # the batch that was handed out, until another one is asked for
        self._resumed: Iterator[Any] | None = None
        self._resumes_inside = False

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        batches, self._resumed = self._resumed, None
        if not start and self._resumes_inside:
            batches = None  # the rest of an epoch that limit_batches has ended early
        if batches is None and start and self._batches is not None:  # another train() goes on inside the epoch
            batches = self._batches
            if self._last is not None and self._last[1] > start:  # was not trained, for the step has failed
                batches = chain([self._last[0]], batches)
        self._batches = iter(self._loader) if batches is None else batches
        return self._noted(self._batches, start)

    def _noted(self, batches: Iterator[Any], start: int) -> Iterator[BatchAndPosition]:
        for index, batch in enumerate(batches, start + 1):
            self._last = batch, index
            yield self._last
            self._last = None
        self._batches = None

    def state_dict(self, position: int) -> dict[str, Any]:
        return {"loader": self._loader.state_dict(), "inside": self._batches is not None}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        if "loader" not in state_dict:  # saved by another kind of loader
            return
        self._loader.load_state_dict(state_dict["loader"])
        self._resumes_inside = state_dict.get("inside", False)
        if state_dict.get("inside", start > 0):
            # an iteration under way has drawn its random numbers before those of the checkpoint were saved
            self._resumed = iter(self._loader)


class StreamSource(StatelessSource):
    """A DataLoader over an IterableDataset: its order is its own; random numbers are of (seed, epoch, worker, count).

    To resume inside an epoch, what was consumed is loaded again and skipped; the batches are those of the interrupted epoch
    if the dataset yields the same samples again.
    """

    is_ours = True

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        super().__init__(loader)
        self.seed = seed
        self._shutdown: WorkerShutdown | None = None

    def close(self) -> None:
        """The workers of an iteration end with it; they may be ended by force from now on."""
        if self._shutdown is not None:
            self._shutdown.announce()
            self._shutdown = None

    def state_dict(self, position: int) -> dict[str, Any]:
        return {"num_workers": self._loader.num_workers, "batch_size": self._loader.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        if not start:
            return
        now = self.state_dict(start)
        was = {**now, **state_dict}
        if was["num_workers"] != now["num_workers"]:
            _logger.warning(
                "The epoch of an IterableDataset is resumed with %d workers, and began with %d: samples come in another order: "
                "some may be trained on twice in this epoch and others not at all.",
                now["num_workers"],
                was["num_workers"],
            )
        if was["batch_size"] != now["batch_size"]:
            _logger.warning(
                "The epoch of an IterableDataset is resumed with batches of %s, and began with batches of %s: %d of today's are "
                "skipped, so some samples are trained on twice in this epoch, or others not at all.",
                now["batch_size"],
                was["batch_size"],
                start,
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        if start:
            _logger.warning(
                "Resuming inside an epoch of an IterableDataset: %d batches are loaded again and skipped, which takes its time.",
                start,
            )
        streaming = Streaming(self._loader.dataset, self.seed, epoch)
        self.close()
        with no_second_warning(), signals_blocked(self._loader) as blocked:
            self._shutdown = WorkerShutdown(self._loader, blocked)
            inner = DataLoader(
                streaming,
                batch_size=self._loader.batch_size,
                drop_last=self._loader.drop_last,
                collate_fn=StreamCollating(self._loader.collate_fn, self.seed, epoch),
                **worker_settings(self._loader, hash_ints(self.seed, epoch), self._shutdown),
            )
            stream = iter(inner)
            self._shutdown.workers = getattr(stream, "_workers", ())
        batches = _waited_for(stream) if self._loader.num_workers > 0 else stream
        return islice(((batch, i) for i, batch in enumerate(batches, 1)), start, None)


def _waited_for(stream: Iterator[Any]) -> Iterator[Any]:
    """What workers send; waiting for it may be interrupted."""
    while True:
        INTERRUPTION.begin()
        try:
            batch = next(stream, _END)
        finally:
            INTERRUPTION.here = False
        if batch is _END:
            return
        yield batch


_END = object()
