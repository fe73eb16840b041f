"""The training's random numbers while a user's code loads data: kept, exchanged, and watched for who draws from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch

from torch_frame.data import rng_memory
from torch_frame.data.rng import ALL_GENERATORS, NUMPY, PYTHON, TORCH, numpy_random, seed_all, seed_numpy, seed_torch


class LoadingRng:
    """The global generators of python, numpy and torch while a user's code loads data in this process: 3 us.

    Guarantees that afterwards they are where the training left them, whatever the user's code did, and tells which of them it has
    drawn from. NumPy's generator is exchanged for one of this object inside; python's and torch's stay in place, and are restored
    if they have moved. Their states, 2.5 and 5 kB, are copied only if the training has drawn from them since the last batch.

    NumPy keeps every second number of `randn` beside the generator, and an exchange drops it: it is kept here.

    Not reentrant: a dataset that loads from a loader of its own has another one of these.

    Attributes:
        seed_own_numpy: seeds numpy's generator that is in place inside with a 32-bit number, without what `np.random.seed` does
            around that: a number that is kept stays (`rng_memory.numpy_keeps_a_number`). None where numpy has no such function.
    """

    def __init__(self) -> None:
        self._own_numpy: Any = np.random.MT19937(0)
        own = getattr(self._own_numpy, "_legacy_seeding", None)
        self.seed_own_numpy: Callable[[int], object] | None = own if rng_memory.READS_GAUSS else None
        self._mark_of_numpy = rng_memory.mark_of_numpy(self._own_numpy)
        self._kept: dict[str, Any] | None = None
        self._python: Any = None  # copies, and the marks of where they were taken
        self._python_mark: Any = None
        self._torch = torch.empty(0)
        self._torch_mark: Any = None
        self._watched = 0
        self._marks: tuple[Any, Any, Any] = (None, None, None)

    def __enter__(self) -> Self:
        self._kept = rng_memory.get_small_state() if rng_memory.numpy_keeps_a_number() else None
        self._numpy = numpy_random.get_bit_generator()
        numpy_random.set_bit_generator(self._own_numpy)
        mark = rng_memory.mark_of_python()
        if mark != self._python_mark:
            self._python, self._python_mark = rng_memory.copy_python(), mark
        mark = rng_memory.mark_of_torch()
        if mark != self._torch_mark:
            self._torch, self._torch_mark = torch.default_generator.get_state(), mark
        return self

    def __exit__(self, *exception: object) -> None:
        numpy_random.set_bit_generator(self._numpy)
        if self._kept is not None:
            rng_memory.set_small_state(self._kept)
        if rng_memory.mark_of_python() != self._python_mark:
            rng_memory.put_python(self._python)
        if rng_memory.mark_of_torch() != self._torch_mark:
            torch.default_generator.set_state(self._torch)
            self._torch_mark = rng_memory.mark_of_torch()  # bytes that mean nothing may be others now

    def mark(self, generators: int = ALL_GENERATORS) -> None:
        """Remember where these generators are."""
        self._watched = generators
        self._marks = (
            rng_memory.mark_of_python() if generators & PYTHON else None,
            self._mark_of_numpy() if generators & NUMPY else None,
            rng_memory.mark_of_torch() if generators & TORCH else None,
        )

    def seed_and_mark(self, generators: int, number: int) -> None:
        """Seed these generators once for a batch, and remember where they are then.

        What only reads a generator (`torch.initial_seed()`, a state that is kept and restored) gives numbers of the batch then.
        Python's generator is not seeded: restoring it afterwards would take 15 us.
        """
        if generators & NUMPY:
            seed_numpy(number)
        if generators & TORCH:
            seed_torch(number)
        self.mark(generators)

    def moved(self) -> int:
        """Those that are elsewhere than at the last `mark`: they have been drawn from, or seeded."""
        watched, moved = self._watched, 0
        python, numpy, torch_ = self._marks
        if watched & PYTHON and rng_memory.mark_of_python() != python:
            moved = PYTHON
        if watched & NUMPY and (self._numpy_is_exchanged() or self._mark_of_numpy() != numpy):
            moved |= NUMPY
        if watched & TORCH and rng_memory.mark_of_torch() != torch_:
            moved |= TORCH
        return moved

    def _numpy_is_exchanged(self) -> bool:
        return numpy_random.get_bit_generator() is not self._own_numpy


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
        before = numpy_random.get_bit_generator(), rng_memory.get_small_state()
        numpy_random.set_bit_generator(generator)
        if state["has_gauss"]:
            rng_memory.set_small_state(state)
        return before
