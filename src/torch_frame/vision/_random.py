"""Where augmentations draw from: python's `random`, as in 1.7, or a generator that is passed."""

from __future__ import annotations

import random
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = random.Random | np.random.Generator | torch.Generator | None
"""None: python's `random`, which torch-frame seeds for each sample (docs/data.md)."""


class Draws(Protocol):
    """The functions of python's `random` that are used here."""

    def random(self) -> float:
        """[0, 1)."""

    def uniform(self, a: float, b: float, /) -> float:
        """Between a and b."""

    def randint(self, a: int, b: int, /) -> int:
        """A whole number from a to b, both included."""


def draws(rng: Generator) -> Draws:
    """What draws from a generator.

    Raises:
        TypeError: something else than a generator.
    """
    given: Any = rng
    if given is None or given is random:
        return random
    if isinstance(rng, random.Random):
        return rng
    if isinstance(rng, np.random.Generator | torch.Generator):
        return _Drawing(rng)
    raise TypeError(
        f"rng is a {type(rng).__name__}; it has to be a random.Random, numpy.random.Generator or torch.Generator, or None for "
        "python's random."
    )


class _Drawing:
    """The functions of python's `random` over a generator of NumPy or torch."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def random(self) -> float:
        if isinstance(self.rng, torch.Generator):
            return float(torch.rand((), generator=self.rng, dtype=torch.float64, device=self.rng.device))
        return float(self.rng.random())

    def uniform(self, a: float, b: float, /) -> float:
        return a + (b - a) * self.random()

    def randint(self, a: int, b: int, /) -> int:
        if isinstance(self.rng, torch.Generator):
            return int(torch.randint(a, b + 1, (), generator=self.rng, device=self.rng.device))
        return int(self.rng.integers(a, b, endpoint=True))


def probability(p: float, name: str = "p") -> float:
    """The number itself.

    Raises:
        ValueError: it is not within 0..1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{name} is {p}; a probability is 0..1.")
    return p
