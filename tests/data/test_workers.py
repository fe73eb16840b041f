"""The end of workers: what one of them hears, no other misses."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.small_data import wait_until
from torch_frame.data.source import source_of
from torch_frame.data.workers import Ending


def _ask(endings: list[Ending], places: Any, own: int, answers: Any) -> None:
    """Ask each in the same microsecond as the other process: a barrier would wake them too far apart."""
    heard = []
    for place, ending in enumerate(endings, 1):
        places[own] = place
        while places[1 - own] < place:
            pass
        heard.append(ending.has_come())
    answers.put(heard)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_every_worker_is_told_of_the_end_though_all_ask_at_once() -> None:
    context = multiprocessing.get_context("fork")
    endings = [Ending(DataLoader(range(4), num_workers=2)) for _ in range(3000)]  # type: ignore[arg-type]  # a range has a length and items
    assert not any(ending.has_come() for ending in endings)
    for ending in endings:
        ending.come()
    places, answers = context.RawArray("q", 2), context.SimpleQueue()
    workers = [context.Process(target=_ask, args=(endings, places, own, answers)) for own in range(2)]
    for worker in workers:
        worker.start()
    heard = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert heard == [[True] * len(endings)] * 2


class Pids(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        time.sleep(0.002)
        return os.getpid()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlive_a_sigterm_that_is_not_theirs_and_end_with_the_loader(context: str) -> None:
    loader = DataLoader(Pids(), batch_size=4, num_workers=2, multiprocessing_context=context)
    source = source_of(loader, seed=0)
    pids: set[int] = set()
    for number, (batch, _) in enumerate(source.epoch(0)):
        pids |= set(batch.tolist())
        if number == 10:
            for pid in pids:
                os.kill(pid, signal.SIGTERM)  # before the loader's end: as a process group's
                os.kill(pid, signal.SIGINT)
    assert number == 99
    assert len(pids) == 2
    source.close()
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
