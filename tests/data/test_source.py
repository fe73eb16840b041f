"""Batches are a function of (seed, epoch, position): whoever loads them, and wherever one begins."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

from tests.small_data import (
    KINDS,
    Augmented,
    AugmentedByBatch,
    AugmentedRows,
    Buckets,
    Epochs,
    Failing,
    Lazy,
    LazyOfEpoch,
    LazyOwn,
    LazyWithLen,
    Stream,
    descendants,
    draw_numpy,
    draw_python,
    draw_torch,
    make_loader,
    noisy_collate,
    noisy_rows,
    processes_gone,
)
from tests.small_runs import differences, seed_everything
from torch_frame import RepeatDataset
from torch_frame.data.source import source_of
from torch_frame.data.source_base import batch_size_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores

SIZE, SEED = 11, 5
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": lambda: {"dataset": Augmented(SIZE), "batch_size": 4},
    "shuffled, drop_last": lambda: {"dataset": Augmented(SIZE), "batch_size": 4, "shuffle": True, "drop_last": True},
    "collate_fn": lambda: {
        "dataset": Augmented(SIZE),
        "batch_size": 4,
        "shuffle": True,
        "collate_fn": noisy_collate,
    },
    "__getitems__": lambda: {"dataset": AugmentedByBatch(SIZE), "batch_size": 4, "shuffle": True},
    "weighted": lambda: {
        "dataset": Augmented(2),
        "batch_size": 4,
        "sampler": WeightedRandomSampler([1.0, 9.0], SIZE),
    },
    "replacement, own generator": lambda: {
        "dataset": Augmented(SIZE),
        "batch_size": 4,
        "sampler": RandomSampler(range(SIZE), True, generator=torch.Generator()),
    },
    "sampler of torch": lambda: {
        "dataset": Augmented(SIZE),
        "batch_size": 4,
        "sampler": LazyWithLen(draw_torch, SIZE, 9),
    },
    "sampler of numpy": lambda: {"dataset": Augmented(SIZE), "batch_size": 4, "sampler": Lazy(draw_numpy, SIZE, 9)},
    "sampler of random": lambda: {"dataset": Augmented(SIZE), "batch_size": 4, "sampler": Lazy(draw_python, SIZE, 9)},
    "sampler of its own": lambda: {"dataset": Augmented(SIZE), "batch_size": 4, "sampler": LazyOwn(SIZE, 9)},
    "sampler of epochs": lambda: {"dataset": Augmented(SIZE), "batch_size": 4, "sampler": LazyOfEpoch(SIZE, 9)},
    "single indices": lambda: {"dataset": Augmented(SIZE), "batch_size": None, "shuffle": True},
    "lists of indices": lambda: {
        "dataset": AugmentedRows(SIZE),
        "batch_size": None,
        "sampler": BatchSampler(RandomSampler(range(SIZE)), 4, drop_last=False),
        "collate_fn": noisy_rows,
    },
    "lists of indices, own generator": lambda: {
        "dataset": AugmentedRows(SIZE),
        "batch_size": None,
        "sampler": BatchSampler(RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(0)), 4, False),
    },
    "batch_sampler": lambda: {"dataset": Augmented(SIZE), "batch_sampler": Buckets(SIZE)},
    "batch_sampler, collate_fn": lambda: {
        "dataset": Augmented(SIZE),
        "batch_sampler": Buckets(SIZE),
        "collate_fn": noisy_collate,
    },
    "Subset": lambda: {"dataset": Subset(Augmented(SIZE), [1, 3, 5, 7, 9]), "batch_size": 2, "shuffle": True},
    "ConcatDataset": lambda: {
        "dataset": ConcatDataset([Augmented(5), Augmented(6, first=5)]),
        "batch_size": 4,
        "shuffle": True,
    },
    "RepeatDataset": lambda: {"dataset": RepeatDataset(Augmented(4), 3), "batch_size": 5, "shuffle": True},
}
each_case = pytest.mark.parametrize("case", CASES)


def served(loader: Any, epochs: int = 2, seed: int = SEED, **kwargs: Any) -> list[list[Tensor]]:
    """The batches of each epoch."""
    source = source_of(loader, seed, **kwargs)
    try:
        return [[batch for batch, _ in source.epoch(epoch)] for epoch in range(epochs)]
    finally:
        source.close()


def loader_of(case: str, kind: str = "plain", num_workers: int = 0, context: str | None = None) -> Any:
    return make_loader(kind, num_workers=num_workers, context=context, **CASES[case]())


def numbers_of_training() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


@pytest.fixture
def pcg64() -> Iterator[None]:
    """The user has set another of numpy's bit generators."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(5))
    yield
    np.random.set_bit_generator(before)


