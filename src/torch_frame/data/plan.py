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
    repeats: bool = False
    """Some of its samples are in the batches of two ranks, and the plan's `told` did not foresee it."""
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

    @property
    def told(self) -> str | None:
        """What happens to an epoch's last samples if they are fewer than the ranks; None if they are not, or it is not known."""
        ...

    def __len__(self) -> int: ...

    def num_left(self, position: int, num_dealt: int) -> int:
        """This rank's batches from a position on, behind which `num_dealt` of the loader's batches were given to all ranks."""
        ...

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        """This rank's batches from position `start` of the global order on; nothing is drawn before it is asked for."""
        ...


class SampleBatches:
    """Batches of consecutive positions; each rank has its part of a global batch of `world_size` times `batch_size`.

    The last, ragged global batch is split as evenly as it goes.

    Args:
        order: of the samples.
        batch_size: on each rank.
        drop_last: leave a ragged last batch out.
        short: if that batch has fewer samples than there are ranks, "wrap" gives the ranks without one a sample from the
            beginning of the batch, "drop" leaves it out.
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
        return self.num_left(0, 0)

    def num_left(self, position: int, num_dealt: int) -> int:
        whole, rest = divmod(max(len(self._order) - position, 0), self._batch_size * self._world_size)
        return whole + (rest > 0 and self._takes_ragged(rest))

    @property
    def num_samples(self) -> int:
        return len(self._order)

    @property
    def told(self) -> str | None:
        rest = _num_elements(self._order) % (self._batch_size * self._world_size)
        return None if self._drop_last else _told_of_short(rest, self._world_size, self._short)

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
                own = part_of(len(batch), self._rank, self._world_size)
                yield BatchPlace(epoch, start + own.start, stop, batch[own.start : own.stop], hashes)
            start = stop


def part_of(size: int, rank: int, world_size: int) -> range:
    """A rank's part of `size` samples, split as evenly as it goes; of fewer than there are ranks one, some of them twice.

    >>> [list(part_of(5, rank, 3)) for rank in range(3)], [list(part_of(2, rank, 3)) for rank in range(3)]
    ([[0, 1], [2, 3], [4]], [[0], [1], [0]])
    """
    even, more = divmod(size, world_size)
    if even == 0 and rank >= more:
        return range(rank % more, rank % more + 1)
    begin = rank * even + min(rank, more)
    return range(begin, begin + even + (rank < more))


class GivenBatches:
    """The batches of a user's own batch sampler, or the single indices of a loader with batch_size=None.

    Ranks are dealt one batch each. If fewer are left than there are ranks, their indices are split as evenly as it goes.

    Args:
        order: of batches (lists of indices) or of single indices.
        single: an element counts as one sample whatever it is; else it is a batch of as many as it has indices.
        short: if the last elements cannot be split, "wrap" gives some of them to two ranks, "drop" leaves them out. Of a user's
            sampler this is not foreseen, so its epoch may end a batch earlier than its length says.
    """

    def __init__(self, order: Order, *, single: bool, rank: int = 0, world_size: int = 1, short: str = "wrap") -> None:
        self._order = order
        self.kind = type(order).__name__
        self._single = single
        self._rank = rank
        self._world_size = world_size
        self._short = short
        self._is_foreseen = single and not isinstance(order, FromSampler)  # single indices, which cannot be split

    def __len__(self) -> int:
        return self.num_left(0, 0)

    def num_left(self, position: int, num_dealt: int) -> int:
        whole, rest = divmod(max(len(self._order) - (position if self._single else num_dealt), 0), self._world_size)
        return whole + (rest > 0 and not (self._is_foreseen and self._short == "drop"))

    @property
    def num_samples(self) -> int:
        return len(self._order)

    @property
    def told(self) -> str | None:
        rest = len(self._order) % self._world_size if self._is_foreseen else 0
        return _told_of_short(rest, self._world_size, self._short)

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        position = first = start if self._single else 0  # a batch sampler's positions are known by drawing its batches
        dealt: list[Any] = []
        begin, before = start, 0
        for (element,), hashes in self._order.chunks(epoch, first, 1):
            if position >= start:
                begin, before = (begin, before) if dealt else (position, hashes[0])
                dealt.append(element)
            position += self._size_of(element)
            if len(dealt) == self._world_size:
                yield self._own_place(epoch, begin, position, dealt, (before, hashes[1]))
                dealt = []
            after = hashes[1]
        if dealt and not (self._short == "drop" and self._is_short(dealt)):
            yield self._own_place(epoch, begin, position, dealt, (before, after))

    def _size_of(self, element: Any) -> int:
        return 1 if self._single else len(element)

    def _own_place(self, epoch: int, begin: int, stop: int, dealt: list[Any], hashes: Hashes) -> BatchPlace:
        """This rank's part of one batch for each rank, of the positions from `begin` to `stop`."""
        if self._can_be_split(dealt):
            indices = [index for element in dealt for index in element]
            part = part_of(len(indices), self._rank, self._world_size)
            return BatchPlace(
                epoch,
                begin + (0 if self._single else part.start),
                stop,
                indices[part.start : part.stop],
                hashes,
                repeats=self._is_short(dealt),
            )
        own = self._rank % len(dealt)
        first = begin + sum(map(self._size_of, dealt[:own]))
        return BatchPlace(
            epoch, first, stop, dealt[own], hashes, repeats=not self._is_foreseen and self._is_short(dealt)
        )

    def _can_be_split(self, dealt: list[Any]) -> bool:
        return len(dealt) < self._world_size and all(isinstance(element, list | tuple) for element in dealt)

    def _is_short(self, dealt: list[Any]) -> bool:
        """There is not something of its own for each rank."""
        num = sum(map(len, dealt)) if self._can_be_split(dealt) else len(dealt)
        return num < self._world_size


