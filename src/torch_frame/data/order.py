"""In which order samples come: a pure function of (seed, epoch, position).

A position is a place in the epoch's global order, the same for every number of processes and workers. What follows from it:
any position is reached directly, an epoch begins without a pause, and a run stopped on 4 ranks goes on on 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from torch_frame.data.seeding import rng_state, seed_all, set_rng_state

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 16
CHUNK = 4096
"""Positions computed at a time: 0.1 us each, and no pause that anybody sees."""


def mix(*numbers: int) -> int:
    """A 64-bit hash of integers: splitmix64's finaliser (Steele, Lea, Flood 2014), chained.

    >>> mix(0, 1) == mix(0, 1) != mix(1, 0)
    True
    """
    value = 0
    for number in numbers:
        value = at(value, number)
    return value


def at(key: int, number: int) -> int:
    """The 64-bit number with this index in the sequence of a key: one step of splitmix64, 0.4 us."""
    value = (key + (number + 1) * _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


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
        self._keys = [np.uint64(mix(key, round)) for round in range(_ROUNDS)]

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


class Order(Protocol):
    """The global order of an epoch's samples."""

    def __len__(self) -> int: ...

    def indices(self, epoch: int, start: int) -> Iterator[Any]:
        """The indices from position `start` to the epoch's end."""
        ...


class Sequential:
    """0, 1, 2, ... in each epoch."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def indices(self, epoch: int, start: int) -> Iterator[int]:
        return iter(range(start, self._size))


class Shuffled:
    """Another permutation in each epoch.

    Args:
        size: of the dataset.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def indices(self, epoch: int, start: int) -> Iterator[int]:
        permutation = Permutation(self._size, key=mix(self._seed, epoch))
        size = 256  # the first batch comes at once
        while start < self._size:
            yield from permutation(range(start, min(start + size, self._size)))
            start, size = start + size, CHUNK


class FromSampler:
    """A torch sampler, or any iterable of indices, reproduced: it runs with random numbers of (seed, epoch).

    To begin at a position the sampler is run up to it; indices are drawn, no sample is loaded. The training's random numbers are
    not touched, and a sampler's own `generator` is seeded anew for each epoch. `set_epoch` is called where there is one.

    Args:
        sampler: WeightedRandomSampler, DistributedSampler, a user's own, a batch sampler, ...
        seed: of the run.
    """

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self._sampler = sampler
        self._seed = seed

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]  # asked; a TypeError says that there is none

    def indices(self, epoch: int, start: int) -> Iterator[Any]:
        seed = mix(self._seed, epoch, 0x5A)
        for depth, sampler in enumerate(_with_inner(self._sampler)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(mix(seed, depth) >> 1)
        numbers = _OwnRandomNumbers(seed)
        with numbers:
            running = iter(self._sampler)
        position = 0
        while True:
            with numbers:
                chunk = _taken(running, CHUNK)
            yield from chunk[max(start - position, 0) :]
            position += len(chunk)
            if len(chunk) < CHUNK:
                return


class _OwnRandomNumbers:
    """Inside `with`, the global generators of python, numpy and torch stand where they stood at the end of the last `with`."""

    def __init__(self, seed: int) -> None:
        outside = rng_state()
        seed_all(seed)
        self._inside = rng_state()
        set_rng_state(outside)

    def __enter__(self) -> None:
        self._outside = rng_state()
        set_rng_state(self._inside)

    def __exit__(self, *exception: object) -> None:
        self._inside = rng_state()
        set_rng_state(self._outside)


def _with_inner(sampler: Any) -> Iterator[Any]:
    """A sampler and those that it draws from: BatchSampler(RandomSampler(...)), wrappers of a user's."""
    seen: list[Any] = []
    while sampler is not None and not any(sampler is other for other in seen):
        seen.append(sampler)
        yield sampler
        inner = (getattr(sampler, name, None) for name in ("sampler", "batch_sampler"))
        sampler = next((candidate for candidate in inner if candidate is not None), None)


def _taken(iterator: Iterator[Any], count: int) -> list[Any]:
    return [index for _, index in zip(range(count), iterator, strict=False)]


def shard(size: int, rank: int, world_size: int) -> range:
    """This rank's part of `size` samples, for evaluation: all parts together are each sample once, without padding.

    >>> [list(shard(5, rank, 2)) for rank in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    return range(_begin(size, rank, world_size), _begin(size, rank + 1, world_size))


def _begin(size: int, rank: int, world_size: int) -> int:
    return rank * (size // world_size) + min(rank, size % world_size)
