"""Where the trainer's batches come from: a loader whose order and place in it are known, or one that can only be iterated."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from torch_frame.data.batches import StreamCollating, Streaming
from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.ordered import OrderedSource, Placed, Stateless
from torch_frame.data.starting import signals_held_back
from torch_frame.data.workers import Ending, no_second_warning, worker_settings
from torch_frame.distributed.strategy import Strategy

_logger = logging.getLogger("torch_frame")


class Source(Protocol):
    """What the trainer iterates.

    Attributes:
        exact: an epoch can be resumed inside, bitwise.
        is_ours: order and augmentation of a user's loader are replaced by ours.
        interruptible: a wait for a batch may be interrupted; what was fetched is fetched again.
        length: of an epoch, as (number, of what), or None if it is not known.
    """

    exact: bool
    is_ours: bool
    interruptible: bool
    seed: int

    @property
    def length(self) -> tuple[int, str] | None: ...

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, on this rank; None if it is not known."""
        ...

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
    rank, world_size = (0, 1) if strategy is None else (strategy.rank, strategy.world_size)
    if isinstance(loader, InfiniteDataLoader):
        own_seed = seed if loader.seed is None else loader.seed
        return OrderedSource(loader, own_seed, endless=True, last_epoch=last_epoch, rank=rank, world_size=world_size)
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return StatefulSource(loader)
    if isinstance(loader, Sequence):
        return SequenceSource(loader)
    if take_over and can_take_over(loader):
        assert isinstance(loader, DataLoader)
        if isinstance(loader.dataset, IterableDataset):
            return StreamSource(loader, seed)
        endless = loader.persistent_workers
        return OrderedSource(loader, seed, endless=endless, last_epoch=last_epoch, rank=rank, world_size=world_size)
    return ReplaySource(loader)


class SequenceSource(Stateless):
    """A list of batches: any of them is reached directly."""

    exact = True

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = self._loader = batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Placed]:
        batches = self._batches
        return zip(batches[start:] if start else batches, range(start + 1, len(batches) + 1), strict=False)

    @property
    def length(self) -> tuple[int, str]:
        return len(self._batches), "batches"


class ReplaySource(Stateless):
    """Any iterable: to resume inside an epoch, what was consumed is loaded again and skipped."""

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


class StatefulSource(Stateless):
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


class StreamSource(Stateless):
    """A DataLoader over an IterableDataset: its order is its own; random numbers are of (seed, epoch, worker, count).

    To resume inside an epoch, what was consumed is loaded again and skipped; the batches are those of the interrupted epoch
    if the dataset yields the same samples again.
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
            self._ending = None

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
        with no_second_warning(), signals_held_back(self._loader) as blocked:
            self._ending = Ending(self._loader, blocked)
            inner = DataLoader(
                streaming,
                batch_size=self._loader.batch_size,
                drop_last=self._loader.drop_last,
                collate_fn=StreamCollating(self._loader.collate_fn, self.seed, epoch),
                **worker_settings(self._loader, self.seed, self._ending),
            )
            stream = iter(inner)
            self._ending.workers = getattr(stream, "_workers", ())
        return islice(((batch, i) for i, batch in enumerate(stream, 1)), start, None)


def length_of(loader: Any) -> int | None:
    """len(loader), or None if it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _batches_of(loader: Any) -> tuple[int, str] | None:
    length = length_of(loader)
    return None if length is None else (length, "batches")


def can_take_over(loader: Iterable[Any]) -> bool:
    """A DataLoader that is iterated as torch's own class is."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and not (isinstance(loader.dataset, IterableDataset) and loader.persistent_workers)
    )
