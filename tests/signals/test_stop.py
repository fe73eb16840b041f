"""Signals beside the run's own waits: those that come just before one, and the workers that they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, environment, make_batches, make_trainer, run_python, weights_of
from torch_frame import CheckpointerHook, EvalHook, RepeatDataset, Trainer
from torch_frame.data.rng_guard import LoadingRng
from torch_frame.data.source import source_of
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.signals.interruption import INTERRUPTION, StopRequested
from torch_frame.signals.stop import StopSignals

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


def wait_for_data(seconds: float) -> bool:
    """Whether the wait was interrupted."""
    try:
        INTERRUPTION.begin()
        queue.Queue[None]().get(timeout=seconds)
    except queue.Empty:
        return False
    except StopRequested:
        return True
    finally:
        INTERRUPTION.here = False
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
        os.kill(os.getpid(), signal.SIGTERM)  # nothing is waited for yet
        assert signals.received == signal.SIGTERM
        assert wait_for_data(120)


def test_a_signal_in_the_wait_ends_it_at_once(signals: StopSignals) -> None:
    with signals.listening():
        signals.begin_wait(True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        assert wait_for_data(120)
        assert time.monotonic() - started < 30


def test_where_something_is_open_the_wait_goes_on(signals: StopSignals) -> None:
    with signals.listening():
        signals.begin_wait(True)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.begin_wait(False) if signals.received is None else signals.end_wait()
        assert not wait_for_data(0.6)


def test_no_flag_is_left_behind(signals: StopSignals) -> None:
    with signals.listening():
        signals.begin_wait(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for_data(120)
    assert (INTERRUPTION.allowed, INTERRUPTION.here, INTERRUPTION.came) == (False, False, False)


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


def test_a_handler_that_is_set_during_the_run_stays(signals: StopSignals) -> None:
    def own(number: int, frame: Any) -> None:
        pass

    before = signal.getsignal(signal.SIGTERM)
    with handler_of(signal.SIGUSR1, signal.SIG_DFL):
        with signals.listening():
            signal.signal(signal.SIGUSR1, own)
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGTERM) is before


class Others(SingleProcess):
    """Rank 0 of two; the other one has got a Ctrl-C 5 s ago."""

    def agree(self, flag: bool) -> bool:
        return True

    def gather(self, value: Any) -> list[Any]:
        return [value, (int(signal.SIGINT), 5.0, "in epoch 1")]


def test_a_ctrl_c_of_which_another_rank_has_told_is_no_second_one(signals: StopSignals) -> None:
    with signals.listening():
        assert signals.agree(Others())
        assert "SIGINT came 5." in signals.told()
        assert "on rank 1, in epoch 1" in signals.told()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_torchrun_a_ctrl_c_that_comes_twice_at_once_is_one(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the terminal or from SLURM, and passed on."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("order", [("SIGTERM", "SIGUSR2"), ("SIGUSR1", "SIGUSR2")])
def test_a_users_handler_is_called_if_its_signal_came_behind_another_one(
    order: tuple[str, str], signals: StopSignals
) -> None:
    """SLURM sends SIGTERM too, and submitit's handler of SIGUSR2 queues the job again."""
    called: list[int] = []
    with handler_of(signal.SIGUSR2, lambda number, frame: called.append(number)):
        with signals.listening():
            for name in order:
                os.kill(os.getpid(), getattr(signal, name))
        assert called == []
        with pytest.raises(SystemExit) as ended:
            signals.end()
    assert called == [signal.SIGUSR2]
    assert ended.value.code == 128 + getattr(signal, order[0])


def test_workers_of_an_evaluation_outlive_a_signal_to_the_group(tmp_path: Path) -> None:
    def signal_all(model: Any, batch: Any) -> dict[str, Any]:
        for worker in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(int(worker.pid or 0), number)
        seen.append(len(multiprocessing.active_children()))
        return {"loss": model(batch).reshape(1)}

    seen: list[int] = []
    dataset = Hangs()
    dataset.hangs = False
    for persistent in (False, True):
        loader = DataLoader(dataset, 2, num_workers=2, prefetch_factor=1, persistent_workers=persistent)
        trainer = make_trainer(tmp_path / str(persistent), Net(), hooks=[EvalHook(loader, signal_all)])
        trainer.train()
        assert loader.worker_init_fn is None
    assert seen.count(2) >= 2 * 2 * 8  # not in the look at names


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
    """Notes whether a signal could interrupt it; loads from a loader of its own, if there is one."""

    def __init__(self, seen: list[bool], inner: Any = None, draws: bool = False) -> None:
        self.seen = seen
        self.inner = inner
        self.draws = draws

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        self.seen.append(INTERRUPTION.here)
        for _ in () if self.inner is None else self.inner.epoch(0):
            pass
        if self.draws:
            np.random.rand()
        return torch.ones(1)