# ---------------------------------------------------------------- the same batches whoever loads them


@each_case
@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [("infinite", 0), ("plain", 1), ("plain", 4), ("infinite", 2)],
)
def test_augmented_batches_are_the_same_for_every_number_of_workers(case: str, kind: str, num_workers: int) -> None:
    seed_everything(1)
    expected = served(loader_of(case))
    seed_everything(2)
    assert not differences(served(loader_of(case, kind, num_workers)), expected)
    assert all(expected)
    assert differences(expected[0], expected[1])


@pytest.mark.parametrize(("kind", "num_workers"), [("plain", 2), ("persistent", 2), ("persistent", 4), ("infinite", 1)])
def test_workers_that_stay_serve_the_same_batches_for_every_number_of_them(kind: str, num_workers: int) -> None:
    expected = served(loader_of("collate_fn"), 4)
    assert not differences(served(loader_of("collate_fn", kind, num_workers), 4), expected)


@pytest.mark.parametrize(
    ("context", "kind", "case"),
    [
        ("spawn", "plain", "collate_fn"),
        ("spawn", "infinite", "weighted"),
        ("forkserver", "persistent", "batch_sampler"),
    ],
)
def test_workers_that_are_not_forked_serve_the_same_batches(context: str, kind: str, case: str) -> None:
    epochs = 1 if kind == "plain" else 2
    assert not differences(served(loader_of(case, kind, 2, context), epochs), served(loader_of(case), epochs))


@pytest.mark.parametrize("case", ["shuffled, drop_last", "sampler of numpy", "collate_fn"])
def test_workers_serve_the_same_batches_under_a_bit_generator_of_the_users(case: str, pcg64: None) -> None:
    assert not differences(served(loader_of(case, "plain", 2)), served(loader_of(case)))


@each_case
def test_what_was_loaded_before_makes_no_difference(case: str) -> None:
    loader = loader_of(case)
    expected = served(loader)
    seed_everything(9)
    assert not differences(served(loader), expected)
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)
        assert not differences(served(loader_of(case)), expected)


def test_an_index_drawn_many_times_gets_as_many_augmentations() -> None:
    batches = served(loader_of("weighted"), 3)
    rows = torch.cat([batch for epoch in batches for batch in epoch])
    assert len(rows) == 3 * SIZE
    assert len(set(rows[:, 0].tolist())) == 2
    for column in (1, 2, 3):  # torch, numpy, random
        assert len(set(rows[:, column].tolist())) == len(rows)


@pytest.mark.parametrize("case", ["in order", "collate_fn", "RepeatDataset", "single indices"])
def test_each_sample_of_each_epoch_and_seed_has_an_augmentation_of_its_own(case: str) -> None:
    batches = [batch for seed in (0, 1) for epoch in served(loader_of(case), 3, seed) for batch in epoch]
    rows = torch.cat([batch.reshape(-1, 4) for batch in batches])
    for column in (1, 2, 3):
        assert len(set(rows[:, column].tolist())) == len(rows)


def test_a_samples_augmentation_does_not_depend_on_the_batch_size() -> None:
    def rows(batch_size: int) -> Tensor:
        return torch.cat(served(make_loader("plain", Augmented(SIZE), batch_size=batch_size, shuffle=True), 1)[0])

    assert torch.equal(rows(4), rows(3))


