"""Signals beside the run's own waits: those that come just before one, and the workers that they end."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.small_data import wait_until
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, EvalHook, RepeatDataset, Trainer
from torch_frame.data.source import source_of
from torch_frame.data.starting import signals_held_back
from torch_frame.stopping import StopRequested, StopSignals, _is_in_a_dataset

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.usefixtures("free_alarm"),
]


@contextlib.contextmanager
def handler_of(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.fixture
def signals() -> StopSignals:
    return StopSignals(on_first=lambda: None)


def wait_for_data(seconds: float) -> bool:
    """Whether the wait was broken off."""
    try:
        queue.Queue[None]().get(timeout=seconds)
    except queue.Empty:
        return False
    except StopRequested:
        return True
    raise AssertionError


def test_a_wait_does_not_begin_when_a_signal_has_come(signals: StopSignals) -> None:
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        signals.begin_wait(False)  # something is open
        with pytest.raises(StopRequested):
            signals.begin_wait(True)


def test_a_signal_that_comes_just_before_the_wait_ends_it(signals: StopSignals) -> None:
    with signals.listening():
        signals.begin_wait(True)
        os.kill(os.getpid(), signal.SIGTERM)  # this frame is no wait
        assert signals.received == signal.SIGTERM
        started = time.monotonic()
        assert wait_for_data(120)
        assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_where_something_is_open_the_wait_goes_on(signals: StopSignals) -> None:
    with signals.listening():
        signals.begin_wait(True)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.begin_wait(False)
        assert not wait_for_data(0.6)


def test_the_start_of_workers_is_not_broken_off(signals: StopSignals) -> None:
    """Signals are blocked in this thread then; another one may be given it."""
    with signals.listening():
        signals.begin_wait(True)
        other = threading.Timer(0.3, signal.raise_signal, (signal.SIGTERM,))
        other.start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        try:
            assert not wait_for_data(1)
            other.join()
            assert wait_until(lambda: signals.received == signal.SIGTERM)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert wait_for_data(20)


def test_a_signal_just_before_workers_are_started_ends_the_wait_for_them(signals: StopSignals) -> None:
    loader: DataLoader[int] = DataLoader(range(2), num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    with signals.listening():
        signals.begin_wait(True)
        os.kill(os.getpid(), signal.SIGTERM)
        with signals_held_back(loader):
            assert not wait_for_data(0.6)
        assert wait_for_data(20)


def test_from_the_first_signal_on_a_dead_worker_is_no_error(signals: StopSignals) -> None:
    def as_torch_does(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with handler_of(signal.SIGCHLD, as_torch_does):
        with signals.listening():
            with pytest.raises(RuntimeError):
                os.kill(os.getpid(), signal.SIGCHLD)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is as_torch_does


def test_an_evaluation_whose_workers_the_signal_has_ended_is_gone_through_again(tmp_path: Path) -> None:
    class Loader:
        """Its workers die of the signal, and torch notices it when it waits for them."""

        dies = True
        num_whole = 0

        def __iter__(self) -> Iterator[Any]:
            yield make_batches(1)[0]
            if self.dies:
                self.dies = False
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
            self.num_whole += 1

    loader = Loader()

    def run() -> Trainer:
        hook = EvalHook(loader, lambda model, batch: {"loss": model(batch).reshape(1)})
        return make_trainer(tmp_path / "run", hooks=[hook], resume="auto")

    with pytest.raises(SystemExit) as ended:
        run().train()
    assert ended.value.code == 143
    resumed = run()
    resumed.train()
    assert resumed.progress.epoch == 2
    assert loader.num_whole == 2


class Hangs(Dataset[Any]):
    """Draws random numbers; loading its sample 9 sends SIGTERM to the process and takes long, until it is allowed to go on."""

    def __init__(self) -> None:
        self.hangs = True

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(3) + random.random() + np.random.randn()
        if index == 9 and self.hangs:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(120)
        return drawn, drawn[:1]


class HangsAsStream(IterableDataset[Any]):
    def __init__(self, dataset: Hangs) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: RepeatDataset(data, 2), HangsAsStream])
def test_without_workers_a_dataset_that_hangs_is_broken_off_and_the_run_resumed_bitwise(
    wrap: Any, tmp_path: Path
) -> None:
    def run(folder: str, *, hangs: bool) -> Trainer:
        dataset = Hangs()
        dataset.hangs = hangs
        torch.manual_seed(0)
        loader = DataLoader(wrap(dataset), batch_size=4)
        settings = {"seed": 5, "resume": "auto", "hooks": [CheckpointerHook()]}
        return make_trainer(tmp_path / folder, Net(dropout=True), data=loader, **settings)

    whole = run("whole", hangs=False)
    whole.train()
    stopped, started = run("stopped", hangs=True), time.monotonic()
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == 143
    assert time.monotonic() - started < 60
    assert stopped.progress.iter == 2
    resumed = run("stopped", hangs=False)
    resumed.train()
    assert not differences(weights_of(resumed.model), weights_of(whole.model))


class LooksAtItself(Dataset[Any]):
    """Notes whether a signal could break it off; loads from a loader of its own, where there is one."""

    def __init__(self, seen: list[bool], inner: Any = None) -> None:
        self.seen = seen
        self.inner = inner

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        self.seen.append(_is_in_a_dataset(sys._getframe()))
        for _ in () if self.inner is None else self.inner.epoch(0):
            pass
        return torch.ones(1)


def test_a_dataset_may_be_broken_off_but_not_what_keeps_the_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    in_datasets: list[bool] = []
    in_ours: list[bool] = []

    def get_state(legacy: bool) -> Any:
        in_ours.append(_is_in_a_dataset(sys._getframe()))
        return np.random.get_state(legacy)

    names = [name for name in dir(np.random) if name.endswith(("_state", "_generator"))]
    functions = {**{name: getattr(np.random, name) for name in names}, "get_state": get_state}
    for room in ("rng_guard", "rng_memory"):
        monkeypatch.setattr(f"torch_frame.data.{room}.numpy_random", SimpleNamespace(**functions))
    monkeypatch.setattr("torch_frame.data.rng_memory._gauss", None)  # so that get_state is called
    inner = source_of(DataLoader(LooksAtItself(in_datasets), batch_size=1), seed=0)
    for _ in source_of(DataLoader(LooksAtItself(in_datasets, inner), batch_size=1), seed=0).epoch(0):
        pass
    assert in_datasets == [True] * 6
    assert in_ours == [False] * 6
