"""SIGTERM, SIGUSR1 and Ctrl-C in every phase: the window is finished, the run saved, and resumed bitwise."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kit import (
    Ahead,
    Config,
    Training,
    Uninterrupted,
    checkpoints,
    events,
    is_whole,
    result,
    rows,
    saved_iter,
    selected,
    temporary_files,
)
from tests.faults.training import WINDOW
from tests.small_data import wait_until
from tests.small_runs import make_trainer
from torch_frame import HookBase

STATUS = {"TERM": 143, "INT": 130, "USR1": 138, "USR2": 140}
FORK, SPAWN = Config("infinite", 2, "fork"), Config("infinite", 2, "spawn")
EVAL_WORKERS = Config("plain", 0, "fork", eval_workers=2)
PHASES = {  # when the signal comes: up to which iteration the run is saved then
    "before_train:1": 0,
    "before_epoch:1": 0,
    "before_iter:1": 3,
    "forward:4": 6,
    "backward:5": 6,  # in the middle of a window
    "before_update:2": 6,
    "stepped:2": 6,  # the optimizer has stepped, schedule and EMA have not
    "after_iter:6": 6,
    "after_iter:7": 7,
    "evaluate:2": 7,  # the first one is EvalHook's look at names
    "evaluate:4": 7,
    "evaluated:1": 7,
    "logged:1": 7,
    "after_train:1": 21,
    "waiting": 3,
    "waiting in a window": 6,
    "waiting for the workers": 0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A signal that asks a run to end.

    Attributes:
        phase: of PHASES.
        name: of the signal, without SIG.
        to_group: every process of the group gets it, the workers too.
    """

    phase: str
    name: str
    to_group: bool
    config: Config

    def __str__(self) -> str:
        return f"{self.phase}-{self.name}-{'group' if self.to_group else 'alone'}-{self.config}"


@dataclasses.dataclass
class Ended:
    """What was seen of a run that a signal has ended and that was resumed."""

    status: int
    saved_iter: int
    seconds: float
    """From the signal to the end."""
    slowness: float
    events: list[dict[str, Any]]
    left_processes: list[int]
    left_files: list[str]
    output: str
    folder: Path


FEW = [
    Case("before_train:1", "TERM", False, Config("plain", 0)),
    Case("forward:4", "TERM", True, FORK),
    Case("backward:5", "INT", True, FORK),
    Case("before_update:2", "USR2", True, Config("plain", 2, "fork")),
    Case("stepped:2", "INT", False, Config("plain", 0)),
    Case("after_iter:7", "TERM", True, Config("persistent", 2, "fork")),
    Case("evaluate:2", "INT", True, FORK),
    Case("logged:1", "USR1", False, Config("plain", 0)),
    Case("waiting", "TERM", True, FORK),
    Case("waiting", "USR1", True, SPAWN),
    Case("waiting", "INT", False, Config("infinite", 0)),
    Case("waiting", "TERM", True, Config("plain", 0)),
    Case("waiting in a window", "TERM", False, Config("plain", 2, "fork")),
    Case("waiting for the workers", "INT", True, SPAWN),
    Case("evaluate:4", "TERM", True, EVAL_WORKERS),
]


def _with_workers_for(phase: str, config: Config) -> Config:
    if phase == "waiting for the workers":  # forked ones are there at once
        return SPAWN
    return FORK if phase == "waiting in a window" and config.workers == 0 else config


CONFIGS = [FORK, Config("plain", 0), SPAWN, Config("plain", 2, "fork"), Config("persistent", 2, "spawn")]
OTHERS = [  # workers that the signal ends, too
    *(Case("evaluate:4", name, True, EVAL_WORKERS) for name in STATUS),
    *(Case("after_iter:6", name, True, Config("own", 2, "fork")) for name in STATUS),
]
ALL = [
    Case(phase, name, to_group, _with_workers_for(phase, config))
    for (phase, name, to_group), config in zip(
        itertools.product(PHASES, STATUS, (False, True)), itertools.cycle(CONFIGS), strict=False
    )
] + OTHERS


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference: Uninterrupted
) -> Iterator[Ahead]:
    """What has become of each case: `Ended`, or of "fork" and "spawn" what `interrupt_twice` returns."""
    folder = tmp_path_factory.mktemp("ended")
    order = [index for event in events(reference[FORK], "iter") for index in event["indices"]]
    numbers = itertools.count()

    def work(case: Case | str) -> Any:
        run = folder / str(next(numbers))
        return interrupt_twice(run, case, order) if isinstance(case, str) else end(run, case, order)

    with Ahead(work, selected(request, "case")) as ahead:
        yield ahead


def end(folder: Path, case: Case, order: list[int]) -> Ended:
    """Train, end the run by the signal, and resume it.

    Args:
        order: the samples' indices in the order of the run.
    """
    options = list(case.config.options)
    if case.phase == "waiting":
        options += ["--block", str(order[WINDOW * 4])]  # the first sample of the second window
    elif case.phase == "waiting in a window":
        options += ["--block", str(order[(WINDOW + 1) * 4])]
    elif ":" in case.phase:
        options += ["--at", case.phase, "--send", case.name, *(["--to-group"] if case.to_group else [])]
    number = getattr(signal, f"SIG{case.name}")
    with Training(folder, *options, by_shell=True) as training:
        if case.phase == "waiting for the workers":
            training.wait_for("begin")
            time.sleep(0.3)
            training.send(number, to_group=case.to_group)
        elif ":" in case.phase:
            training.wait_for("signal")
        else:
            training.wait_for("blocked")
            training.wait_for("iter", PHASES[case.phase] - (case.phase != "waiting") * 2)
            time.sleep(0.3)
            training.send(number, to_group=case.to_group)
        if case.phase == "waiting in a window":
            time.sleep(0.5)
            (folder / "released").touch()
        sent = time.monotonic()
        status = training.shell_status()
        seconds = time.monotonic() - sent
        # multiprocessing's resource tracker ends after the training process
        wait_until(lambda: not training.members())
        found = Ended(
            status, saved_iter(checkpoints(folder) / "latest.pth"), seconds, training.slowness, training.events(),
            training.members(), temporary_files(folder), training.output.read_text(), folder,
        )  # fmt: skip
    with Training(folder, *case.config.options, "--seed", "5") as training:
        assert training.wait() == 0, training.tail()
        assert training.events("begin")[0]["resumed_iter"] == found.saved_iter
    return found


