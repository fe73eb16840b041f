"""Small augmented datasets and samplers that several tests share; light to import, for workers that are spawned."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from torch_frame import InfiniteDataLoader

KINDS = ("plain", "persistent", "infinite")


def noise() -> Tensor:
    """One number of each global generator: (3,) float64."""
    return torch.tensor([torch.rand((), dtype=torch.float64).item(), np.random.rand(), random.random()]).double()


class Augmented(Dataset[Tensor]):
    """A sample is its index and the noise of its augmentation: (4,) float64."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size = size
        self.first = first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.cat([torch.tensor([float(self.first + index)]).double(), noise()])


class AugmentedByBatch(Augmented):
    """Loads, and augments, a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        shift = noise()
        return [self[index] + torch.cat([torch.zeros(1), shift]) for index in indices]


class AugmentedRows(Augmented):
    """Is asked for a list of indices, as a TensorDataset can be."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.stack([Augmented.__getitem__(self, i) for i in index])


class Epochs(Dataset[Tensor]):
    """A sample tells its index, the epoch its dataset was told of, and the process that loaded it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = -1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, self.epoch, os.getpid()])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Failing(Augmented):
    """Fails at one index as long as it is told to."""

    fails = True

    def __getitem__(self, index: int) -> Tensor:
        if self.fails and index == 5:
            raise OSError("sample 5 is broken")
        return super().__getitem__(index)


class Stream(IterableDataset[Tensor]):
    """Augmented samples, split over the workers; `start` and `stop` may be set by a worker_init_fn."""

    def __init__(self, size: int) -> None:
        self.start, self.stop = 0, size
        self.split = True

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info() if self.split else None
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(self.start + first, self.stop, step):
            yield torch.cat([torch.tensor([float(index)]).double(), noise()])


def noisy_collate(samples: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(samples)) + torch.cat([torch.zeros(1), noise()])


def noisy_rows(rows: Tensor) -> Tensor:
    return rows + torch.cat([torch.zeros(1), noise()])


class Lazy:
    """A sampler that draws its indices one by one, by one of the generators.

    Args:
        draw: a function of this module, size -> index.
        size: of the dataset.
        num: of indices.
    """

    def __init__(self, draw: Callable[[int], int], size: int, num: int) -> None:
        self.draw = draw
        self.size = size
        self.num = num

    def __iter__(self) -> Iterator[int]:
        return (self.draw(self.size) for _ in range(self.num))


class LazyWithLen(Lazy):
    def __len__(self) -> int:
        return self.num


class LazyOwn(LazyWithLen):
    """Draws from a generator of its own."""

    def __init__(self, size: int, num: int) -> None:
        super().__init__(self.draw_own, size, num)
        self.generator = torch.Generator().manual_seed(3)

    def draw_own(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self.generator))


class LazyOfEpoch(LazyWithLen):
    """Is told of its epoch, as DistributedSampler is."""

    def __init__(self, size: int, num: int) -> None:
        super().__init__(draw_torch, size, num)
        self.epoch = -1

    def __iter__(self) -> Iterator[int]:
        return iter([(self.epoch * 7 + i) % self.size for i in range(self.num)])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Buckets:
    """A batch sampler of its own kind: batches of 1 to 4 random indices."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        left = torch.randperm(self.size).tolist()
        while left:
            num = random.randint(1, 4)
            yield left[:num]
            left = left[num:]


def draw_torch(size: int) -> int:
    return int(torch.randint(size, ()))


def draw_numpy(size: int) -> int:
    return int(np.random.randint(size))


def draw_python(size: int) -> int:
    return random.randrange(size)


def make_loader(kind: str, dataset: Any, num_workers: int = 0, context: str | None = None, **kwargs: Any) -> Any:
    """A plain DataLoader, one with persistent workers (where there are workers), or an InfiniteDataLoader."""
    settings = {**kwargs, "num_workers": num_workers, "multiprocessing_context": context}
    if num_workers and context is None:
        settings["multiprocessing_context"] = "fork"
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="This DataLoader will create"
        )  # more workers than this machine has cores
        if kind == "infinite":
            return InfiniteDataLoader(dataset, **settings)
        return DataLoader(dataset, persistent_workers=kind == "persistent" and num_workers > 0, **settings)


def descendants() -> set[int]:
    """Processes that this one has started, and those started by them; not multiprocessing's own, which stay."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid for pid in found - {os.getpid()} if parents[pid] != os.getpid() or not _stays(pid)}


def _stays(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "resource_tracker" in command or "multiprocessing.forkserver" in command


def open_files() -> list[str]:
    """What the file descriptors of this process are of."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(entry).split(":")[0])
        except OSError:  # the folder itself
            continue
    return sorted(names)


def wait_until(claim: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it comes true in time: much more time than it takes, since the machine may be busy with other tests."""
    end = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def processes_gone(before: set[int], seconds: float = 20.0) -> bool:
    """No process is left that was not there `before`."""
    multiprocessing.active_children()  # reaps
    return wait_until(lambda: descendants() <= before, seconds)
