"""In which order samples come: a pure function of (seed, epoch, position).

A position is a place in the epoch's global order, the same for every number of processes and workers. What follows from it:
any position is reached directly, an epoch begins without a pause, and a run that was stopped on 4 ranks continues on 2.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torch_frame.data.rng_guard import OwnRng

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 16
CHUNK = 4096
"""Positions computed at a time: 0.1 us each, and no pause that anybody sees."""


def hash_ints(*numbers: int) -> int:
    """A 64-bit hash of integers: splitmix64's finaliser (Steele, Lea, Flood 2014), chained.

    >>> hash_ints(0, 1) == hash_ints(0, 1) != hash_ints(1, 0)
    True
    """
    value = 0
    for number in numbers:
        value = splitmix64(value, number)
    return value


def splitmix64(key: int, index: int) -> int:
    """The 64-bit number with this index in the sequence of a key: one step of splitmix64, 0.4 us."""
    value = (key + (index + 1) * _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def splitmix64_range(key: int, first: int, count: int, bits: int = 64) -> list[int]:
    """The lowest bits of `splitmix64` of `count` indices from `first` on: 5 us and little more for each, so it pays from 40 on.

    >>> splitmix64_range(7, 2, 50) == [splitmix64(7, index) for index in range(2, 52)]
    True
    """
    if count < 40:
        return [splitmix64(key, index) & (1 << bits) - 1 for index in range(first, first + count)]
    indices = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    hashed = _hashed(indices * np.uint64(_GOLDEN) + np.uint64(key))
    numbers: list[int] = (hashed & np.uint64((1 << bits) - 1)).tolist()
    return numbers


class Permutation:
    """A random permutation of 0..size-1 that is computed where it is asked for, never held.

    A generalised Feistel cipher (Black and Rogaway 2002) on a x b >= size, with a and b close to its root, walking on where it
    leaves the range. Any position costs the same: no `randperm`, which takes 290 ms for 10 million.

    Args:
        size: how many.
        key: which permutation.

    >>> sorted(Permutation(5, key=1)(range(0, 5)))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        root = int(np.ceil(np.sqrt(max(size, 1))))
        self._sizes = (np.uint64(root), np.uint64(-(-max(size, 1) // root)))
        self._keys = [np.uint64(hash_ints(key, round)) for round in range(_ROUNDS)]

    def __call__(self, positions: range) -> list[int]:
        """The indices at these positions."""
        values = self._permuted(np.arange(positions.start, positions.stop, dtype=np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._permuted(values[outside])
            outside = values >= self.size
        indices: list[int] = values.tolist()
        return indices

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        this, other = self._sizes
        right: np.ndarray = values // this
        left: np.ndarray = values - right * this
        for key in self._keys:
            rounded = _hashed(right ^ key)
            rounded -= rounded // this * this  # % takes several times as long
            rounded += left  # (... + left) % this, where less than twice `this` comes in: what is below 0 wraps around
            left, right = right, np.minimum(rounded, rounded - this)
            this, other = other, this
        permuted: np.ndarray = right * this + left
        return permuted  # after an even number of rounds the sizes are where they were


_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _hashed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, in place; products wrap around, as they do there."""
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
    return values


Hashes = tuple[int, int]
"""A hash of all elements of an epoch before some, and one of all up to the last of these. (0, 0): a pure function's."""

Chunk = tuple[list[Any], Hashes]
"""Elements of an order, and the hashes around them."""

_NO_HASHES = (0, 0)


class Order(Protocol):
    """The global order of an epoch's elements.

    Attributes:
        is_pure: a function of (seed, epoch, position) that calls nothing of the user's.
    """

    is_pure: bool

    def __len__(self) -> int: ...

    def chunks(self, epoch: int, start: int, size: int) -> Iterator[Chunk]:
        """The elements from position `start` to the epoch's end, in lists of `size`; the last one holds what is left.

        Nothing of the user's is called before a chunk is asked for.
        """
        ...


class Sequential:
    """0, 1, 2, ... in each epoch."""

    is_pure = True

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def chunks(self, epoch: int, start: int, size: int) -> Iterator[Chunk]:
        return (
            (list(range(first, min(first + size, self._size))), _NO_HASHES) for first in range(start, self._size, size)
        )


class Shuffled:
    """Another permutation in each epoch.

    Args:
        size: of the dataset.
        seed: of the run.
    """

    is_pure = True

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def chunks(self, epoch: int, start: int, size: int) -> Iterator[Chunk]:
        permutation = Permutation(self._size, key=hash_ints(self._seed, epoch))
        at_a_time = max(256 // size, 1) * size  # the first batch comes at once
        while start < self._size:
            indices = permutation(range(start, min(start + at_a_time, self._size)))
            yield from ((indices[first : first + size], _NO_HASHES) for first in range(0, len(indices), size))
            start, at_a_time = start + at_a_time, max(CHUNK // size, 1) * size


class FromSampler:
    """A torch sampler, or any iterable of indices, run with random numbers of (seed, epoch), as far as it is asked for.

    To begin at a position the sampler is run up to it; indices are drawn, no sample is loaded. The training's random numbers are
    not touched, and a sampler's own `generator` is seeded anew for each epoch. `set_epoch` is called if there is one.

    Args:
        sampler: WeightedRandomSampler, DistributedSampler, a user's own, a batch sampler, ...
        seed: of the run.
    """

    is_pure = False

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self._sampler = sampler
        self._seed = seed

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]  # asked; a TypeError says that there is none

    def chunks(self, epoch: int, start: int, size: int) -> Iterator[Chunk]:
        seed = hash_ints(self._seed, epoch, 0x5A)
        for depth, sampler in enumerate(_with_inner(self._sampler)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(hash_ints(seed, depth) >> 1)
        numbers: contextlib.AbstractContextManager[object] = OwnRng(seed)
        with numbers:
            elements = iter(self._sampler)
            skipped = list(islice(elements, start))
            chunk = list(islice(elements, size))
        if type(self._sampler) in _DRAW_AT_ONCE:
            numbers = contextlib.nullcontext()
        value = _hash_of(skipped, 0)
        while chunk:
            before, value = value, _hash_of(chunk, value)
            yield chunk, (before, value)
            with numbers:
                chunk = list(islice(elements, size))


def _hash_of(elements: list[Any], value: int) -> int:
    """The hash of all elements so far, however they are cut into lists; the same in every process."""
    if not elements:
        return value
    if not _SIMPLE.issuperset(map(type, elements)):
        elements = [_simple(element) for element in elements]
    return zlib.crc32(f"{repr(elements)[1:-1]}, ".encode(), value)


_SIMPLE = {int, str, float, bool}


def _simple(element: Any) -> Any:
    """An index in types whose text is all that they hold; of an object of a user's kind its class only."""
    if type(element) in _SIMPLE:
        return element
    if isinstance(element, Tensor | np.ndarray | np.generic):
        return element.tolist()
    if isinstance(element, list | tuple):
        return [_simple(item) for item in element]
    return type(element).__qualname__


_DRAW_AT_ONCE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Samplers that draw from the global generators before they yield, and not later."""


def may_vary(sampler: Any) -> bool:
    """Its length may be another one in each epoch: it is a user's, or inside one."""
    return any(type(one) not in (*_DRAW_AT_ONCE, BatchSampler) for one in _with_inner(sampler))


def _with_inner(sampler: Any) -> Iterator[Any]:
    """A sampler and those that it draws from: BatchSampler(RandomSampler(...)), wrappers of a user's."""
    seen: list[Any] = []
    while sampler is not None and not any(sampler is other for other in seen):
        seen.append(sampler)
        yield sampler
        inner = (getattr(sampler, name, None) for name in ("sampler", "batch_sampler"))
        sampler = next((candidate for candidate in inner if candidate is not None), None)


def shard(size: int, rank: int, world_size: int) -> range:
    """This rank's part of `size` samples, for evaluation: all parts together are each sample once, without padding.

    >>> [list(shard(5, rank, 2)) for rank in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    return range(_begin(size, rank, world_size), _begin(size, rank + 1, world_size))


def _begin(size: int, rank: int, world_size: int) -> int:
    return rank * (size // world_size) + min(rank, size % world_size)
