"""Which samples make a batch, and how a batch is loaded: each sample with random numbers of its own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from torch_frame.data.order import Order, at, mix
from torch_frame.data.seeding import numpy_random, python_generator, seed_all


class BatchPlace(NamedTuple):
    """A batch before it is loaded: where it stands, and what it is made of. Sent to a worker as it is."""

    epoch: int
    first: int
    """Position in the global order of this rank's first sample."""
    stop: int
    """Position behind the batch's last sample on any rank: where a run goes on that has consumed it."""
    indices: Any
    """A list of dataset indices; for a loader with batch_size=None the one index."""
    is_last: bool
    """The epoch ends with it."""
    generation: int = 0
    """Which `jump` of an endless stream it belongs to."""


class Fetched(NamedTuple):
    """A loaded batch and its place."""

    batch: Any
    epoch: int
    stop: int
    is_last: bool
    generation: int


class BatchPlan(Protocol):
    """The batches of each epoch.

    Attributes:
        num_samples: in an epoch, on all ranks together; of a user's own batches their number.
    """

    @property
    def num_samples(self) -> int: ...

    def __len__(self) -> int: ...

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        """This rank's batches from position `start` of the global order on."""
        ...


class SampleBatches:
    """Batches of consecutive positions; each rank has its part of a global batch of `world_size` times `batch_size`.

    The last, ragged global batch is split as evenly as it goes. Where it has fewer samples than there are ranks, `short` says
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
        batches = _groups(self._order.indices(epoch, start), global_size)
        ahead = next(batches, [])
        while ahead:
            batch, ahead = ahead, next(batches, [])
            stop = start + len(batch)
            is_last = len(ahead) < global_size and not (ahead and self._takes_ragged(len(ahead)))
            if self._world_size == 1 and (len(batch) == global_size or not self._drop_last):
                yield BatchPlace(epoch, start, stop, batch, is_last)
            elif len(batch) == global_size or self._takes_ragged(len(batch)):
                own = self._own_part(len(batch))
                yield BatchPlace(epoch, start + own.start, stop, batch[own.start : own.stop], is_last)
            if is_last:
                return
            start = stop

    def _own_part(self, size: int) -> range:
        even, more = divmod(size, self._world_size)
        if even == 0 and self._rank >= more:  # fewer samples than ranks
            return range(self._rank % more, self._rank % more + 1)
        begin = self._rank * even + min(self._rank, more)
        return range(begin, begin + even + (self._rank < more))


def _groups(indices: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` indices, the last one with what is left. The first comes at once, the others are cut from longer lists."""
    count = size
    while taken := list(islice(indices, count)):
        for begin in range(0, len(taken), size):
            yield taken[begin : begin + size]
        count = size * max(1, 1024 // size)


class GivenBatches:
    """The batches of a user's own batch sampler, or the single indices of a loader with batch_size=None.

    Args:
        order: of batches (lists of indices) or of single indices.
        single: an element counts as one sample whatever it is; else it is a batch of as many as it has indices.
    """

    def __init__(self, order: Order, *, single: bool) -> None:
        self._order = order
        self._single = single

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_samples(self) -> int:
        return len(self._order)

    def places(self, epoch: int, start: int) -> Iterator[BatchPlace]:
        elements = self._order.indices(epoch, start if self._single else 0)
        position = start if self._single else 0
        element: Any = next(elements, _END)
        while element is not _END:
            following = next(elements, _END)
            stop = position + (1 if self._single else len(element))
            if position >= start:
                yield BatchPlace(epoch, position, stop, element, following is _END)
            element, position = following, stop


_END = object()


class Loading:
    """Loads a batch by its place, as the dataset of a torch DataLoader: in a worker or in the training process.

    Before each sample the global generators of python, numpy and torch are seeded from (seed, epoch, position), so that its
    augmentation does not depend on how many workers there are or what was loaded before. The collate function, and a dataset's
    `__getitems__`, are seeded once for the batch. In the training process its own random numbers are put back afterwards.

    Args:
        dataset: the user's; its `set_epoch` is called when a new epoch begins.
        collate_fn: the user's, or torch's own.
        single: an element is what the dataset is asked for (batch_size=None), not a list of such.
        seed: of the run.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], *, single: bool, seed: int) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._single = single
        self._seed = seed
        self._epoch: int | None = None
        self._samples_are_asked_at_once = single or getattr(dataset, "__getitems__", None) is not None

    def __getitems__(self, place: BatchPlace) -> Fetched:
        if place.epoch != self._epoch:
            self._begin_epoch(place.epoch)
        if get_worker_info() is None:
            with _TrainingNumbersKept():
                batch = self._load(place)
        else:
            batch = self._load(place)
        return Fetched(batch, place.epoch, place.stop, place.is_last, place.generation)

    def _load(self, place: BatchPlace) -> Any:
        epoch_key = self._epoch_key
        if self._samples_are_asked_at_once:
            seed_all(at(epoch_key, place.first))
            samples = self.dataset[place.indices] if self._single else self.dataset.__getitems__(place.indices)
        else:
            samples, dataset = [], self.dataset
            for position, index in enumerate(place.indices, place.first):
                seed_all(at(epoch_key, position))
                samples.append(dataset[index])
            if self._collate_fn is not default_collate:  # which draws nothing
                seed_all(mix(epoch_key, place.first, 1))
        return self._collate_fn(samples)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._epoch_key = mix(self._seed, epoch, 0xA5)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class Streaming(IterableDataset[Any]):
    """An IterableDataset whose samples have random numbers of (seed, epoch, worker, count).

    Args:
        dataset: the user's.
        seed: of the run.
        epoch: this object is of one epoch.
    """

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset = dataset
        self._seed = seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._epoch)
        key = mix(self._seed, self._epoch, 0 if worker is None else worker.id, 0xC3)
        kept = contextlib.nullcontext() if worker is not None else _TrainingNumbersKept()
        with kept:
            seed_all(key)
            samples = iter(self.dataset)
        sample, count = None, 0
        while True:
            with kept:
                seed_all(at(key, count))
                sample = next(samples, _END)
            if sample is _END:
                return
            yield sample
            count += 1

    def __len__(self) -> int:
        return len(self.dataset)


class StreamCollating:
    """The collate function of a `Streaming` dataset, with random numbers of (seed, epoch, worker, count of batches)."""

    def __init__(self, collate_fn: Callable[[Any], Any], seed: int, epoch: int) -> None:
        self._collate_fn = collate_fn
        self._seed = seed
        self._epoch = epoch
        self._count = 0

    def __call__(self, samples: Any) -> Any:
        worker = get_worker_info()
        key = mix(self._seed, self._epoch, 0 if worker is None else worker.id, 0x3C)
        with contextlib.nullcontext() if worker is not None else _TrainingNumbersKept():
            seed_all(at(key, self._count))
            self._count += 1
            return self._collate_fn(samples)


class _TrainingNumbersKept:
    """The random numbers of the training process are as they were, after a batch was loaded in it: 12 us.

    numpy's generator is exchanged for another while the batch is loaded. The second number of a pair that `np.random.randn` has
    drawn is held beside the generator and lost by an exchange. It is only told together with the generator's state, which takes
    30 to 70 us to copy: so while it is asked for, a generator with a small state stands in.
    """

    _of_loading: Any = None
    _stand_in: Any = None

    def __enter__(self) -> None:
        cls = _TrainingNumbersKept
        if cls._of_loading is None:
            cls._of_loading, cls._stand_in = np.random.MT19937(0), np.random.SFC64(0)
        self._numpy_state = self._with_stand_in(numpy_random.get_state, False)  # legacy=False: a dictionary
        self._numpy = numpy_random.get_bit_generator()
        nested = self._numpy is cls._of_loading  # a dataset that iterates a loader of its own
        numpy_random.set_bit_generator(np.random.MT19937(0) if nested else cls._of_loading)
        self._python = _python_numbers.kept()
        self._torch = torch.default_generator.get_state()

    def __exit__(self, *exception: object) -> None:
        numpy_random.set_bit_generator(self._numpy)
        if self._numpy_state["has_gauss"]:
            self._with_stand_in(numpy_random.set_state, self._numpy_state)
        random.setstate(self._python)
        torch.default_generator.set_state(self._torch)

    def _with_stand_in(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Where numpy has no such attributes any more, the function reads or sets the whole state: slower, but the same."""
        try:
            generator = numpy_random.mtrand._rand
            shown, generator._bit_generator = generator._bit_generator, self._stand_in
        except AttributeError:
            return function(argument)
        try:
            return function(argument)
        finally:
            generator._bit_generator = shown


class _PythonNumbers:
    """Reads the state of python's generator, which takes 9 us, only where it has changed.

    Whether it has is seen by drawing: what comes has to be what the state read last gives. Where it is not, the state is read
    and set back by the words that were drawn; where one was the first of a new block, index 0 of it gives the same numbers as
    the end of the block before.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._next_words: tuple[int, ...] = ()

    def kept(self) -> Any:
        """The state as it is now, for `random.setstate`. The generator itself stands somewhere else afterwards."""
        if self._state is None or not self._is_unchanged():
            self._state = random.getstate()
            self._next_words = tuple(random.getrandbits(32) for _ in range(3))
        return self._state

    def _is_unchanged(self) -> bool:
        if python_generator.gauss_next != self._state[2]:
            return False
        for drawn, word in enumerate(self._next_words, 1):
            if random.getrandbits(32) != word:
                version, words, gauss_next = random.getstate()
                random.setstate((version, (*words[:-1], max(words[-1] - drawn, 0)), gauss_next))
                return False
        return True


_python_numbers = _PythonNumbers()
