"""Signals to workers that are only being started: they live, keep what the user had blocked, and end when they are told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.small_data import wait_until
from tests.small_runs import environment, run_python
from torch_frame import InfiniteDataLoader
from torch_frame.data.source import source_of
from torch_frame.signals.blocking import signals_blocked
from torch_frame.signals.interruption import INTERRUPTION
from torch_frame.signals.stop import SIGNALS

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")


class SlowToStart(torch.utils.data.Dataset[Any]):
    """Its worker leaves a file with its name and takes a while before it comes to `worker_init_fn`; a sample is its pid."""

    def __init__(self, folder: Path, seconds: float = 1.0) -> None:
        self.folder = folder
        self.seconds = seconds
        register_after_fork(self, SlowToStart._start)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:  # where it was spawned
        self.__dict__ = state
        self._start()

    def _start(self) -> None:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


class SlowStream(SlowToStart, IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return (os.getpid() for _ in range(4))


def loader_of(dataset: Any, context: str, num_workers: int = 2) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=2, num_workers=num_workers, multiprocessing_context=context)


def pids_in(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


@pytest.mark.parametrize("kind", [SlowToStart, SlowStream])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_outlive_signals_that_come_while_they_start(kind: Any, context: str, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(pids_in(tmp_path)) == 2, 60)
        for pid in pids_in(tmp_path):
            for number in set(SIGNALS) - {signal.SIGINT}:  # Ctrl-C is left open, so that a start that hangs has an end
                os.kill(pid, number)
            killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    source = source_of(loader_of(kind(tmp_path), context), seed=0)
    pids = {pid for batch, _ in source.epoch(0) for pid in batch.tolist()}
    thread.join()
    source.close()
    assert pids == set(killed)
    assert len(pids) == 2


class Numbers(SlowToStart):
    """A sample is its index and a random number."""

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(()).item()


@pytest.fixture
def _asked_to_end() -> Iterator[None]:
    INTERRUPTION.came = True  # a signal has asked the run to end, and a window of gradients is open
    yield
    INTERRUPTION.reset()


@pytest.mark.usefixtures("_asked_to_end")
@pytest.mark.parametrize(
    ("kind", "persistent"),
    [
        (DataLoader, False),
        pytest.param(DataLoader, True, marks=pytest.mark.slow),
        pytest.param(InfiniteDataLoader, False, marks=pytest.mark.slow),
    ],
)
def test_workers_that_a_ctrl_c_ends_while_they_start_are_replaced(kind: Any, persistent: bool, tmp_path: Path) -> None:
    def loader(name: str) -> Any:
        (tmp_path / name).mkdir()
        dataset = Numbers(tmp_path / name, 3.0 if name == "ended" else 0.0)
        settings: Any = {} if kind is InfiniteDataLoader else {"persistent_workers": persistent}
        return kind(dataset, batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="spawn", **settings)

    def batches(source: Any) -> list[Any]:
        return [[part.tolist() for part in batch] for epoch in (0, 1) for batch, _ in source.epoch(epoch)]

    def kill() -> None:
        wait_until(lambda: len(pids_in(tmp_path / "ended")) == 2, 60)
        os.kill(max(pids_in(tmp_path / "ended")), signal.SIGINT)

    undisturbed = source_of(loader("whole"), seed=0)
    expected = batches(undisturbed)
    undisturbed.close()
    source = source_of(loader("ended"), seed=0)
    thread = threading.Thread(target=kill)
    thread.start()
    assert batches(source) == expected
    thread.join()
    source.close()
    assert len(pids_in(tmp_path / "ended")) >= 4, "no worker was replaced"


class Deadly(SlowToStart):
    """Ends each worker that loads a sample."""

    def __getitem__(self, index: int) -> Any:
        os._exit(1)


@pytest.mark.usefixtures("_asked_to_end")
@pytest.mark.timeout(120)
def test_workers_that_die_again_are_an_error(tmp_path: Path) -> None:
    source = source_of(loader_of(Deadly(tmp_path, 0.0), "fork", 1), seed=0)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(source.epoch(0))
    assert len(pids_in(tmp_path)) == 2


class Masks(torch.utils.data.Dataset[Any]):
    """A sample is what is blocked in the worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("blocked", [set(), {signal.SIGUSR1, signal.SIGWINCH}])
