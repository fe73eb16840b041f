"""What a signal does beside the run itself: the workers that it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import make_batches, make_trainer
from torch_frame import EvalHook, Trainer
from torch_frame.stopping import StopSignals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


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
