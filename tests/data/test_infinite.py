"""InfiniteDataLoader: workers that live for the whole run, an order for each epoch, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from tests.small_data import (
    Augmented,
    Buckets,
    Epochs,
    Failing,
    Stream,
    descendants,
    make_loader,
    open_files,
    processes_gone,
    wait_until,
)
from tests.small_runs import differences, environment, seed_everything
from torch_frame import InfiniteDataLoader

SIZE = 11
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def make(num_workers: int = 0, dataset: Any = None, seed: int | None = 5, **kwargs: Any) -> InfiniteDataLoader:
    settings = {"batch_size": 4, "shuffle": True, "seed": seed, **kwargs}
    loader: InfiniteDataLoader = make_loader(
        "infinite", Augmented(SIZE) if dataset is None else dataset, num_workers, **settings
    )
    return loader


def epochs_of(loader: InfiniteDataLoader, num: int) -> list[list[Tensor]]:
    with loader:
        return [list(loader) for _ in range(num)]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before, files = descendants(), open_files()
    yield
    assert processes_gone(before)
    gc.collect()  # an exception keeps what its frames held until the collector comes
    known = {*files, "pipe", "/dev/null", "socket"}
    assert wait_until(lambda: set(open_files()) <= known), set(open_files()) - known


# ---------------------------------------------------------------- order


@WORKERS
def test_every_epoch_has_an_order_of_its_own(num_workers: int) -> None:
    """1.7.5 with two workers served the orders of epochs 0, 0, 1."""
    batches = epochs_of(make(num_workers, Epochs(SIZE)), 5)
    rows = [torch.cat(epoch) for epoch in batches]
    assert all(sorted(epoch[:, 0].tolist()) == list(range(SIZE)) for epoch in rows)
    assert len({tuple(epoch[:, 0].tolist()) for epoch in rows}) == 5
    assert [set(epoch[:, 1].tolist()) for epoch in rows] == [{0}, {1}, {2}, {3}, {4}]


def test_loaders_made_in_a_row_serve_the_same_for_0_and_2_workers() -> None:
    expected = epochs_of(make(0), 3)
    for num_workers in (0, 2, 2):
        seed_everything(num_workers)
        assert not differences(epochs_of(make(num_workers), 3), expected)
    assert differences(epochs_of(make(0, seed=6), 1), expected[:1])


def test_without_a_seed_it_is_torchs_initial_one_and_no_random_number_is_drawn() -> None:
    torch.manual_seed(123)
    before = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()
    batches = epochs_of(make(0, seed=None), 2)
    assert (random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()) == before
    assert not differences(batches, epochs_of(make(0, seed=123), 2))


@WORKERS
def test_set_epoch_goes_to_an_epoch(num_workers: int) -> None:
    expected = epochs_of(make(0), 4)
    with make(num_workers) as loader:
        for epoch in (2, 0, 0, 3):
            loader.set_epoch(epoch)
            assert not differences(list(loader), expected[epoch])
        loader.set_epoch(1)
        assert not differences([list(loader), list(loader)], expected[1:3])


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_serve_the_same_and_stay(context: str) -> None:
    expected = [[batch[:, :2] for batch in epoch] for epoch in epochs_of(make(0, Epochs(SIZE)), 3)]
    with make(2, Epochs(SIZE), multiprocessing_context=context) as loader:
        batches = [list(loader) for _ in range(3)]
    assert not differences([[batch[:, :2] for batch in epoch] for epoch in batches], expected)
    pids = [set(torch.cat(epoch)[:, 2].tolist()) for epoch in batches]
    assert len(set.union(*pids)) == 2
    assert os.getpid() not in set.union(*pids)


# ---------------------------------------------------------------- workers


def test_the_workers_are_the_same_processes_in_every_epoch() -> None:
    batches = epochs_of(make(2, Epochs(16), batch_size=2), 4)
    pids = [set(torch.cat(epoch)[:, 2].tolist()) for epoch in batches]
    assert len(set.union(*pids)) == 2
    assert all(len(epoch) == 2 for epoch in pids)


def test_the_next_epoch_is_fetched_while_this_one_trains(tmp_path: Path) -> None:
    with make(2, Touching(8, tmp_path), batch_size=2) as loader:
        for _ in loader:
            pass
        assert wait_until(lambda: len(list(tmp_path.iterdir())) > 8)


class Touching(Augmented):
    """Leaves a file for each sample of each epoch that it loads."""

    def __init__(self, size: int, folder: Path) -> None:
        super().__init__(size)
        self.folder = folder
        self.epoch = -1

    def __getitem__(self, index: int) -> Tensor:
        (self.folder / f"{self.epoch} {index}").touch()
        return super().__getitem__(index)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_loaders_made_in_a_row_leave_the_number_of_open_files_as_it_is() -> None:
    for _ in range(2):
        epochs_of(make(2), 3)
    first = open_files()
    for _ in range(3):
        epochs_of(make(2), 3)
    assert wait_until(lambda: len(open_files()) <= len(first)), (first, open_files())


# ---------------------------------------------------------------- len, and DataLoader's own arguments


@WORKERS
@pytest.mark.parametrize(("drop_last", "expected"), [(False, 3), (True, 2)])
def test_its_length_is_the_epochs(num_workers: int, drop_last: bool, expected: int) -> None:
    loader = make(num_workers, drop_last=drop_last)
    assert len(loader) == expected
    assert [len(epoch) for epoch in epochs_of(loader, 2)] == [expected, expected]


def test_the_first_arguments_are_those_of_data_loader() -> None:
    loader = InfiniteDataLoader(Augmented(6), 4, False, None, None, 0, None, False, True)
    assert [batch[:, 0].tolist() for batch in loader] == [[0, 1, 2, 3]]
    assert (loader.batch_size, loader.drop_last, len(loader.dataset)) == (4, True, 6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(SIZE)), 4, False)},
        {"batch_size": 1, "batch_sampler": Buckets(SIZE)},
        {"batch_size": None},
    ],
    ids=["lists of indices", "batch_sampler", "single indices"],
)
def test_other_ways_to_batch_work(kwargs: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"seed": 1, **kwargs}
    dataset = Pairs()
    expected = epochs_of(InfiniteDataLoader(dataset, **settings), 2)
    assert not differences(epochs_of(InfiniteDataLoader(dataset, num_workers=2, **settings), 2), expected)
    assert all(sorted(np.concatenate([np.atleast_1d(b) for b in epoch])) == list(range(SIZE)) for epoch in expected)


class Pairs:
    """Gives back what it is asked for."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: Any) -> Tensor:
        return torch.as_tensor(index)


