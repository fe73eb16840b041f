"""How a batch is loaded: the user's dataset and collate function are called, with random numbers of (seed, epoch, position)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset, default_collate, get_worker_info

from torch_frame.data.order import hash_ints, splitmix64, splitmix64_range
from torch_frame.data.plan import BatchPlace
from torch_frame.data.rng import ALL_GENERATORS, LoadingRng, seed_all, seeder


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

    A generator that is not drawn from is not seeded, for seeding takes 7 us a sample. Which ones are drawn from is seen: in the
    first batch all are seeded and watched; later on, a batch in which another one turns out to have been drawn from is loaded
    again, with that one seeded too. The bits are those of seeding all generators for every sample, if a sample depends on its
    index and these generators only.

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

    def __getitems__(self, place: BatchPlace) -> Fetched:
        if place.epoch != self._epoch:
            self._begin_epoch(place.epoch)
        batch = None if self._tensors is None else _gathered(self._tensors, place.indices)
        if batch is None:
            batch = self._load_watched(place)
        return Fetched(batch, place, self.drawn)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._epoch_key = hash_ints(self._seed, epoch, 0xA5)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._tensors = None if self._single else _plain_tensors(self.dataset, self._collate_fn)

    def _load_watched(self, place: BatchPlace) -> Any:
        """Load the batch with the generators seeded that are drawn from."""
        if self._rng is None:
            self._rng = LoadingRng()
        with self._rng as rng:
            if self.drawn is None:
                return self._load(place, rng, learn=True)
            while True:
                rng.mark(ALL_GENERATORS & ~self.drawn)
                batch = self._load(place, rng)
                moved = rng.moved()
                if not moved:
                    return batch
                self.drawn |= moved  # not seen before: its numbers were not of this position

    def _load(self, place: BatchPlace, rng: LoadingRng, *, learn: bool = False) -> Any:
        """Call the user's code; to `learn` is to seed all generators and to note those that are drawn from."""
        key, drawn = self._epoch_key, 0
        seed = seeder(ALL_GENERATORS if self.drawn is None else self.drawn)
        if self._samples_are_asked_at_once:
            if seed is not None:
                seed(splitmix64(key, place.first))
            if learn:
                rng.mark()
            samples = self.dataset[place.indices] if self._single else self.dataset.__getitems__(place.indices)
        elif seed is None:
            samples, dataset = [], self.dataset
            for index in place.indices:  # a loop: a comprehension is a frame of its own, which signals would not know
                samples.append(dataset[index])
        else:
            samples, dataset = [], self.dataset
            numbers = splitmix64_range(key, place.first, len(place.indices))
            for number, index in zip(numbers, place.indices, strict=True):
                seed(number)
                if learn:
                    rng.mark()
                samples.append(dataset[index])
                if learn:
                    drawn |= rng.moved()
            if self._collate_fn is not default_collate:  # which draws nothing
                seed(hash_ints(key, place.first, 1))
                if learn:
                    rng.mark()
        batch = self._collate_fn(samples)
        if learn:
            self.drawn = drawn | rng.moved()
        return batch


def _plain_tensors(dataset: Any, collate_fn: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a TensorDataset that may be indexed a batch at a time; None for another dataset or collate function."""
    if type(dataset) is not TensorDataset or collate_fn is not default_collate:
        return None
    return dataset.tensors if all(map(_is_plain, dataset.tensors)) else None


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
    array = np.asarray(indices)
    if type(indices) is not list or array.dtype != np.int64 or array.ndim != 1:
        return None
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
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._epoch)
        key = hash_ints(self._seed, self._epoch, 0 if worker is None else worker.id, 0xC3)
        kept = contextlib.nullcontext() if worker is not None else LoadingRng()
        with kept:
            seed_all(key)
            samples = iter(self.dataset)
        sample, count = None, 0
        while True:
            with kept:
                seed_all(splitmix64(key, count))
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
        key = hash_ints(self._seed, self._epoch, 0 if worker is None else worker.id, 0x3C)
        with contextlib.nullcontext() if worker is not None else LoadingRng():
            seed_all(splitmix64(key, self._count))
            self._count += 1
            return self._collate_fn(samples)
