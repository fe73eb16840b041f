"""An evaluation's batches are dealt out so that each is there once, whatever the loader and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
)

from tests.distributed.threads import ThreadStrategy, on_ranks
from torch_frame import InfiniteDataLoader, SettingError
from torch_frame.data.shards import check_reports, deal
from torch_frame.distributed.strategy import SingleProcess

SIZES = [(21, 2), (5, 8), (21, 3), (1, 4), (8, 4)]


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.size))


class Batches:
    """Neither a list nor a DataLoader."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.size).split(2))


def single(size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(size)), batch_size=None)


def padded(size: int) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(size))
    return DataLoader(data, 2, sampler=DistributedSampler(data, 2, 0))


LOADERS = {
    "plain": lambda size: DataLoader(TensorDataset(torch.arange(size)), 2),
    "shuffled": lambda size: DataLoader(TensorDataset(torch.arange(size)), 2, shuffle=True),
    "shuffled, with a generator of its own": lambda size: DataLoader(
        TensorDataset(torch.arange(size)), 2, shuffle=True, generator=torch.Generator()
    ),
    "one by one": single,
    "a batch sampler": lambda size: DataLoader(
        TensorDataset(torch.arange(size)), batch_sampler=BatchSampler(RandomSampler(range(size)), 3, drop_last=False)
    ),
    "a DistributedSampler, which pads": padded,
    "infinite": lambda size: InfiniteDataLoader(TensorDataset(torch.arange(size)), 2, shuffle=True),
    "indices that are no numbers": lambda size: DataLoader(Named(), batch_sampler=NamedBatches(size)),  # type: ignore[arg-type]
    "arrays of indices": lambda size: DataLoader(
        TensorDataset(torch.arange(size)),
        batch_sampler=np.array_split(np.arange(size), -(-size // 2)),  # type: ignore[arg-type]
    ),
    "a list": lambda size: list(torch.arange(size).split(2)),
    "a stream": lambda size: DataLoader(Stream(size), 2),
    "an iterable": Batches,
}


class Named:
    """A dataset whose indices are texts and pairs, as those of samplers that choose a size are."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: Any) -> Tensor:
        text, (number, size) = index
        assert (text, size) == (f"{number:03d}", 8)
        return torch.tensor(number)


class NamedBatches:
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        for numbers in torch.arange(self.size).split(2):
            yield [(f"{number:03d}", (np.int64(number), 8)) for number in numbers.tolist()]


class OwnParts(Sampler[int]):
    """Gives each rank a part of some of the samples, and pads."""

    def __init__(self, indices: list[int], rank: int, num_replicas: int) -> None:
        self.indices, self.rank, self.num_replicas = indices, rank, num_replicas

    def __iter__(self) -> Iterator[int]:
        padded = self.indices + self.indices[: -len(self.indices) % self.num_replicas]
        return iter(padded[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return -(-len(self.indices) // self.num_replicas)


class OwnBatches(OwnParts):
    def __iter__(self) -> Any:
        return iter([index, index + 50] for index in super().__iter__())


def values(batches: Any) -> list[int]:
    return [
        int(value)
        for batch in batches
        for value in (batch[0] if isinstance(batch, list | tuple) else batch).reshape(-1)
    ]


@pytest.mark.parametrize(("size", "world_size"), SIZES)
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_every_sample_is_on_one_rank(make: Any, size: int, world_size: int) -> None:
    def work(strategy: ThreadStrategy) -> Any:
        dealt = deal(make(size), strategy)
        return values(dealt), dealt.report()

    results = on_ranks(work, world_size)
    assert sorted(value for seen, _ in results for value in seen) == list(range(size))  # type: ignore[misc]
    check_reports([report for _, report in results], "eval")  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [2, 3])
def test_of_a_sampler_that_gives_each_rank_a_part_all_parts_are_evaluated_once(world_size: int) -> None:
    """And no sample that it leaves out: it may be over the held-out part of the training's dataset."""
    data = TensorDataset(torch.arange(100))
    indices = [3, 1, 4, 15, 9, 2, 6]

    def work(strategy: ThreadStrategy) -> Any:
        rank, size = strategy.rank, strategy.world_size
        single = DataLoader(data, 2, sampler=OwnParts(indices, rank, size))
        batches = DataLoader(data, batch_sampler=OwnBatches(indices, rank, size))
        of_part = DataLoader(data, 2, sampler=DistributedSampler(range(5), size, rank))  # type: ignore[arg-type]
        return [values(deal(loader, strategy)) for loader in (single, batches, of_part)]

    single, batches, of_part = zip(*on_ranks(work, world_size), strict=True)  # type: ignore[misc]
    assert sorted(chain(*single)) == sorted(indices)
    assert sorted(chain(*batches)) == sorted([*indices, *(index + 50 for index in indices)])
    assert sorted(chain(*of_part)) == list(range(5))


def test_a_hook_of_one_rank_evaluates_the_parts_of_all(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Rank 0 alone has the hook: its sampler is asked as on each rank."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    data = TensorDataset(torch.arange(100))
    indices = [3, 1, 4, 15, 9, 2, 6]
    assert sorted(values(deal(DataLoader(data, 2, sampler=OwnParts(indices, 0, 3)), SingleProcess()))) == sorted(
        indices
    )
    assert not caplog.records
    fixed = OwnParts(indices, 0, 3)
    fixed.__class__ = FixedParts
    assert values(deal(DataLoader(data, 2, sampler=fixed), SingleProcess())) == [3, 15, 6]
    assert "FixedParts has the part of this rank only" in caplog.text


class FixedParts(OwnParts):
    def __iter__(self) -> Iterator[int]:
        return iter(self.indices[::3])


def test_batches_are_those_of_one_process() -> None:
    """So that the bits of their scores are."""
    loader = LOADERS["plain"](21)
    whole = [tuple(values([batch])) for batch in loader]
    results = on_ranks(lambda strategy: [tuple(values([batch])) for batch in deal(loader, strategy)], 4)
    assert sorted(batch for part in results for batch in part) == sorted(whole)  # type: ignore[union-attr]
    assert list(deal(whole, SingleProcess())) == whole


def test_the_lengths_are_known_where_the_loaders_is() -> None:
    assert on_ranks(lambda strategy: len(deal(LOADERS["a list"](21), strategy)), 4) == [3, 3, 3, 2]
    assert on_ranks(lambda strategy: len(deal(LOADERS["plain"](21), strategy)), 4) == [3, 3, 3, 2]


def test_workers_load_a_part() -> None:
    def work(strategy: ThreadStrategy) -> list[int]:
        return values(deal(DataLoader(TensorDataset(torch.arange(9)), 2, num_workers=1), strategy))

    first, second = on_ranks(work)
    assert (first, second) == ([0, 1, 4, 5, 8], [2, 3, 6, 7])


def test_loaders_that_differ_between_ranks_are_told() -> None:
    """Some evaluations are split by the script already; half of the data would be left out."""

    def work(strategy: ThreadStrategy) -> Any:
        part = list(torch.arange(20).split(2))[strategy.rank :: 2]
        dealt = deal(part, strategy)
        values(dealt)
        return dealt.report(), values(deal(part, strategy, own_shards=True))

    results = on_ranks(work)
    with pytest.raises(SettingError, match=r"eval.*own_shards=True"):
        check_reports([report for report, _ in results], "eval")  # type: ignore[misc]
    assert sorted(value for _, seen in results for value in seen) == list(range(20))  # type: ignore[misc]


def test_a_batch_that_is_lost_is_told() -> None:
    with pytest.raises(SettingError, match="5, 5 batches"):
        check_reports([(2, 5, 1), (2, 5, 1)], "eval")


class Rank(SingleProcess):
    """A rank that need not talk to the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [8, 16, 33, 64])
@pytest.mark.parametrize("size", [1, 5, 100, 1001])
def test_many_ranks_share_an_evaluation_out(size: int, world_size: int) -> None:
    parts = [deal(LOADERS["plain"](size), Rank(rank, world_size)) for rank in range(world_size)]
    seen = [values(part) for part in parts]
    assert sorted(value for part in seen for value in part) == list(range(size))
    assert max(map(len, seen)) - min(map(len, seen)) <= 2, "batches of 2"
    check_reports([part.report() for part in parts], "eval")
