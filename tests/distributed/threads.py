"""Ranks as threads of one process: a strategy whose collective methods meet at a barrier. For tests of the seam."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_frame.distributed.strategy import SingleProcess

T = TypeVar("T")
PATIENCE_S = 30.0


class Meeting:
    """A barrier that exchanges values: each rank waits until all of them have called.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=PATIENCE_S)
        self.values: list[Any] = [None] * world_size
        self.names: list[list[str]] = [[] for _ in range(world_size)]
        """The collective methods that each rank has called, in order."""

    def gather(self, rank: int, name: str, value: T) -> list[T]:
        self.names[rank].append(name)
        self.values[rank] = value
        self.barrier.wait()
        values = [copy.deepcopy(value) for value in self.values]
        self.barrier.wait()
        return values


class ThreadStrategy(SingleProcess):
    """One of several ranks. Gradients are exchanged once a window, in `reduce_gradients`.

    Args:
        own_shards: the data of each rank is its part already.
    """

    own_shards = True

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self._meeting = meeting

    def _gather(self, name: str, value: T) -> list[T]:
        return self._meeting.gather(self.rank, name, value)

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        of_ranks = self._gather("reduce_gradients", [parameter.grad for parameter in trained])
        for parameter, gradients in zip(trained, zip(*of_ranks, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).mean(0)

    def agree(self, flag: bool) -> bool:
        return any(self._gather("agree", flag))

    def sum(self, value: Any) -> Any:
        return sum(self._gather("sum", value))

    def gather(self, value: T) -> list[T]:
        return self._gather("gather", value)

    def collect(self, value: T) -> list[T]:
        values = self._gather("collect", value)
        return values if self.rank == 0 else []

    def broadcast(self, value: T) -> T:
        return self._gather("broadcast", value)[0]


def on_ranks(work: Callable[[ThreadStrategy], T], world_size: int = 2) -> list[T | BaseException]:
    """What `work` returns or raises on each rank; a rank that fails lets the others go, as the death of a process does."""
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadStrategy(rank, meeting))
        except BaseException as error:
            results[rank] = error
            if meeting.barrier.n_waiting:
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), f"a rank still waits; called so far: {meeting.names}"
    assert all(names == meeting.names[0] for names in meeting.names), (
        f"ranks have called different things: {meeting.names}"
    )
    return results
