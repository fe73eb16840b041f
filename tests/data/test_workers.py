"""The end of workers: what one of them hears, no other misses."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.small_data import wait_until
from torch_frame import Trainer
from torch_frame.data.source import source_of
from torch_frame.signals.workers import WorkerShutdown


def _ask(shutdowns: list[WorkerShutdown], places: Any, own: int, answers: Any) -> None:
    """Ask each in the same microsecond as the other process: a barrier would wake them too far apart."""
    heard = []
    for place, shutdown in enumerate(shutdowns, 1):
        places[own] = place
        while places[1 - own] < place:
            pass
        heard.append(shutdown.announced())
    answers.put(heard)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_every_worker_is_told_of_the_end_though_all_ask_at_once() -> None:
    context = multiprocessing.get_context("fork")
    shutdowns = [WorkerShutdown(DataLoader(range(4), num_workers=2)) for _ in range(3000)]  # type: ignore[arg-type]  # a range has a length and items
    assert not any(shutdown.announced() for shutdown in shutdowns)
    for shutdown in shutdowns:
        shutdown.announce()
    places, answers = context.RawArray("q", 2), context.SimpleQueue()
    workers = [context.Process(target=_ask, args=(shutdowns, places, own, answers)) for own in range(2)]
    for worker in workers:
        worker.start()
    heard = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert heard == [[True] * len(shutdowns)] * 2


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


class Owner:
    """In a cycle with itself: only the collector frees it, and it says in which process it did."""

    def __init__(self, file: Path) -> None:
        self.file, self.itself = file, self

    def __del__(self) -> None:
        self.file.write_text(str(os.getpid()))


class Collects(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if torch.utils.data.get_worker_info() is not None:
            gc.collect()
        return torch.ones(3)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
@pytest.mark.parametrize("take_over", [True, False], ids=["taken over", "left as it is"])
def test_a_worker_never_collects_what_the_training_process_left(take_over: bool, tmp_path: Path) -> None:
    """A CUDA tensor that is freed in a forked worker aborts it; so it happened on a GPU in a run's second epoch."""
    loader: DataLoader[Any] = DataLoader(Collects(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    model = nn.Linear(3, 1)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        loader,
        1,
        tmp_path / "run",
        hooks=[],
        take_over=take_over,
        step_fn=lambda model, batch: model(batch).mean(),
    )
    gc.collect()
    gc.disable()
    try:
        Owner(tmp_path / "freed")
        trainer.train()
        assert not (tmp_path / "freed").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "freed").read_text() == str(os.getpid()), "this process still collects"
