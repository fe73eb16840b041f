"""How a batch is loaded: the user's dataset and collate function are called, with random numbers of (seed, epoch, position)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from torch_frame.data.order import hash_ints, splitmix64, splitmix64_range
from torch_frame.data.plan import BatchPlace
from torch_frame.data.rng import ALL_GENERATORS, NUMPY, seed_all, seeder
from torch_frame.data.rng_guard import LoadingRng
from torch_frame.data.rng_memory import numpy_keeps_a_number
from torch_frame.signals.interruption import INTERRUPTION


class Fetched(NamedTuple):
    """A loaded batch, its place, and the generators that the dataset has been seen to draw from (see `Loading`)."""

    batch: Any
    place: BatchPlace
    drawn: int | None


class Loading:
    """Loads a batch by its place, as the dataset of a torch DataLoader: in a worker or in the training process.

    A sample's random numbers are a function of (seed, epoch, position): before each sample the generators that the dataset draws
    from are seeded, so that its augmentation does not depend on how many workers there are or what was loaded before. The collate
    function, and a dataset's `__getitems__`, are seeded once for the batch.

    A generator that is not drawn from is not seeded for each sample, for that takes 7 us. Which ones are drawn from is seen: in
    the first batch all are seeded and watched; later on, a batch in which another one turns out to have moved is loaded again,
    with that one seeded too. The bits are those of seeding all generators for every sample, if a sample depends on its index and
    on what it draws from these generators.

    A plain TensorDataset is indexed once for the batch, which gives torch's own bits.

    Args:
        dataset: the user's; its `set_epoch` is called when a new epoch begins.
        collate_fn: the user's, or torch's own.
        single: an element is what the dataset is asked for (batch_size=None), not a list of such.
        seed: of the run.
        drawn: the generators that the dataset is known to draw from; None: not known yet.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        *,
        single: bool,
        seed: int,
        drawn: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.drawn = drawn
        self._collate_fn = collate_fn
        self._single = single
        self._seed = seed
        self._epoch: int | None = None
        self._samples_are_asked_at_once = single or getattr(dataset, "__getitems__", None) is not None
        self._rng: LoadingRng | None = None  # made in the process that loads
        self._tensors: tuple[Tensor, ...] | None = None
        self._are_plain = False

    def __getitems__(self, place: BatchPlace) -> Fetched:
        if self._rng is None:
            self._rng = LoadingRng()
        outer, INTERRUPTION.here = INTERRUPTION.here, False  # a dataset may load from a loader of its own
        try:
            if place.epoch != self._epoch:
                self._begin_epoch(place.epoch, self._rng)
            batch = self._gathered(place.indices)
            if batch is None:
                batch = self._load_watched(place, self._rng)
        except StopIteration as error:
            raise RuntimeError(
                f"Loading the samples {place.indices} raised a StopIteration, which would have ended the epoch. "
                "Raise an IndexError for an index that does not exist."
            ) from error
        finally:
            INTERRUPTION.here = outer
        return Fetched(batch, place, self.drawn)

    def _begin_epoch(self, epoch: int, rng: LoadingRng) -> None:
        self._epoch = epoch
        self._epoch_key = hash_ints(self._seed, epoch, 0xA5)
        if hasattr(self.dataset, "set_epoch"):
            with rng:
                seed_all(hash_ints(self._epoch_key, 0x5E))
                self.dataset.set_epoch(epoch)

    def _gathered(self, indices: Any) -> list[Tensor] | None:
        """A batch of a plain TensorDataset; None if it has to be loaded sample by sample."""
        if type(self.dataset) is not TensorDataset or self._collate_fn is not default_collate or self._single:
            return None
        if self.dataset.tensors is not self._tensors:  # looked at once, and again if a script has set others
            self._tensors = self.dataset.tensors
            self._are_plain = _collates_plainly() and all(map(_is_plain, self._tensors))
        return _gathered(self._tensors, indices) if self._are_plain else None

    def _load_watched(self, place: BatchPlace, rng: LoadingRng) -> Any:
        """Load the batch with the generators seeded that are drawn from."""
        with rng:
            if self.drawn is None:
                return self._load(place, rng, learn=True)
            while True:
                rng.seed_and_mark(ALL_GENERATORS & ~self.drawn, splitmix64(self._epoch_key, place.first))
                batch = self._load(place, rng)
                moved = rng.moved()
                if not moved:
                    return batch
                self.drawn |= moved  # not seen before: its numbers were not those of each position

    def _load(self, place: BatchPlace, rng: LoadingRng, *, learn: bool = False) -> Any:
        """Call the user's code, which a signal may interrupt.

        Args:
            learn: seed all generators, and note those that are drawn from.
        """
        stop = INTERRUPTION
        key, drawn = self._epoch_key, 0
        seed = seeder(ALL_GENERATORS if self.drawn is None else self.drawn)
        if self._samples_are_asked_at_once:
            if seed is not None:
                seed(splitmix64(key, place.first))
            if learn:
                rng.mark()
            stop.begin()
            samples = self.dataset[place.indices] if self._single else self.dataset.__getitems__(place.indices)
            stop.here = False
        elif seed is None:
            stop.begin()
            samples = [self.dataset[index] for index in place.indices]
            stop.here = False
        elif self.drawn == NUMPY and rng.seed_own_numpy is not None:  # half of the time that it takes in general
            samples, dataset, seed_sample = [], self.dataset, rng.seed_own_numpy
            numbers = splitmix64_range(key, place.first, len(place.indices), bits=32)
            for number, index in zip(numbers, place.indices, strict=True):
                seed_sample(number)
                stop.begin()
                samples.append(dataset[index])
                stop.here = False
                if numpy_keeps_a_number():
                    seed_sample = seed  # which forgets that number
            if self._collate_fn is not default_collate:
                seed(hash_ints(key, place.first, 1))
        else:
            samples, dataset = [], self.dataset
            numbers = splitmix64_range(key, place.first, len(place.indices))
            for number, index in zip(numbers, place.indices, strict=True):
                seed(number)
                if learn:
                    rng.mark()
                stop.begin()
                samples.append(dataset[index])
                stop.here = False
                if learn:
                    drawn |= rng.moved()
            if self._collate_fn is not default_collate:  # which draws nothing
                seed(hash_ints(key, place.first, 1))
                if learn:
                    rng.mark()
        stop.begin()
        batch = self._collate_fn(samples)
        stop.here = False
        if learn:
            self.drawn = drawn | rng.moved()
        return batch