every_case = pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case)) for case in FEW),
        *(
            pytest.param(case, id=str(case), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
            for case in ALL
            if case not in FEW
        ),
    ],
)


@every_case
def test_a_signal_ends_the_run_saved_at_its_next_whole_state(case: Case, ended: Ahead) -> None:
    found: Ended = ended.result(case)
    assert found.status == STATUS[case.name], found.output
    assert found.saved_iter == PHASES[case.phase], found.output
    assert is_whole(checkpoints(found.folder) / "latest.pth")
    assert f"SIG{case.name} came" in found.output or case.phase == "after_train:1"


@every_case
def test_no_process_and_no_temporary_file_is_left(case: Case, ended: Ahead) -> None:
    found: Ended = ended.result(case)
    assert not found.left_processes
    assert not found.left_files


@every_case
def test_the_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(
    case: Case, ended: Ahead, reference: Uninterrupted
) -> None:
    found: Ended = ended.result(case)
    if case.config.loader == "own":
        return  # whose order is of its own
    assert result(found.folder) == result(reference[case.config])
    assert rows(found.folder) == rows(reference[case.config])


@every_case
def test_the_end_is_not_waited_for(case: Case, ended: Ahead) -> None:
    found: Ended = ended.result(case)
    if case.phase.startswith("evaluate:"):  # in the batch under way, and not when all three are evaluated
        num_evaluated = len([event for event in found.events if event["what"] == "evaluate"])
        assert num_evaluated == int(case.phase[-1])
    assert found.seconds < 15 * found.slowness


# ---------------------------------------------------------------- Ctrl-C again


@pytest.mark.parametrize("case", ["fork", "spawn"])
def test_a_second_ctrl_c_ends_a_run_that_waits_inside_a_window_at_once(case: str, ended: Ahead) -> None:
    status, came_between, seconds, slowness = ended.result(case)
    assert status == 130
    assert came_between == []  # no sample was waited for, no window finished, no hook called
    assert seconds < 8 * slowness


def interrupt_twice(folder: Path, context: str, order: list[int]) -> tuple[int, list[Any], float, float]:
    """Ctrl-C, and again when it has been handled: the status, what happened between the second one and the end, how long that
    took, and how slow the machine is."""
    options = [*Config("infinite", 2, context).options, "--block", str(order[(WINDOW + 1) * 4])]
    with Training(folder, *options, by_shell=True) as training:
        training.wait_for("blocked")
        training.wait_for("iter", WINDOW + 1)
        training.send(signal.SIGINT, to_group=True)
        training.wait_for("asked to end")
        time.sleep(0.5)
        assert training.process.poll() is None, "it ended with its window half done"
        num_events = len(training.events())
        training.send(signal.SIGINT, to_group=True)
        started = time.monotonic()
        status, seconds = training.shell_status(), time.monotonic() - started
        assert wait_until(lambda: not training.members(), 60)
        assert saved_iter(checkpoints(folder) / "latest.pth") == WINDOW
        return status, training.events()[num_events:], seconds, training.slowness


# ---------------------------------------------------------------- handlers


class Signalled(HookBase):
    """Sends this process a signal in the run's third iteration, and looks at the handlers before."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.during: list[Any] = []

    def after_iter(self) -> None:
        self.during = handlers()
        if self.number is not None and self.trainer.cur_iter == 2:
            os.kill(os.getpid(), self.number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.fixture
def own_handlers() -> Iterator[list[Any]]:
    """The user's own handlers, as a notebook has them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *args, n=number: None) for number in numbers]
    yield handlers()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", [None, "TERM", "USR1", "INT"])
def test_the_users_handlers_are_back_when_train_has_ended(tmp_path: Path, name: str | None, own_handlers: Any) -> None:
    hook = Signalled(None if name is None else getattr(signal, f"SIG{name}"))
    trainer = make_trainer(tmp_path, hooks=[hook])
    if name in (None, "USR1"):  # a user's own handler is called instead of an exit
        trainer.train()
    else:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
            trainer.train()
        assert getattr(raised.value, "code", 130) == STATUS[name]
    assert trainer.progress.iter == (10 if name is None else 3)
    assert handlers() == own_handlers
    assert all(during != own for during, own in zip(hook.during, own_handlers, strict=True))


def test_a_run_that_was_ended_by_a_signal_can_be_trained_on(tmp_path: Path) -> None:
    """In a notebook: the trainer that was interrupted goes on."""
    trainer = make_trainer(tmp_path, hooks=[Signalled(signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.progress.iter == 3
    trainer.train()
    assert trainer.progress.iter == 10


def test_outside_the_main_thread_no_handler_is_installed(tmp_path: Path) -> None:
    hook = Signalled(None)
    trainer = make_trainer(tmp_path, hooks=[hook])
    before = handlers()
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.progress.epoch == 2
    assert hook.during == before == handlers()


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as nohup does with SIGHUP
    try:
        trainer = make_trainer(tmp_path, hooks=[Signalled(signal.SIGUSR1)])
        trainer.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert trainer.progress.epoch == 2
