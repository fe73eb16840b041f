"""Which samples make a batch: an epoch's global order, cut into places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from torch_frame.data.order import FromSampler, Hashes, Order, Sequential, Shuffled


class BatchPlace(NamedTuple):
    """A batch before it is loaded: where it stands, and what it is made of. Sent to a worker as it is."""

    epoch: int
    first: int
    """Position in the global order of this rank's first sample."""
    stop: int
    """Position behind the batch's last sample on any rank: a run that has consumed it continues there."""
    indices: Any
    """A list of dataset indices; for a loader with batch_size=None the one index."""
    hashes: Hashes = (0, 0)
    """Of the epoch's indices before the batch and up to its end, if they come from a sampler."""
    is_last: bool = False
    """The epoch ends with it; told by endless streams only, which may look ahead."""
    generation: int = 0
    """Which `jump` of an endless stream it belongs to."""


class BatchPlan(Protocol):
    """The batches of each epoch.

    Attributes:
        num_samples: in an epoch, on all ranks together; of a user's own batches their number.
        kind: of the order: its class.
    """

    kind: str

    @property
    def num_samples(self) -> int: ...

    def __len__(self) -> int: ...

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        """This rank's batches from position `start` of the global order on; nothing is drawn before it is asked for."""
        ...


class SampleBatches:
    """Batches of consecutive positions; each rank has its part of a global batch of `world_size` times `batch_size`.

    The last, ragged global batch is split as evenly as it goes. If it has fewer samples than there are ranks, `short` says
    what happens: "wrap" gives the ranks without one a sample from the beginning of that batch, "drop" leaves the batch out.

    Args:
        order: of the samples.
        batch_size: on each rank.
        drop_last: leave a ragged last batch out.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        short: str = "wrap",
    ) -> None:
        self._order = order
        self.kind = type(order).__name__
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._short = short

    def __len__(self) -> int:
        whole, rest = divmod(len(self._order), self._batch_size * self._world_size)
        return whole + (rest > 0 and self._takes_ragged(rest))

    @property
    def num_samples(self) -> int:
        return len(self._order)

    def _takes_ragged(self, size: int) -> bool:
        return not self._drop_last and (size >= self._world_size or self._short == "wrap")

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        global_size = self._batch_size * self._world_size
        for batch, hashes in self._order.chunks(epoch, start, global_size):
            stop = start + len(batch)
            if len(batch) < global_size and not self._takes_ragged(len(batch)):
                return
            if self._world_size == 1:
                yield BatchPlace(epoch, start, stop, batch, hashes)
            else:
                own = self._own_part(len(batch))
                yield BatchPlace(epoch, start + own.start, stop, batch[own.start : own.stop], hashes)
            start = stop

    def _own_part(self, size: int) -> range:
        even, more = divmod(size, self._world_size)
        if even == 0 and self._rank >= more:  # fewer samples than ranks
            return range(self._rank % more, self._rank % more + 1)
        begin = self._rank * even + min(self._rank, more)
        return range(begin, begin + even + (self._rank < more))


class GivenBatches:
    """The batches of a user's own batch sampler, or the single indices of a loader with batch_size=None.

    Args:
        order: of batches (lists of indices) or of single indices.
        single: an element counts as one sample whatever it is; else it is a batch of as many as it has indices.
    """

    def __init__(self, order: Order, *, single: bool) -> None:
        self._order = order
        self.kind = type(order).__name__
        self._single = single

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_samples(self) -> int:
        return len(self._order)

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        position = first = start if self._single else 0  # a batch sampler's positions are known by drawing its batches
        for (element,), hashes in self._order.chunks(epoch, first, 1):
            stop = position + (1 if self._single else len(element))
            if position >= start:
                yield BatchPlace(epoch, position, stop, element, hashes)
            position = stop


def plan_of(loader: DataLoader[Any], seed: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
    """The batches that a loader describes as it is now, in an order of ours if its own is random."""
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
    """The order that a sampler describes as it is now: computed if it is one of torch's plain ones, else the sampler's own."""
    if type(sampler) is SequentialSampler:
        return Sequential(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return Shuffled(len(sampler), seed)
    return FromSampler(sampler, seed)