def test_what_is_blocked_is_as_before(blocked: set[int], context: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        source = source_of(DataLoader(Masks(), batch_size=None, num_workers=1, multiprocessing_context=context), seed=0)
        masks = [set(mask) for mask, _ in source.epoch(0)]
        source.close()
        here = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert here == before | blocked
    if context == "forkserver":  # whose children have what was blocked when it was started
        assert not any(mask & set(SIGNALS) - blocked for mask in masks)
    else:
        assert masks == [before | blocked] * 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_that_still_starts_is_not_waited_for(
    context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60.0)  # torch waits so long for each worker
    loader = DataLoader(SlowToStart(tmp_path, 600.0), num_workers=2, multiprocessing_context=context, timeout=0.5)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        next(iter(source_of(loader, seed=0).epoch(0)))
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_interpreter_does_not_wait_for_a_worker_that_still_starts(context: str, tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    code = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.signals.test_blocking import SlowToStart, loader_of, pids_in
from tests.small_data import wait_until
from torch_frame import InfiniteDataLoader

def interrupt():
    wait_until(lambda: len(pids_in(folder)) == 2, 60)
    time.sleep(1)  # the last one has been forked, and the loader may not know it yet
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
folder = Path(sys.argv[1])
loader = InfiniteDataLoader(SlowToStart(folder, 600.0), 2, num_workers=2, multiprocessing_context=sys.argv[2])
threading.Thread(target=interrupt).start()
batches = iter(loader)
try:
    next(batches)
except KeyboardInterrupt:
    print("interrupted")
"""
    ended = run_python(code, tmp_path, str(folder), context, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
    assert not [pid for pid in pids_in(folder) if Path(f"/proc/{pid}").exists()]


def test_what_a_start_has_begun_that_is_broken_off_is_killed() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    with contextlib.suppress(KeyboardInterrupt), signals_blocked(loader_of(Masks(), "fork")):
        process.start()
        raise KeyboardInterrupt
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


STUCK = """
import signal, sys, time

if __name__ != "__main__":
    time.sleep(60)  # in a spawned worker: its imports hang

from tests.signals.test_blocking import SlowToStart
from torch_frame import InfiniteDataLoader

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    dataset = SlowToStart(sys.argv[1])
    dataset.large = bytes(1_000_000)  # does not fit into the pipe, so that this process waits for the worker to read
    print("starts", flush=True)
    try:
        next(iter(InfiniteDataLoader(dataset, num_workers=1, multiprocessing_context="spawn")))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_a_start_that_hangs_can_be_interrupted(tmp_path: Path) -> None:
    script, output = tmp_path / "stuck.py", tmp_path / "output.txt"
    script.write_text(STUCK)
    with open(output, "w") as file:
        command = [sys.executable, str(script), str(tmp_path)]
        process = subprocess.Popen(command, stdout=file, env=environment(), start_new_session=True)
    try:
        assert wait_until(lambda: "starts" in output.read_text(), 60)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert output.read_text() == "starts\ninterrupted\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_the_resource_tracker_outlives_a_sigusr1(tmp_path: Path) -> None:
    code = """
import os, signal, time
from multiprocessing.resource_tracker import _resource_tracker
from tests.signals.test_blocking import Masks, loader_of
from torch_frame import InfiniteDataLoader
from torch_frame.data.source import source_of

assert _resource_tracker._fd is None, "it was started by something else"
source = source_of(loader_of(Masks(), "spawn", 1), seed=0)
print(len(list(source.epoch(0))))
os.kill(_resource_tracker._pid, signal.SIGUSR1)
time.sleep(0.2)
print(len(list(source.epoch(1))))
"""
    ended = run_python(code, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "1\n1\n"), ended.stderr