def test_an_empty_dataset_has_empty_epochs() -> None:
    loader = make(0, Augmented(0), shuffle=False)
    assert len(loader) == 0
    assert [list(loader), list(loader)] == [[], []]


def test_an_iterable_dataset_is_refused_with_a_reason() -> None:
    with pytest.raises(TypeError, match="takes a map-style dataset"):
        InfiniteDataLoader(Stream(4))


# ---------------------------------------------------------------- break, close, two at once


@WORKERS
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_breaking_out_of_an_epoch_and_starting_the_next_works(num_workers: int, taken: int) -> None:
    expected = epochs_of(make(0), 4)
    with make(num_workers) as loader:
        for epoch in range(3):
            batches = []
            for batch in loader:
                batches.append(batch)
                if len(batches) == taken:
                    break
            assert not differences(batches, expected[epoch][:taken])
        assert not differences(list(loader), expected[3])


@WORKERS
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_an_epoch_that_was_broken_off_can_be_begun_again(num_workers: int, taken: int) -> None:
    expected = epochs_of(make(0), 2)
    with make(num_workers) as loader:
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            for _ in zip(range(taken), loader, strict=False):
                pass
            loader.set_epoch(epoch)
            assert not differences(list(loader), expected[epoch])


@WORKERS
def test_two_iterations_at_once_are_an_error_of_the_older_one(num_workers: int) -> None:
    expected = epochs_of(make(0), 3)
    with make(num_workers) as loader:
        older, newer = iter(loader), iter(loader)
        assert not differences([next(older), next(newer)], [expected[0][0], expected[1][0]])
        with pytest.raises(RuntimeError, match="one at a time"):
            next(older)
        assert not differences(list(newer), expected[1][1:])
        assert not differences(list(loader), expected[2])


