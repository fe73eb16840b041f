"""While data is loaded the training's random numbers are kept, and it is seen which generators are drawn from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from torch_frame.data import rng_memory
from torch_frame.data.rng import ALL_GENERATORS, NUMPY, PYTHON, TORCH, rng_state, seed_all
from torch_frame.data.rng_guard import LoadingRng


@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 311, 312, 313, 623, 624, 625, 1248])
def test_the_trainings_numbers_are_kept_however_many_it_draws_between_batches(drawn: int) -> None:
    """Independent generators draw the same numbers, and never load a batch."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    python, numpy, torchs = random.Random(5), np.random.RandomState(5), torch.Generator().manual_seed(5)
    rng = LoadingRng()
    for turn in range(100):
        with rng:
            if turn % 3:
                seed_all(turn)
                random.gauss(0, 1), np.random.randn(), torch.rand(turn)
        for _ in range(drawn):
            assert random.getrandbits(32) == python.getrandbits(32)
        if turn % 5 == 0:  # the second numbers of pairs are held beside the states
            assert random.gauss(0, 1) == python.gauss(0, 1)
            assert np.random.randn() == numpy.randn()
        assert torch.rand(1) == torch.rand(1, generator=torchs)
    assert [random.random() for _ in range(700)] == [python.random() for _ in range(700)]
    assert list(np.random.rand(700)) == list(numpy.rand(700))


DRAWS: dict[str, tuple[int, Any]] = {
    "nothing": (0, lambda: None),
    "python": (PYTHON, random.random),
    "python's bits": (PYTHON, lambda: random.getrandbits(1)),
    "python, shuffled": (PYTHON, lambda: random.shuffle([1, 2])),
    "python, seeded": (PYTHON, lambda: random.seed(3)),
    "python, a whole block": (PYTHON, lambda: [random.getrandbits(32) for _ in range(624)]),
    "numpy": (NUMPY, np.random.rand),
    "numpy's normal": (NUMPY, np.random.randn),
    "numpy, a whole block": (NUMPY, lambda: np.random.bytes(4 * 624)),
    "numpy, seeded": (NUMPY, lambda: np.random.seed(3)),
    "numpy, exchanged": (NUMPY, lambda: np.random.set_bit_generator(np.random.PCG64(1))),  # type: ignore[attr-defined]
    "torch": (TORCH, lambda: torch.rand(1)),
    "torch, seeded": (TORCH, lambda: torch.manual_seed(3)),
    "torch, forked": (0, lambda: torch.random.fork_rng(devices=[])),
    "own generators": (0, lambda: (random.Random(1).random(), np.random.default_rng(1).random())),
    "all": (ALL_GENERATORS, lambda: (random.random(), np.random.rand(), torch.rand(1))),
}


@pytest.mark.parametrize("peek", [True, False], ids=["by memory", "by state"])
@pytest.mark.parametrize(("expected", "draw"), DRAWS.values(), ids=DRAWS)
def test_it_is_seen_which_generators_have_been_drawn_from(
    expected: int, draw: Any, peek: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not peek:
        compare_states(monkeypatch)
    before = rng_state()
    for _ in range(2):
        with LoadingRng() as rng:
            rng.mark()
            draw()
            assert rng.moved() == expected
            rng.mark(ALL_GENERATORS & ~expected)
            draw()
            assert rng.moved() == 0, "only what was marked"
    assert str(rng_state()) == str(before)


def test_memory_is_read_on_this_python_numpy_and_torch() -> None:
    assert rng_memory.READS_PYTHON
    assert rng_memory.READS_NUMPY
    assert rng_memory.READS_GAUSS
    assert rng_memory.READS_TORCH


@pytest.mark.parametrize("peek", [True, False], ids=["by memory", "by state"])
def test_it_is_seen_whether_numpy_keeps_a_number(peek: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not peek:
        compare_states(monkeypatch)
    with LoadingRng():
        np.random.seed(1)
        assert not rng_memory.numpy_keeps_a_number()
        np.random.randn()
        assert rng_memory.numpy_keeps_a_number()
        np.random.randn()
        assert not rng_memory.numpy_keeps_a_number()


@pytest.mark.parametrize("peek", [True, False], ids=["by memory", "by state"])
def test_torchs_second_normal_number_is_kept_too(peek: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used up without a word of the state being moved."""
    if not peek:
        compare_states(monkeypatch)
    torch.manual_seed(5)
    alone = torch.Generator().manual_seed(5)
    rng = LoadingRng()
    for turn in range(20):
        with rng:
            rng.mark()
            assert rng.moved() == 0
            torch.randn(1, dtype=torch.float64)
            assert rng.moved() == TORCH
            for _ in range(turn % 3):
                torch.randn(1)
        assert torch.randn(1, dtype=torch.float64) == torch.randn(1, dtype=torch.float64, generator=alone)


def compare_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Python, a numpy and a torch whose memory is not known."""
    monkeypatch.setattr(rng_memory, "READS_PYTHON", False)
    monkeypatch.setattr(rng_memory, "READS_NUMPY", False)
    monkeypatch.setattr(rng_memory, "READS_GAUSS", False)
    monkeypatch.setattr(rng_memory, "_gauss", None)
    monkeypatch.setattr(rng_memory, "mark_of_python", random.getstate)
    monkeypatch.setattr(rng_memory, "mark_of_torch", rng_memory._bytes_of_torch)
