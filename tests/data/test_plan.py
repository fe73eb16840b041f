"""Batches: ranks partition each epoch, at every size, and a run goes on with another number of them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_frame.data.order import FromSampler, Sequential, Shuffled
from torch_frame.data.plan import BatchPlace, GivenBatches, SampleBatches
from torch_frame.data.source_ordered import _EndlessPlaces

SIZES = st.integers(0, 150)


def elements_of(order: Any, epoch: int, start: int, size: int = 7) -> list[Any]:
    """An order's elements, one by one."""
    return [element for chunk, _ in order.chunks(epoch, start, size) for element in chunk]


BATCH_SIZES = st.integers(1, 7)
WORLD_SIZES = st.integers(1, 5)
SHORT = st.sampled_from(["wrap", "drop"])


def of_all_ranks(
    order: Any, batch_size: int, world_size: int, epoch: int = 0, start: int = 0, **kwargs: Any
) -> list[tuple[BatchPlace, ...]]:
    """The global batches: for each, the places of all ranks, which have to be equally many."""
    plans = [SampleBatches(order, batch_size, rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)]
    by_rank = [list(plan.places(epoch, start)) for plan in plans]
    assert len({len(places) for places in by_rank}) == 1
    if start == 0:
        assert {len(plan) for plan in plans} == {len(by_rank[0])}
    return list(zip(*by_rank, strict=True))


@given(SIZES, BATCH_SIZES, WORLD_SIZES, st.booleans(), SHORT, st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_the_ranks_partition_each_epoch(
    size: int, batch_size: int, world_size: int, drop_last: bool, short: str, epoch: int
) -> None:
    order = Shuffled(size, seed=1)
    batches = of_all_ranks(order, batch_size, world_size, epoch, drop_last=drop_last, short=short)
    served = Counter(index for places in batches for place in places for index in place.indices)

    rest = size % (batch_size * world_size)
    left_out = rest if drop_last or (rest < world_size and short == "drop") else 0
    assert len(served) == size - left_out
    expected = list(elements_of(order, epoch, 0))[: size - left_out]
    assert set(served) == set(expected)
    twice = world_size - rest if 0 < rest < world_size and not left_out else 0
    assert served.total() == size - left_out + twice
    if twice:  # those of the last batch alone, as evenly as it goes
        counts = [served[index] for index in expected[-rest:]]
        assert sum(counts) == world_size
        assert max(counts) - min(counts) <= 1


@given(SIZES, BATCH_SIZES, WORLD_SIZES, st.booleans(), SHORT)
@settings(max_examples=200, deadline=None)
def test_a_ragged_end_is_split_as_evenly_as_it_goes(
    size: int, batch_size: int, world_size: int, drop_last: bool, short: str
) -> None:
    batches = of_all_ranks(Shuffled(size, seed=2), batch_size, world_size, drop_last=drop_last, short=short)
    for places in batches:
        sizes = [len(place.indices) for place in places]
        assert max(sizes) - min(sizes) <= 1
        assert 1 <= min(sizes) <= max(sizes) <= batch_size
    for places in batches[:-1]:
        assert {len(place.indices) for place in places} == {batch_size}
    if drop_last and batches:
        assert {len(place.indices) for place in batches[-1]} == {batch_size}


@given(SIZES, BATCH_SIZES, WORLD_SIZES, st.booleans(), SHORT)
@settings(max_examples=100, deadline=None)
def test_in_an_endless_stream_the_last_batch_of_an_epoch_and_no_other_says_so(
    size: int, batch_size: int, world_size: int, drop_last: bool, short: str
) -> None:
    batches = of_all_ranks(Sequential(size), batch_size, world_size, drop_last=drop_last, short=short)
    places = [[place[rank] for place in batches] for rank in range(world_size)]
    for rank in range(world_size):
        plan = SampleBatches(Sequential(size), batch_size, drop_last, rank, world_size, short)
        stream = list(_EndlessPlaces(lambda epoch, plan=plan: plan, 0, 0, last_epoch=1)) if batches else []
        assert [place.is_last for place in stream] == ([False] * (len(batches) - 1) + [True]) * 2 * bool(batches)
        assert [place._replace(is_last=False) for place in stream[: len(batches)]] == places[rank]


@given(SIZES, BATCH_SIZES, WORLD_SIZES, SHORT)
@settings(max_examples=200, deadline=None)
def test_positions_are_those_of_the_global_order_at_every_world_size(
    size: int, batch_size: int, world_size: int, short: str
) -> None:
    order = Shuffled(size, seed=3)
    expected = list(elements_of(order, 0, 0))
    batches = of_all_ranks(order, batch_size, world_size, short=short)
    for places in batches:
        assert len({place.stop for place in places}) == 1  # where a run goes on is the same on all ranks
        for place in places:
            assert place.indices == expected[place.first : place.first + len(place.indices)]
            assert place.first + len(place.indices) <= place.stop
    stops = [0] + [places[0].stop for places in batches]
    assert all(second - first == batch_size * world_size for first, second in list(pairwise(stops))[:-1])


@given(SIZES, BATCH_SIZES, WORLD_SIZES, st.booleans(), SHORT, st.data())
@settings(max_examples=200, deadline=None)
def test_any_batch_is_reached_directly(
    size: int, batch_size: int, world_size: int, drop_last: bool, short: str, data: st.DataObject
) -> None:
    order = Shuffled(size, seed=4)
    kwargs: dict[str, Any] = {"drop_last": drop_last, "short": short}
    batches = of_all_ranks(order, batch_size, world_size, 1, **kwargs)
    done = data.draw(st.integers(0, len(batches)))
    start = batches[done - 1][0].stop if done else 0
    assert of_all_ranks(order, batch_size, world_size, 1, start, **kwargs) == batches[done:]


@given(SIZES, BATCH_SIZES, WORLD_SIZES, st.booleans(), SHORT, st.data())
@settings(max_examples=200, deadline=None)
def test_how_many_batches_are_left_is_known_from_any_position(
    size: int, batch_size: int, world_size: int, drop_last: bool, short: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size))
    left = list(SampleBatches(Shuffled(size, seed=4), batch_size, drop_last, 0, world_size, short).places(0, start))
    assert SampleBatches(Sequential(size), batch_size, drop_last, 0, world_size, short).num_left(start, 0) == len(left)