_TENSOR_COLLATE = default_collate_fn_map.get(Tensor)


def _collates_plainly() -> bool:
    """A script may have told default_collate of another way to make a batch of tensors."""
    return default_collate_fn_map.get(Tensor) is _TENSOR_COLLATE


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _gathered(tensors: tuple[Tensor, ...], indices: Any) -> list[Tensor] | None:
    """What default_collate makes of the samples at these indices; None if they are not a list of integers."""
    if type(indices) is not list or not {int}.issuperset(map(type, indices)):
        return None
    array = np.asarray(indices, dtype=np.int64)
    chosen = torch.from_numpy(array)
    return [tensor[chosen] for tensor in tensors]


_END = object()


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
        key = hash_ints(self._seed, self._epoch, 0 if worker is None else worker.id, 0xC3)
        kept = contextlib.nullcontext() if worker is not None else LoadingRng()
        with kept:
            seed_all(key)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(self._epoch)
            samples = _interruptible(iter, self.dataset)
        sample, count = None, 0
        while True:
            with kept:
                seed_all(splitmix64(key, count))
                sample = _interruptible(next, samples, _END)
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
        key = hash_ints(self._seed, self._epoch, 0 if worker is None else worker.id, 0x3C)
        with contextlib.nullcontext() if worker is not None else LoadingRng():
            seed_all(splitmix64(key, self._count))
            self._count += 1
            return _interruptible(self._collate_fn, samples)


def _interruptible(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function, which a signal may interrupt."""
    outer = INTERRUPTION.here
    INTERRUPTION.begin()
    try:
        return function(*arguments)
    finally:
        INTERRUPTION.here = outer