class LooksAtItsOrder(Sampler[int]):
    """Notes whether a signal could interrupt it."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[int]:
        for index in range(2):
            self.seen.append(INTERRUPTION.here)
            yield index


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_may_be_interrupted_but_not_a_sampler_or_what_keeps_the_random_numbers(
    draws: bool, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_datasets: list[bool] = []
    in_ours: list[bool] = []
    in_order: list[bool] = []
    for name in ("__enter__", "__exit__", "mark", "moved", "seed_and_mark"):
        method = getattr(LoadingRng, name)

        def watched(*arguments: Any, method: Any = method) -> Any:
            in_ours.append(INTERRUPTION.here)
            return method(*arguments)

        monkeypatch.setattr(LoadingRng, name, watched)
    inner = source_of(DataLoader(LooksAtItself(in_datasets), batch_size=1), seed=0)
    collate = lambda samples: in_datasets.append(INTERRUPTION.here) or torch.stack(samples)  # noqa: E731
    dataset = LooksAtItself(in_datasets, inner, draws)
    settings: Any = {"batch_size": 1, "sampler": LooksAtItsOrder(in_order), "num_workers": num_workers}
    source = source_of(DataLoader(dataset, collate_fn=collate, **settings), seed=0)
    for _ in source.epoch(0):
        assert not INTERRUPTION.here
    source.close()
    assert in_order == [False] * len(in_order) != []
    assert in_ours == [False] * len(in_ours)
    if num_workers == 0:
        assert in_datasets == [True] * len(in_datasets) != []
        assert in_ours


def test_waiting_for_workers_may_be_interrupted_and_the_process_is_not_after_an_error() -> None:
    class Fails(LooksAtItself):
        def __getitem__(self, index: int) -> Tensor:
            raise LookupError

    for num_workers in (0, 1):
        source = source_of(DataLoader(Fails([]), batch_size=1, num_workers=num_workers), seed=0)
        with pytest.raises(LookupError):
            next(iter(source.epoch(0)))
        assert not INTERRUPTION.here


# ---------------------------------------------------------------- what is told, and users' own handlers

USERS = """
import os, signal, sys, torch
from torch import nn
from torch_frame import CheckpointerHook, HookBase, Trainer

class Send(HookBase):
    def after_iter(self):
        if self.trainer.cur_iter == 2:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = lambda model, batch: model(batch).square().mean()
trainer = Trainer(model, optimizer, None, [torch.ones(4, 2)] * 5, 1, sys.argv[1], hooks=[Send()], step_fn=loss)

def requeue(number, frame):
    saved = torch.load(trainer.ckpt_dir + "/latest.pth")["progress"]["iter"]
    print(f"requeued by {number}, saved {saved}", flush=True)
    if sys.argv[3] == "exits":
        sys.exit(3)

if sys.argv[3] != "none":
    signal.signal(getattr(signal, sys.argv[2]), requeue)
trainer.train()
print("returned")
"""


@pytest.mark.parametrize(
    ("name", "handler", "status"),
    [("SIGUSR1", "exits", 3), ("SIGUSR2", "returns", 0), ("SIGUSR2", "none", 140), ("SIGTERM", "returns", 143)],
)
def test_a_users_handler_of_sigusr_is_called_after_the_save(
    name: str, handler: str, status: int, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(USERS)
    command = [sys.executable, str(script), str(tmp_path / "run"), name, handler]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert ("requeued by" in done.stdout) == (handler != "none" and name != "SIGTERM")
    assert ("returned" in done.stdout) == (status == 0)
    log = (tmp_path / "run" / "log.txt").read_text()
    told = next(line for line in log.splitlines() if f"{name} came" in line)
    assert (
        "s ago, in epoch 1, iteration 2 of the run (train.py, line 9, in after_iter): saved after iteration 3" in told
    )


def test_the_line_names_what_was_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(Hangs(), batch_size=4)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, Net(), data=loader).train()
    told = next(line for line in caplog.messages if "SIGTERM came" in line)
    assert "while a batch was waited for in epoch 1" in told
    assert "(test_stop.py, line " in told
    assert "in __getitem__)" in told


def test_a_handler_of_c_is_left_alone(tmp_path: Path) -> None:
    """faulthandler's, of which python's `signal.getsignal` knows nothing."""
    code = """