@pytest.mark.parametrize("kind", ["plain", "infinite"])
def test_in_order_false_serves_every_sample_once_an_epoch(kind: str) -> None:
    """Batches may come in another order, but epochs do not mix and nothing is lost."""
    loader = make_loader(kind, FirstIsSlow(8), 2, batch_size=2, in_order=False)
    for epoch in served(loader, 3):
        assert sorted(torch.cat(epoch).tolist()) == list(range(8))


class FirstIsSlow(Dataset[int]):
    """Its sixth sample takes 0.3 s, so that a later batch overtakes its own."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index == 5:
            time.sleep(0.3)
        return index


# ---------------------------------------------------------------- wherever one begins


@each_case
@pytest.mark.parametrize(("kind", "num_workers"), [("plain", 0), ("infinite", 0)])
def test_every_start_position_gives_the_tail_of_the_epoch(case: str, kind: str, num_workers: int) -> None:
    source = source_of(loader_of(case, kind, num_workers), SEED)
    whole = list(source.epoch(1))
    for done in range(len(whole) + 1):
        start = whole[done - 1][1] if done else 0
        assert not differences(list(source.epoch(1, start)), whole[done:])
        other = source_of(loader_of(case, kind, num_workers), SEED)
        assert not differences(list(other.epoch(1, start)), whole[done:])
        other.close()
    source.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["collate_fn", "batch_sampler", "lists of indices", "sampler of numpy"])
def test_every_start_position_gives_the_tail_of_the_epoch_with_workers(case: str, kind: str) -> None:
    whole = list(source_of(loader_of(case), SEED).epoch(1))
    source = source_of(loader_of(case, kind, 2), SEED)
    for done in (0, 1, len(whole) - 1, len(whole)):
        assert not differences(list(source.epoch(1, whole[done - 1][1] if done else 0)), whole[done:])
    source.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_was_broken_off_is_served_whole_when_asked_for_again(kind: str, num_workers: int) -> None:
    whole = list(source_of(loader_of("collate_fn"), SEED).epoch(0))
    source = source_of(loader_of("collate_fn", kind, num_workers), SEED)
    for taken in (1, 2, len(whole)):
        running = source.epoch(0)
        assert not differences([next(running) for _ in range(taken)], whole[:taken])
        del running
        assert not differences(list(source.epoch(0)), whole)
    running = source.epoch(0, whole[0][1])
    next(running)
    del running
    assert not differences(list(source.epoch(0, whole[0][1])), whole[1:])
    source.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_behind_the_last_one_can_be_gone_back_from(num_workers: int) -> None:
    whole = list(source_of(loader_of("collate_fn"), SEED).epoch(0))
    source = source_of(loader_of("collate_fn", "infinite", num_workers), SEED, last_epoch=1)
    for epoch in (0, 1):
        list(source.epoch(epoch))
    assert not differences(list(source.epoch(0)), whole)
    source.close()


# ---------------------------------------------------------------- the training process


@each_case
@pytest.mark.parametrize(("kind", "num_workers"), [("plain", 0), ("infinite", 0), ("infinite", 2)])
def test_the_training_numbers_are_untouched(case: str, kind: str, num_workers: int) -> None:
    loader = loader_of(case, kind, num_workers)
    before = numbers_of_training()
    source = source_of(loader, SEED)
    for _ in source.epoch(0):
        assert numbers_of_training() == before
    for _ in source.epoch(1):
        break
    source.close()
    assert numbers_of_training() == before


@pytest.mark.parametrize("case", ["shuffled, drop_last", "collate_fn", "sampler of numpy", "batch_sampler"])
def test_a_bit_generator_that_the_user_has_set_is_untouched(case: str, pcg64: None) -> None:
    mine = np.random.get_bit_generator()
    before = numbers_of_training()
    for _ in source_of(loader_of(case), SEED).epoch(0):
        assert np.random.get_bit_generator() is mine
        assert numbers_of_training() == before


def test_the_training_numbers_are_untouched_when_a_sample_fails() -> None:
    before = numbers_of_training()
    with pytest.raises(OSError, match="sample 5 is broken"):
        served(make_loader("plain", Failing(8), batch_size=4))
    assert numbers_of_training() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("wrap", [None, RepeatDataset])
def test_the_dataset_is_told_of_its_epoch_where_it_is_used(kind: str, num_workers: int, wrap: Any) -> None:
    dataset: Any = Epochs(6) if wrap is None else wrap(Epochs(3), 2)
    for epoch, batches in enumerate(served(make_loader(kind, dataset, num_workers, batch_size=2), 3)):
        assert torch.cat(batches)[:, 1].tolist() == [epoch] * 6


def test_a_plain_loaders_dataset_may_be_changed_between_epochs() -> None:
    dataset = Augmented(4)
    source = source_of(make_loader("plain", dataset, 2, batch_size=2), SEED)
    list(source.epoch(0))
    dataset.first = 100
    assert torch.cat([batch for batch, _ in source.epoch(1)])[:, 0].tolist() == [100, 101, 102, 103]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pin_memory_changes_nothing_else(num_workers: int) -> None:
    loader = make_loader("plain", Augmented(SIZE), num_workers, batch_size=4, shuffle=True, pin_memory=True)
    expected = served(make_loader("plain", Augmented(SIZE), batch_size=4, shuffle=True))
    assert not differences(served(loader), expected)


def move_first(worker_id: int) -> None:
    """What people write: each worker opens a file of its own, say, on its copy of the dataset."""
    info = get_worker_info()
    assert info is not None
    info.dataset.first = 1000


def split_range(worker_id: int) -> None:
    """The worker_init_fn of torch's documentation of IterableDataset."""
    info = get_worker_info()
    assert info is not None
    dataset: Any = info.dataset
    per_worker = -(-(dataset.stop - dataset.start) // info.num_workers)
    end = dataset.stop
    dataset.start = dataset.start + worker_id * per_worker
    dataset.stop = min(dataset.start + per_worker, end)


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_worker_init_fn_runs_and_finds_the_users_dataset(kind: str) -> None:
    loader = make_loader(kind, Augmented(4), 2, batch_size=2, worker_init_fn=move_first)
    for batches in served(loader):
        assert torch.cat(batches)[:, 0].tolist() == [1000, 1001, 1002, 1003]


# ---------------------------------------------------------------- iterable datasets


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("collate_fn", [None, noisy_collate])
def test_an_iterable_dataset_is_augmented_the_same_with_one_worker_and_none(batch_size: Any, collate_fn: Any) -> None:
    if batch_size is None and collate_fn is not None:
        collate_fn = noisy_rows

    def loader(num_workers: int) -> Any:
        kwargs = {"batch_size": batch_size, "collate_fn": collate_fn}
        return make_loader("plain", Stream(8), num_workers, **kwargs)

    seed_everything(1)
    expected = served(loader(0))
    seed_everything(2)
    assert not differences(served(loader(1)), expected)
    assert differences(expected[0], expected[1])


def test_an_iterable_datasets_samples_are_repeated_with_two_workers() -> None:
    assert not differences(*(served(make_loader("plain", Stream(8), 2, batch_size=2)) for _ in range(2)))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_iterable_dataset_goes_on_inside_an_epoch_and_says_what_that_costs(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(make_loader("plain", Stream(8), num_workers, batch_size=2), SEED)
    whole = list(source.epoch(1))
    with caplog.at_level(logging.WARNING, "torch_frame"):
        assert not differences(list(source.epoch(1, whole[1][1])), whole[2:])
    assert "2 batches are loaded again" in caplog.text


@pytest.mark.parametrize("collate_fn", [None, noisy_collate])
def test_an_iterable_dataset_leaves_the_training_numbers_alone(collate_fn: Any) -> None:
    before = numbers_of_training()
    for _ in source_of(make_loader("plain", Stream(8), batch_size=2, collate_fn=collate_fn), SEED).epoch(0):
        assert numbers_of_training() == before


def test_an_iterable_dataset_is_split_by_its_worker_init_fn() -> None:
    stream = Stream(8)
    stream.split = False
    for batches in served(make_loader("plain", stream, 2, batch_size=2, worker_init_fn=split_range)):
        assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(8))


# ---------------------------------------------------------------- loaders that stay the user's


def test_take_over_false_leaves_a_loader_as_torch_has_it() -> None:
    loader = make_loader("plain", Augmented(SIZE), batch_size=4, shuffle=True)
    seed_everything(3)
    expected = [list(loader), list(loader)]
    seed_everything(3)
    source = source_of(loader, SEED, take_over=False)
    assert not source.is_ours
    assert not differences([[batch for batch, _ in source.epoch(epoch)] for epoch in (0, 1)], expected)


def test_a_list_is_served_from_any_place() -> None:
    source = source_of([10, 11, 12], SEED)
    assert not source.is_ours
    assert list(source.epoch(0)) == [(10, 1), (11, 2), (12, 3)]
    assert list(source.epoch(5, 2)) == [(12, 3)]
    assert list(source.epoch(5, 3)) == []


class Foreign:
    """Batches from somewhere else."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class OwnLoader(DataLoader[Any]):
    """A loader that is iterated in its own way."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(["mine"])


def test_a_foreign_iterable_is_replayed_with_a_warning_of_the_cost(caplog: pytest.LogCaptureFixture) -> None:
    source = source_of(Foreign(), SEED)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        assert list(source.epoch(0)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert caplog.text == ""
        assert list(source.epoch(0, 3)) == [(3, 4)]
    assert "3 batches are loaded again" in caplog.text


def test_a_loader_with_an_iteration_of_its_own_keeps_it() -> None:
    source = source_of(OwnLoader(Augmented(4)), SEED)
    assert not source.is_ours
    assert list(source.epoch(0)) == [("mine", 1)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_is_used_through_its_state() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make() -> Any:
        return stateful(range(10), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))

    source = source_of(make(), SEED)
    assert not source.is_ours
    running = source.epoch(0)
    first = [next(running) for _ in range(2)]
    state = source.state_dict(2)
    rest = list(running)
    assert [position for _, position in first + rest] == [1, 2, 3, 4, 5]
    other = source_of(make(), SEED)
    other.load_state_dict(state, 2)
    assert not differences(list(other.epoch(0, 2)), rest)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_of_a_stream_goes_on_though_it_has_no_length() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    source = source_of(stateful(Stream(10), batch_size=2), SEED)
    running = source.epoch(0)
    for _ in range(2):
        next(running)
    state = source.state_dict(2)
    other = source_of(stateful(Stream(10), batch_size=2), SEED)
    other.load_state_dict(state, 2)
    resumed = [batch[:, 0].tolist() for batch, _ in other.epoch(0, 2)]
    assert resumed == [batch[:, 0].tolist() for batch, _ in running] == [[4, 5], [6, 7], [8, 9]]


# ---------------------------------------------------------------- errors, and what is left behind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_dataset_surfaces_with_the_users_line_and_the_next_epoch_works(
    kind: str, num_workers: int
) -> None:
    before = descendants()
    dataset = Failing(8)
    source = source_of(make_loader(kind, dataset, num_workers, batch_size=2), SEED)
    with pytest.raises(OSError, match="sample 5 is broken") as caught:
        list(source.epoch(0))
    where = str(caught.value) if num_workers else str(caught.traceback[-1])
    assert "small_data.py" in where
    del caught
    assert processes_gone(before)
    dataset.fails = False
    assert [batch[:, 0].tolist() for batch, _ in source.epoch(1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    source.close()
    assert processes_gone(before)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_on_when_an_iteration_was_broken_off_and_the_source_closed(kind: str) -> None:
    before = descendants()
    source = source_of(make_loader(kind, Augmented(40), 2, batch_size=2), SEED)
    for _ in source.epoch(0):
        break
    source.close()
    assert processes_gone(before)


@pytest.mark.parametrize("seed", [0, -3, 2**64 - 1, 2**70, np.int64(2**62)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    loader = make_loader("plain", Augmented(6), batch_size=2, shuffle=True)
    assert not differences(served(loader, seed=seed), served(loader, seed=int(seed)))


class NormalNumbers(Dataset[Any]):
    """Draws an odd number of normal numbers, of which numpy and python keep the second one of a pair."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> float:
        return float(np.random.randn()) + random.gauss(0, 1)


@pytest.mark.parametrize("drawn", [1, 2, 3])
def test_the_second_of_a_pair_of_normal_numbers_is_still_the_trainings(drawn: int) -> None:
    np.random.seed(3)
    random.seed(3)
    alone, python_alone = np.random.RandomState(3), random.Random(3)
    for _ in source_of(DataLoader(NormalNumbers(), batch_size=2), seed=0).epoch(0):
        for _ in range(drawn):
            assert np.random.randn() == alone.randn()
            assert random.gauss(0, 1) == python_alone.gauss(0, 1)


class LoadsByItself(NormalNumbers):
    """Iterates another loader of ours between two draws, as a dataset that mixes in samples of another one does."""

    def __init__(self, seed: int) -> None:
        self.others = source_of(DataLoader(NormalNumbers(), batch_size=2), seed=seed)

    def __getitem__(self, index: int) -> float:
        before = super().__getitem__(index)
        for _ in self.others.epoch(0):
            pass
        return before + super().__getitem__(index) + float(torch.rand(1))


def test_a_dataset_that_loads_from_a_loader_of_its_own_has_its_numbers_and_leaves_the_trainings() -> None:
    samples = [
        torch.cat([batch for batch, _ in source_of(DataLoader(LoadsByItself(seed), batch_size=2), seed=0).epoch(0)])
        for seed in (1, 2)
    ]
    assert torch.equal(*samples)
    np.random.seed(3)
    random.seed(3)
    alone, python_alone = np.random.RandomState(3), random.Random(3)
    for _ in source_of(DataLoader(LoadsByItself(1), batch_size=2), seed=0).epoch(0):
        assert np.random.randn() == alone.randn()
        assert random.gauss(0, 1) == python_alone.gauss(0, 1)


def test_without_numpys_private_names_its_numbers_are_kept_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    public = {name: getattr(np.random, name) for name in dir(np.random) if name.endswith(("_state", "_generator"))}
    for room in ("rng_guard", "rng_memory"):
        monkeypatch.setattr(f"torch_frame.data.{room}.numpy_random", SimpleNamespace(**public))
    monkeypatch.setattr("torch_frame.data.rng_memory._gauss", None)
    np.random.seed(3)
    alone = np.random.RandomState(3)
    for _ in source_of(DataLoader(NormalNumbers(), batch_size=2), seed=0).epoch(0):
        assert np.random.randn() == alone.randn()


class FromDisk(list[Any]):
    """A list whose batches are made when they are asked for."""


@pytest.mark.parametrize(("loader", "is_waited_for"), [([1, 2], False), ((1, 2), False), (FromDisk([1, 2]), True)])
def test_only_batches_that_are_there_are_not_waited_for(loader: Any, is_waited_for: bool) -> None:
    assert source_of(loader, 0).interruptible is is_waited_for


@pytest.mark.parametrize("split_batches", [False, True])
def test_the_batch_size_of_a_loader_that_accelerate_has_prepared_is_that_of_a_rank(split_batches: bool) -> None:
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    loader = DataLoader(list(range(32)), 8)
    ranks = {"num_processes": 2, "process_index": 0, "put_on_device": False, "dispatch_batches": False}
    prepared = prepare(loader, split_batches=split_batches, **ranks)
    first = next(iter(prepared))
    assert batch_size_of(prepared, 2) == len(first)
    assert batch_size_of(loader, 2) == 8
    assert batch_size_of([first], 2) is None
