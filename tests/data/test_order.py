"""An order is a permutation, another one in each epoch, and any position of it is reached directly."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from tests.small_data import Lazy, LazyOfEpoch, LazyOwn, LazyWithLen, draw_numpy, draw_python, draw_torch
from tests.small_runs import seed_everything
from torch_frame.data.order import CHUNK, FromSampler, Permutation, Sequential, Shuffled, hash_ints, shard

SEEDS = st.integers(0, 2**64 - 1)
LONG = CHUNK + 300


def elements_of(order: Any, epoch: int, start: int, size: int = 7) -> Iterator[Any]:
    """An order's elements, one by one."""
    return (element for chunk, _ in order.chunks(epoch, start, size) for element in chunk)


SAMPLERS: dict[str, Callable[[], Any]] = {
    "weighted": lambda: WeightedRandomSampler([1.0, 5.0, 0.1, 2.0], LONG),
    "weighted, own generator": lambda: WeightedRandomSampler([1.0, 5.0], LONG, generator=torch.Generator()),
    "replacement": lambda: RandomSampler(range(50), replacement=True, num_samples=LONG),
    "replacement, own generator": lambda: RandomSampler(range(50), True, LONG, torch.Generator()),
    "lazy, torch": lambda: LazyWithLen(draw_torch, 100, LONG),
    "lazy, numpy": lambda: LazyWithLen(draw_numpy, 100, LONG),
    "lazy, random": lambda: LazyWithLen(draw_python, 100, LONG),
    "lazy, no length": lambda: Lazy(draw_numpy, 100, LONG),
    "lazy, own generator": lambda: LazyOwn(100, LONG),
    "lists of indices": lambda: BatchSampler(RandomSampler(range(LONG)), 3, drop_last=False),
    "told of the epoch": lambda: LazyOfEpoch(100, LONG),
    "a list": lambda: list(range(LONG)),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def chi_square_bound(degrees: int, z: float = 5.0) -> float:
    """What a chi-square value exceeds with probability 3e-7 (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def numbers_of_training() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_every_epoch_of_every_small_size_is_a_permutation(seed: int) -> None:
    for size in range(70):
        order = Shuffled(size, seed)
        assert len(order) == size
        for epoch in range(3):
            assert sorted(elements_of(order, epoch, 0)) == list(range(size))


@given(st.integers(70, 30_000), SEEDS, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_a_large_size_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    indices = list(elements_of(Shuffled(size, seed), epoch, 0))
    assert np.array_equal(np.sort(indices), np.arange(size))


@given(st.integers(1, 10**12), SEEDS, st.data())
@settings(max_examples=40, deadline=None)
def test_a_huge_permutation_stays_in_range_and_repeats_nothing(size: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    indices = Permutation(size, key)(range(start, min(start + 500, size)))
    assert len(set(indices)) == len(indices) == min(500, size - start)
    assert 0 <= min(indices) <= max(indices) < size


@given(st.integers(0, 12_000), SEEDS, st.integers(0, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_any_position_reached_directly_equals_the_one_reached_by_iterating(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size))
    for order in (Shuffled(size, seed), Sequential(size)):
        assert list(elements_of(order, epoch, start)) == list(elements_of(order, epoch, 0))[start:]


@given(st.integers(30, 500), SEEDS)
@settings(max_examples=40, deadline=None)
def test_epochs_and_seeds_have_orders_of_their_own(size: int, seed: int) -> None:
    orders = [tuple(elements_of(Shuffled(size, seed), epoch, 0)) for epoch in range(10)]
    orders += [tuple(elements_of(Shuffled(size, (seed + other) % 2**64), 0, 0)) for other in (1, 2, 2**32)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_small_size_are_equally_likely(size: int) -> None:
    expected = 100
    draws = expected * math.factorial(size)
    counts = Counter(tuple(elements_of(Shuffled(size, seed=11), epoch, 0)) for epoch in range(draws))
    assert len(counts) == math.factorial(size)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < chi_square_bound(math.factorial(size) - 1)


@pytest.mark.parametrize("size", [6, 9, 12, 17])
def test_each_pair_of_indices_is_equally_likely_at_each_pair_of_positions(size: int) -> None:
    draws = 6000
    expected = draws / (size * (size - 1))
    orders = np.array([list(elements_of(Shuffled(size, seed), 0, 0)) for seed in range(draws)])
    for first, second in ((0, 1), (0, size - 1), (size // 2, size - 2)):
        counts = np.zeros((size, size))
        np.add.at(counts, (orders[:, first], orders[:, second]), 1)
        off_diagonal = counts[~np.eye(size, dtype=bool)]
        assert ((off_diagonal - expected) ** 2 / expected).sum() < chi_square_bound(len(off_diagonal) - 1)


def test_neighbours_in_the_order_are_not_neighbours_in_the_dataset() -> None:
    """Of n random places the next one follows by exactly 1 about once: a Poisson number of mean 1."""
    for size in (100, 1000, 10_000):
        steps = np.diff(list(elements_of(Shuffled(size, seed=5), 0, 0)))
        for step in (1, -1, 2, math.isqrt(size), -math.isqrt(size)):
            assert (steps == step).sum() <= 10


def test_a_position_far_inside_a_huge_epoch_is_the_same_from_two_sides() -> None:
    order, start = Shuffled(10_000_000, seed=0), 100_000 * 64
    far = list(islice(elements_of(order, 3, start), 100))
    assert list(islice(elements_of(order, 3, start - 5000), 5000, 5100)) == far
    assert len(set(far)) == 100


@given(st.lists(SEEDS, min_size=1, max_size=4))
def test_a_mixed_number_has_64_bits_and_depends_on_each_of_its_parts(numbers: list[int]) -> None:
    assert 0 <= hash_ints(*numbers) < 2**64
    for place in range(len(numbers)):
        changed = [(number + (i == place)) % 2**64 for i, number in enumerate(numbers)]
        assert hash_ints(*changed) != hash_ints(*numbers)


@each_sampler
def test_a_sampler_is_reproduced_at_any_position(name: str) -> None:
    seed_everything(1)
    whole = list(elements_of(FromSampler(SAMPLERS[name](), seed=7), 2, 0))
    assert len(whole) == (1 + (LONG - 1) // 3 if name == "lists of indices" else LONG)
    seed_everything(2)
    order = FromSampler(SAMPLERS[name](), seed=7)
    list(islice(elements_of(order, 0, 0), 10))
    for start in (0, 1, 255, CHUNK - 1, CHUNK, CHUNK + 1, LONG - 1, LONG):
        assert list(elements_of(order, 2, start)) == whole[start:]
    assert list(elements_of(FromSampler(SAMPLERS[name](), seed=7), 2, 0)) == whole


@each_sampler
def test_a_sampler_serves_another_order_in_each_epoch(name: str) -> None:
    order = FromSampler(SAMPLERS[name](), seed=7)
    orders = {str(list(elements_of(order, epoch, 0))) for epoch in range(3)}
    assert len(orders) == (1 if name == "a list" else 3)
    if name not in ("a list", "told of the epoch"):
        assert str(list(elements_of(FromSampler(SAMPLERS[name](), seed=8), 0, 0))) not in orders


@each_sampler
def test_a_sampler_leaves_the_training_numbers_alone_and_is_not_moved_by_them(name: str) -> None:
    undisturbed = list(elements_of(FromSampler(SAMPLERS[name](), seed=7), 0, 0))
    seed_everything(3)
    expected = [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(len(undisturbed))]
    seed_everything(3)
    indices, drawn = [], []
    for index in elements_of(FromSampler(SAMPLERS[name](), seed=7), 0, 0):
        indices.append(index)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn == expected
    assert indices == undisturbed


def test_a_sampler_runs_under_a_bit_generator_that_the_user_has_set() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(5))
    try:
        state = numbers_of_training()
        order = FromSampler(LazyWithLen(draw_numpy, 100, 20), seed=7)
        whole = list(elements_of(order, 0, 0))
        assert numbers_of_training() == state
        np.random.rand()
        assert list(elements_of(order, 0, 7)) == whole[7:]
    finally:
        np.random.set_bit_generator(before)


def test_a_sampler_inside_a_batch_sampler_is_reproduced_though_it_has_its_own_generator() -> None:
    def order() -> FromSampler:
        inner = RandomSampler(range(20), generator=torch.Generator().manual_seed(0))
        return FromSampler(BatchSampler(inner, 4, drop_last=False), seed=7)

    used = order()
    list(elements_of(used, 0, 0))
    assert list(elements_of(used, 1, 0)) == list(elements_of(order(), 1, 0))


def test_a_sampler_is_told_of_its_epoch_inside_a_batch_sampler_too() -> None:
    order = FromSampler(BatchSampler(LazyOfEpoch(10, 4), 4, drop_last=False), seed=7)
    assert [list(elements_of(order, epoch, 0)) for epoch in (0, 1)] == [[[0, 1, 2, 3]], [[7, 8, 9, 0]]]


def test_the_length_is_the_samplers_or_a_type_error() -> None:
    assert len(FromSampler(LazyWithLen(draw_torch, 10, 7), 0)) == 7
    with pytest.raises(TypeError):
        len(FromSampler(Lazy(draw_torch, 10, 7), 0))


@pytest.mark.parametrize("num", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_a_sampler_of_any_length_is_served_whole(num: int) -> None:
    assert list(elements_of(FromSampler(range(num), 0), 0, 0)) == list(range(num))


def test_an_error_in_a_sampler_surfaces_and_leaves_the_training_numbers_alone() -> None:
    def broken(size: int) -> int:
        torch.rand(1)
        raise OSError("the sampler is broken")

    before = numbers_of_training()
    with pytest.raises(OSError, match="the sampler is broken"):
        list(elements_of(FromSampler(Lazy(broken, 5, 5), 0), 0, 0))
    assert numbers_of_training() == before


@given(st.integers(0, 500), st.integers(1, 9))
def test_shards_for_evaluation_are_each_sample_once_and_equally_long(size: int, world_size: int) -> None:
    shards = [shard(size, rank, world_size) for rank in range(world_size)]
    assert [index for part in shards for index in part] == list(range(size))
    lengths = [len(part) for part in shards]
    assert max(lengths) - min(lengths) <= 1