def _num_elements(order: Order) -> int:
    try:
        return len(order)
    except (TypeError, NotImplementedError):  # a sampler without a length
        return 0


def _told_of_short(rest: int, world_size: int, short: str) -> str | None:
    if not 0 < rest < world_size:
        return None
    what = f"The last batch of an epoch has {rest} sample{'s' * (rest > 1)} for {world_size} ranks"
    if short == "drop":
        return f"{what}, and is left out."
    return (
        f"{what}: each rank without one is given one that another rank has, which so counts more than once. "
        "DDP(short_batch='drop') leaves that batch out, drop_last=True any ragged one."
    )


def plan_of(loader: DataLoader[Any], seed: int, rank: int = 0, world_size: int = 1, short: str = "wrap") -> BatchPlan:
    """The batches that a loader describes as it is now, in an order of ours if its own is random."""
    if splits_by_itself(loader):
        rank, world_size = 0, 1
    if loader.batch_sampler is None:
        return GivenBatches(order_of(loader.sampler, seed), single=True, rank=rank, world_size=world_size, short=short)
    if type(loader.batch_sampler) is not BatchSampler:
        order = FromSampler(loader.batch_sampler, seed)
        return GivenBatches(order, single=False, rank=rank, world_size=world_size, short=short)
    sampler = loader.batch_sampler.sampler
    sizes = loader.batch_sampler.batch_size, loader.batch_sampler.drop_last
    return SampleBatches(order_of(sampler, seed), *sizes, rank=rank, world_size=world_size, short=short)


def splits_by_itself(loader: Any) -> bool:
    """A sampler of the loader gives each rank a part: torch's DistributedSampler, or one that knows its rank as that does."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return any(isinstance(sampler, DistributedSampler) or _knows_its_rank(sampler) for sampler in samplers)


def _knows_its_rank(sampler: Any) -> bool:
    names = {name.lstrip("_") for name in getattr(sampler, "__dict__", ())}
    return "rank" in names and not names.isdisjoint(("num_replicas", "world_size", "replicas"))


def order_of(sampler: Any, seed: int) -> Order:
    """The order that a sampler describes as it is now: computed if it is one of torch's plain ones, else the sampler's own."""
    if type(sampler) is SequentialSampler:
        return Sequential(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return Shuffled(len(sampler), seed)
    return FromSampler(sampler, seed)