def test_zip_of_a_loader_with_itself_is_an_error() -> None:
    with make(0) as loader, pytest.raises(RuntimeError, match="one at a time"):
        list(zip(loader, loader, strict=True))


def test_closed_it_can_be_iterated_again() -> None:
    before, expected = descendants(), epochs_of(make(0), 2)
    loader = make(2)
    assert not differences(list(loader), expected[0])
    loader.close()
    assert processes_gone(before)
    gc.collect()  # an exception keeps what its frames held until the collector comes
    assert not differences(list(loader), expected[1])
    loader.close()
    loader.close()


def test_leaving_with_ends_the_workers_though_somebody_holds_an_iterator() -> None:
    before = descendants()
    with make(2) as loader:
        running = iter(loader)
        next(running)
    assert processes_gone(before)
    gc.collect()  # an exception keeps what its frames held until the collector comes
    with pytest.raises(RuntimeError):
        list(running)


def test_a_loader_nobody_holds_ends_its_workers() -> None:
    before = descendants()
    loader = make(2)
    for _ in loader:
        break
    del loader
    assert processes_gone(before)
    gc.collect()  # an exception keeps what its frames held until the collector comes


# ---------------------------------------------------------------- errors


def fail_in(loader: InfiniteDataLoader) -> None:
    for _ in loader:
        raise ZeroDivisionError


@WORKERS
def test_an_error_in_the_loop_ends_nothing_but_the_epoch(num_workers: int) -> None:
    expected = epochs_of(make(0), 2)
    with make(num_workers) as loader:
        with pytest.raises(ZeroDivisionError):
            fail_in(loader)
        assert not differences(list(loader), expected[1])


@WORKERS
def test_an_error_in_the_dataset_surfaces_and_the_next_epoch_works(num_workers: int) -> None:
    dataset = Failing(8)
    with make(num_workers, dataset, shuffle=False) as loader:
        with pytest.raises(OSError, match="sample 5 is broken"):
            list(loader)
        dataset.fails = False
        assert [batch[:, 0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---------------------------------------------------------------- the interpreter's end

EXITS = {
    "the end of a script": "for _ in range(2): list(loader)",
    "in the middle of an epoch": "running = iter(loader); next(running)",
    "an exception": "for batch in loader: raise ZeroDivisionError",
    "sys.exit in a loop": "for batch in loader: sys.exit(0)",
    "in a function": "def run():\n    with loader:\n        for batch in loader: return\nrun()",
}
SCRIPT = """
import sys
import torch
from tests.small_data import Epochs
from torch_frame import InfiniteDataLoader

loader = InfiniteDataLoader(Epochs(40), batch_size=2, shuffle=True, num_workers=2, seed=0)
pids = {int(batch[0, 2]) for batch in loader}
assert len(pids) == 2
print(*pids, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_nor_warning_is_left_when_the_interpreter_ends(tmp_path: Path) -> None:
    """However it ends, it ends soon; scripts run beside each other."""
    runs = {}
    for name, end in EXITS.items():
        out, err = (tmp_path / f"{name}.out").open("w"), (tmp_path / f"{name}.err").open("w")
        with out, err:
            command = [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT + end]
            runs[name] = subprocess.Popen(command, stdout=out, stderr=err, env=environment())
    problems = {}
    for name, process in runs.items():
        try:
            code = process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -9
        pids = [int(pid) for pid in (tmp_path / f"{name}.out").read_text().split()]
        errors = (tmp_path / f"{name}.err").read_text()
        raised = name == "an exception"
        if raised:
            errors = errors.replace("ZeroDivisionError", "", 1).split("Traceback", 1)[0]
        gone = wait_until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))  # type: ignore[misc]
        if code != raised or errors or not gone or len(pids) != 2:
            problems[name] = (code, errors, gone)
    assert not problems


def test_waits_at_the_border_are_not_those_of_new_workers() -> None:
    """New workers take some 30 times as long, on a busy machine too; benchmarks/loader.py measures."""

    def median_wait(kind: str) -> float:
        loader = make_loader(kind, Augmented(64), 2, batch_size=2)
        times = [time.perf_counter() for _ in range(6) for _ in loader]
        return statistics.median(second - first for first, second in list(pairwise(times))[31::32])

    assert median_wait("infinite") < median_wait("plain") / 3
