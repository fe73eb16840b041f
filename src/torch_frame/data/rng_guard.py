"""The training's random numbers while a user's code loads data: kept, exchanged, and watched for who draws from them."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch

from torch_frame.data.rng import (
    ALL_GENERATORS,
    NUMPY,
    PYTHON,
    SEEDERS,
    TORCH,
    numpy_random,
    python_generator,
    seed_all,
    seed_numpy,
    seed_torch,
)


class LoadingRng:
    """The global generators of python, numpy and torch while a user's code loads data in this process: 12 us.

    Guarantees that afterwards they are where the training left them, whatever the user's code did, and tells which of them it has
    drawn from. NumPy's generator is exchanged for one of this object inside; python's and torch's stay in place, and are restored
    if they have moved. Where a generator stands is compared by its memory, which is a fifth of a microsecond to copy; its state
    would take 10 us (python) and 40 us (numpy).

    NumPy keeps every second number of `randn` beside the generator, and an exchange drops it. That number can only be read
    together with the generator's state, so a generator with a small state stands in meanwhile.

    Not reentrant: a dataset that loads from a loader of its own has another one of these.
    """

    def __init__(self) -> None:
        self._own_numpy = np.random.MT19937(0)
        self._marks: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._numpy_state = _with_small_state(numpy_random.get_state, False)  # legacy=False: a dictionary
        self._numpy = numpy_random.get_bit_generator()
        numpy_random.set_bit_generator(self._own_numpy)
        self._python = _where_python_is(python_generator)
        self._torch = torch.default_generator.get_state()
        return self

    def __exit__(self, *exception: object) -> None:
        numpy_random.set_bit_generator(self._numpy)
        if self._numpy_state["has_gauss"]:
            _with_small_state(numpy_random.set_state, self._numpy_state)
        if _where_python_is(python_generator) != self._python:
            _put_python(python_generator, self._python)
        torch.default_generator.set_state(self._torch)

    def mark(self, generators: int = ALL_GENERATORS) -> None:
        """Remember where these generators are."""
        self._marks = {generator: self._where(generator) for generator in SEEDERS if generator & generators}

    def seed_and_mark(self, generators: int, number: int) -> None:
        """Seed these generators once for a batch, and remember where they are then.

        Who reads a generator without moving it (`torch.initial_seed()`, a state that is put back) has numbers of the batch then.
        Python's generator is not seeded: restoring it afterwards would take 15 us.
        """
        if generators & NUMPY:
            seed_numpy(number)
        if generators & TORCH:
            seed_torch(number)
        self.mark(generators)

    def moved(self) -> int:
        """Those that are elsewhere than at the last `mark`: they have been drawn from, or seeded."""
        return sum(generator for generator, mark in self._marks.items() if self._where(generator) != mark)

    def _where(self, generator: int) -> Any:
        if generator == PYTHON:
            return _where_python_is(python_generator)
        if generator == TORCH:
            state = torch.default_generator.get_state()
            return ctypes.string_at(state.data_ptr(), state.numel())  # bytes; .numpy().tobytes() takes 2 us longer
        current = numpy_random.get_bit_generator()
        return _where_numpy_is(current) if current is self._own_numpy else object()  # exchanged by the user's code


class OwnRng:
    """Global generators of its own, for a sampler that is run piece by piece: 35 us a piece.

    What is drawn inside `with` continues where the last `with` ended, and leaves the training's numbers alone.

    Args:
        seed: 64 bits; the generators begin as `seed_all` has them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._python: Any = None  # nothing has been drawn yet
        self._torch = torch.empty(0)
        self._numpy = np.random.MT19937(0)
        self._numpy_state: Any = {"has_gauss": 0}

    def __enter__(self) -> None:
        self._outside = self._exchange_numpy(self._numpy, self._numpy_state)
        self._outer_python, self._outer_torch = random.getstate(), torch.default_generator.get_state()
        if self._python is None:
            seed_all(self._seed)
        else:
            random.setstate(self._python)
            torch.default_generator.set_state(self._torch)

    def __exit__(self, *exception: object) -> None:
        self._python, self._torch = random.getstate(), torch.default_generator.get_state()
        self._numpy, self._numpy_state = self._exchange_numpy(*self._outside)
        random.setstate(self._outer_python)
        torch.default_generator.set_state(self._outer_torch)

    @staticmethod
    def _exchange_numpy(generator: Any, state: Any) -> tuple[Any, Any]:
        """Make `generator` numpy's global one; returns the one before. States are kept for `randn`'s second number."""
        before = numpy_random.get_bit_generator(), _with_small_state(numpy_random.get_state, False)
        numpy_random.set_bit_generator(generator)
        if state["has_gauss"]:
            _with_small_state(numpy_random.set_state, state)
        return before


_small = np.random.SFC64(0)


def _with_small_state(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call numpy's `get_state` or `set_state` while a generator with a small state stands in for the global one.

    If numpy has no such attributes any more, the function copies the whole state: slower, but the same.
    """
    try:
        generator = numpy_random.mtrand._rand
        shown, generator._bit_generator = generator._bit_generator, _small
    except AttributeError:
        return function(argument)
    try:
        return function(argument)
    finally:
        generator._bit_generator = shown


_WORDS = struct.Struct("=624I")


_HEAD, _SIZE = object.__basicsize__, 4 + _WORDS.size


def _memory_of_python(generator: Any) -> Any:
    """An index and 624 words, as CPython keeps them behind the object's head; and the second number of `gauss`."""
    return ctypes.string_at(id(generator) + _HEAD, _SIZE), generator.gauss_next


def _memory_of_numpy(generator: Any) -> Any:
    """624 words and an index, as numpy shows them to C."""
    return ctypes.string_at(generator.ctypes.state_address, _SIZE)


def _state_of_numpy(generator: Any) -> Any:
    state = generator.state["state"]
    return state["key"].tobytes(), state["pos"]


def _python_memory_is_known() -> bool:
    """Whether `_memory_of_python` reads what `getstate` tells, of a generator that is drawn from."""
    generator = random.Random(1)
    size = type(generator).__base__.__basicsize__  # type: ignore[union-attr]
    if size < _HEAD + _SIZE:
        return False
    for _ in range(3):
        memory, _gauss = _memory_of_python(generator)
        words = (*_WORDS.unpack(memory[4:]), int.from_bytes(memory[:4], sys.byteorder))
        if words != generator.getstate()[1]:
            return False
        generator.random()
    return True


def _numpy_memory_is_known() -> bool:
    generator = np.random.MT19937(1)
    for _ in range(3):
        memory = _memory_of_numpy(generator)
        if (memory[:-4], int.from_bytes(memory[-4:], sys.byteorder)) != _state_of_numpy(generator):
            return False
        generator.random_raw()
    return True


_READS_PYTHONS_MEMORY = _python_memory_is_known()
_where_python_is: Callable[[Any], Any] = _memory_of_python if _READS_PYTHONS_MEMORY else random.Random.getstate
_where_numpy_is: Callable[[Any], Any] = _memory_of_numpy if _numpy_memory_is_known() else _state_of_numpy


def _put_python(generator: Any, where: Any) -> None:
    """Put the generator to where `_where_python_is` found it."""
    if _READS_PYTHONS_MEMORY:
        memory, gauss = where
        where = (3, (*_WORDS.unpack(memory[4:]), int.from_bytes(memory[:4], sys.byteorder)), gauss)
    generator.setstate(where)