import faulthandler, os, signal, sys
from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer
from pathlib import Path

faulthandler.register(signal.SIGUSR1)
send = On(after_iter=at_iter(2, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1)))
trainer = make_trainer(Path(sys.argv[1]), hooks=[send])
trainer.train()
print(trainer.progress.epoch)
"""
    done = run_python(code, tmp_path, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2\n")
    assert "most recent call first" in done.stderr


# ---------------------------------------------------------------- the state that is left


def interrupt(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def status_of(trainer: Trainer) -> int:
    """What the run ends its process with."""
    try:
        trainer.train()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_before_epoch_is_not_repeated_if_the_first_batch_was_waited_for(tmp_path: Path) -> None:
    """A hook that lowers the rate there would lower it twice."""
    samples = list(zip(torch.randn(12, 3), torch.randn(12, 1), strict=True))

    def run(folder: str, *, stops: bool) -> Trainer:
        def lower(trainer: Trainer) -> None:
            trainer.optimizer.param_groups[0]["lr"] *= 0.5
            trainer.model_or_module.layers[1].eval()  # type: ignore[index, operator]
            if stops and trainer.epoch == 1:
                interrupt(trainer)

        loader = DataLoader(samples, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        hooks = [On(before_epoch=lower), CheckpointerHook()]
        settings = {"max_epochs": 3, "seed": 5, "resume": "auto", "hooks": hooks}
        return make_trainer(tmp_path / folder, Net(norm=True, dropout=True), data=loader, **settings)

    torch.manual_seed(0)
    whole = run("whole", stops=False)
    whole.train()
    torch.manual_seed(0)
    stopped = run("stopped", stops=True)
    assert status_of(stopped) == 143
    assert (stopped.progress.epoch, stopped.progress.position) == (1, 0)
    resumed = run("stopped", stops=False)
    resumed.train()
    assert resumed.lr == whole.lr == 0.05 * 0.5**3
    assert not differences(weights_of(resumed.model), weights_of(whole.model))


def test_what_after_train_loads_is_not_saved_as_the_state_of_a_stopped_run(tmp_path: Path) -> None:
    def use_best(trainer: Trainer) -> None:
        trainer.load_best()
        trainer.save_at_safe_point("used.pth")

    def run(folder: str, *, stops: bool) -> Trainer:
        first = On(after_epoch=lambda trainer: trainer.epoch == 0 and trainer.save_at_safe_point("best.pth"))
        stop = On(after_iter=at_iter(7, interrupt)) if stops else None
        hooks = [first, stop, CheckpointerHook(save_metric="none"), On(after_train=use_best)]
        return make_trainer(tmp_path / folder, max_epochs=3, hooks=hooks, resume="auto")

    def last_weights(trainer: Trainer) -> Any:
        return torch.load(Path(trainer.ckpt_dir, "latest.pth"))["model"]

    whole = run("whole", stops=False)
    whole.train()
    stopped = run("stopped", stops=True)
    assert status_of(stopped) == 143
    assert Path(stopped.ckpt_dir, "used.pth").exists()
    resumed = run("stopped", stops=False)
    resumed.train()
    assert not differences(last_weights(resumed), last_weights(whole))


def test_a_signal_in_after_train_leaves_the_state_of_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(trainer: Trainer) -> None:
        for parameter in trainer.model.parameters():
            parameter.data.zero_()
        interrupt(trainer)

    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook(), On(after_train=spoil)])
    assert status_of(trainer) == 143
    for name in ("latest.pth", "previous.pth"):
        assert torch.load(Path(trainer.ckpt_dir, name))["model"]["layers.0.weight"].any()
    assert [line for line in caplog.messages if "SIGTERM came" in line and line.endswith("the run had ended.")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_in_a_run_inside_another_one_ends_both_saved(name: str, tmp_path: Path) -> None:
    """A hook that trains a probe."""

    def probe(trainer: Trainer) -> None:
        send = at_iter(2, lambda _: os.kill(os.getpid(), getattr(signal, name)))
        inner = make_trainer(tmp_path / f"probe_{trainer.epoch}", hooks=[On(after_iter=send)])
        inner.train()
        assert inner.progress.iter == 3

    outer = make_trainer(tmp_path / "run", max_epochs=3, hooks=[CheckpointerHook(), On(after_epoch=probe)])
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit):
        outer.train()
    saved = [torch.load(folder / "checkpoints" / "latest.pth") for folder in (tmp_path / "run", tmp_path / "probe_0")]
    assert [one["progress"]["iter"] for one in saved] == [5, 3]
    assert not (tmp_path / "probe_1").exists()