@pytest.mark.parametrize(
    ("size", "world_size", "drop_last", "short", "told"),
    [
        (9, 2, False, "wrap", "has 1 sample for 2 ranks: each rank without one is given one that another rank has"),
        (18, 4, False, "wrap", "has 2 samples for 4 ranks: .*DDP\\(short_batch='drop'\\)"),
        (9, 2, False, "drop", "has 1 sample for 2 ranks, and is left out"),
        (9, 2, True, "wrap", None),
        (10, 2, False, "wrap", None),
        (8, 2, False, "wrap", None),
        (9, 1, False, "wrap", None),
    ],
)
def test_fewer_last_samples_than_ranks_are_told(
    size: int, world_size: int, drop_last: bool, short: str, told: str | None
) -> None:
    line = SampleBatches(Sequential(size), 4, drop_last, 0, world_size, short).told
    assert (line is None) if told is None else re.search(told, line or "")


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 5), (5, 1), (1, 3)])
@given(size=SIZES, batch_size=BATCH_SIZES, later_batch_size=BATCH_SIZES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_stop_on_some_ranks_continue_on_others_and_every_sample_comes_exactly_once(
    before: int, after: int, size: int, batch_size: int, later_batch_size: int, data: st.DataObject
) -> None:
    order = Shuffled(size, seed=5)
    batches = of_all_ranks(order, batch_size, before, 2, short="drop")
    done = data.draw(st.integers(0, len(batches)))
    position = batches[done - 1][0].stop if done else 0
    rest = of_all_ranks(order, later_batch_size, after, 2, position, short="drop")
    served = Counter(i for places in batches[:done] + rest for place in places for i in place.indices)
    assert set(served.values()) <= {1}
    missing = size - len(served)
    assert missing < after  # dropped: fewer samples than ranks at the very end

    wrapped = of_all_ranks(order, later_batch_size, after, 2, position, short="wrap")
    all_of_them = {i for places in batches[:done] + wrapped for place in places for i in place.indices}
    assert all_of_them == set(range(size))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_one_rank_has_the_batches_of_a_data_loader(size: int, drop_last: bool) -> None:
    plan = SampleBatches(Sequential(size), 4, drop_last)
    expected = [list(range(i, min(i + 4, size))) for i in range(0, size, 4)]
    if drop_last:
        expected = [batch for batch in expected if len(batch) == 4]
    assert [place.indices for place in plan.places(0, 0)] == expected
    assert len(plan) == len(expected)


@given(st.lists(st.integers(1, 5), max_size=12), st.data())
@settings(deadline=None)
def test_a_users_own_batches_are_served_as_they_are_from_any_of_them_on(sizes: list[int], data: st.DataObject) -> None:
    given_batches = [[7] * size for size in sizes]
    plan = GivenBatches(FromSampler(given_batches, seed=0), single=False)
    places = list(plan.places(0, 0))
    assert [place.indices for place in places] == given_batches
    assert [place.stop for place in places] == [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert len(plan) == len(places)
    done = data.draw(st.integers(0, len(sizes)))
    assert list(plan.places(0, sum(sizes[:done]))) == places[done:]


@given(st.integers(0, 30), st.data())
@settings(deadline=None)
def test_single_indices_count_one_each(size: int, data: st.DataObject) -> None:
    plan = GivenBatches(Shuffled(size, seed=0), single=True)
    places = list(plan.places(0, 0))
    assert sorted(place.indices for place in places) == list(range(size))
    assert [place.stop for place in places] == list(range(1, size + 1))
    start = data.draw(st.integers(0, size))
    assert list(plan.places(0, start)) == places[start:]


def test_lists_of_indices_under_batch_size_none_count_one_each() -> None:
    plan = GivenBatches(FromSampler([[0, 1, 2], [3, 4]], seed=0), single=True)
    assert [(place.first, place.stop, place.indices) for place in plan.places(0, 0)] == [
        (0, 1, [0, 1, 2]),
        (1, 2, [3, 4]),
    ]


def test_a_hash_tells_which_indices_there_have_been_however_they_are_batched() -> None:
    def hashes(sampler: Any, batch_size: int, start: int = 0) -> list[tuple[int, int]]:
        return [place.hashes for place in SampleBatches(FromSampler(sampler, seed=0), batch_size).places(0, start)]

    whole = hashes([5, 3, 8, 1, 9, 2], 2)
    assert len({after for _, after in whole}) == 3
    assert [before for before, _ in whole[1:]] == [after for _, after in whole[:-1]]
    assert hashes([5, 3, 8, 1, 9, 2], 3)[-1][1] == whole[-1][1]
    assert hashes([5, 3, 8, 1, 9, 2], 3, start=2)[0][0] == whole[0][1]
    assert hashes([5, 4, 8, 1, 9, 2], 2)[-1][1] != whole[-1][1]
    assert hashes([5, 3, 8, 1, 9, 2], 2, start=4) == whole[2:]
    assert {place.hashes for place in SampleBatches(Shuffled(6, seed=0), 2).places(0, 0)} == {(0, 0)}


# ---------------------------------------------------------------- a user's own batches over ranks, and many ranks


def of_ranks_given(
    batches: list[Any], world_size: int, *, single: bool, start: int = 0, **kwargs: Any
) -> list[list[BatchPlace]]:
    """The places of each rank, which have to be equally many."""
    plans = [
        GivenBatches(FromSampler(batches, 0), single=single, rank=rank, world_size=world_size, **kwargs)
        for rank in range(world_size)
    ]
    by_rank = [list(plan.places(0, start)) for plan in plans]
    assert len({len(places) for places in by_rank}) == 1
    if start == 0 and not kwargs:
        assert {len(plan) for plan in plans} == {len(by_rank[0])}
    return by_rank


@given(st.lists(st.integers(1, 5), max_size=12), st.sampled_from([1, 2, 3, 8]), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_users_own_batches_are_dealt_out_and_a_run_goes_on_on_another_number_of_ranks(
    sizes: list[int], world_size: int, single: bool, data: st.DataObject
) -> None:
    numbers = iter(range(1000))
    batches = [[next(numbers) for _ in range(size)] for size in sizes]
    by_rank = of_ranks_given(batches, world_size, single=single)
    served = Counter(index for places in by_rank for place in places for index in place.indices)
    assert set(served) == set(range(sum(sizes)))
    left = batches[len(batches) - len(batches) % world_size :]
    twice = max(world_size - sum(map(len, left)), 0) if left else 0
    assert served.total() == sum(sizes) + twice, "only where fewer indices are left than there are ranks"
    if not by_rank[0]:
        return
    done = data.draw(st.integers(1, len(by_rank[0])))
    stop = by_rank[0][done - 1].stop
    assert {places[done - 1].stop for places in by_rank} == {stop}
    other = data.draw(st.sampled_from([1, 2, 4]))
    trained = {index for places in by_rank for place in places[:done] for index in place.indices}
    rest = {
        index
        for places in of_ranks_given(batches, other, single=single, start=stop)
        for p in places
        for index in p.indices
    }
    assert trained | rest == set(range(sum(sizes)))
    assert not trained & rest


def test_single_indices_are_dealt_out_and_the_last_ones_wrapped_around() -> None:
    by_rank = of_ranks_given([10, 11, 12, 13, 14], 2, single=True)
    assert [[place.indices for place in places] for places in by_rank] == [[10, 12, 14], [11, 13, 14]]
    assert [place.first for place in by_rank[1]] == [1, 3, 4]
    assert [place.repeats for place in by_rank[0]] == [False, False, True]


def test_what_cannot_be_dealt_out_is_left_out_by_choice() -> None:
    by_rank = of_ranks_given([[0, 1], [2, 3], [4]], 2, single=False, short="drop")
    assert [[place.indices for place in places] for places in by_rank] == [[[0, 1]], [[2, 3]]]
    by_rank = of_ranks_given([[0, 1], [2, 3], [4, 5]], 2, single=False, short="drop")
    assert [[place.indices for place in places] for places in by_rank] == [[[0, 1], [4]], [[2, 3], [5]]]
    plan = GivenBatches(Sequential(5), single=True, rank=1, world_size=2, short="drop")
    assert [place.indices for place in plan.places(0, 0)] == [1, 3]
    assert (len(plan), plan.num_left(2, 2)) == (2, 1)
    assert "1 sample for 2 ranks, and is left out" in str(plan.told)


@pytest.mark.parametrize("world_size", [8, 16, 33, 64])
def test_many_ranks_have_equally_many_steps_and_every_sample_once(world_size: int) -> None:
    """As on a cluster: a pure function of (rank, world size)."""
    size, batch_size = 10_007, 4
    batches = of_all_ranks(Shuffled(size, seed=3), batch_size, world_size)
    served = Counter(index for places in batches for place in places for index in place.indices)
    rest = size % (batch_size * world_size)
    assert len(batches) == -(-size // (batch_size * world_size))
    assert served.keys() == set(range(size))
    assert served.total() == size + (max(world_size - rest, 0) if rest else 0)
    assert all(len(place.indices) == batch_size for places in batches[:-1] for place in places)
    stops = [{place.stop for place in places} for places in batches]
    assert all(len(stop) == 1 for stop in stops), "all ranks are at the same position"
