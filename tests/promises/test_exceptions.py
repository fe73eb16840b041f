"""However a run ends: hooks are told, everything is closed, and the error reaches the user as it was raised."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from tests.small_data import open_files
from tests.small_hooks import On, Stages, at_iter
from tests.small_runs import Net, Unsized, environment, library_frames, make_batches, make_trainer, raised_by
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, Trainer

STAGES = [
    "before_train",
    "before_epoch",
    "before_iter",
    "before_update",
    "after_update",
    "after_iter",
    "after_epoch",
    "after_train",
]
ERRORS: list[type[BaseException]] = [ValueError, KeyboardInterrupt, SystemExit, AssertionError]


def witness() -> Stages:
    """Writes down how the run ended."""
    return Stages("on_exception", "close")


class FailingData:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        yield from make_batches(2)
        raise self.error


class FailingNet(Net):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, batch: Any) -> Tensor:
        raise self.error


class FailingBackward(torch.autograd.Function):
    error: BaseException

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise FailingBackward.error


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def with_scheduler(error: BaseException) -> dict[str, Any]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    calls = iter([1.0])

    def rate(n: int) -> float:
        value = next(calls, None)
        if value is None:
            raise error
        return value

    return {"model": model, "optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, rate)}


def with_optimizer(error: BaseException) -> dict[str, Any]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(raiser(error))
    return {"model": model, "optimizer": optimizer}


def with_backward(error: BaseException) -> dict[str, Any]:
    FailingBackward.error = error
    return {"step_fn": lambda model, batch: FailingBackward.apply(model(batch))}


# In the user's model, step, loss or hook: at most 3 frames of ours stand above the error.
IN_THE_STEP: dict[str, Callable[[BaseException], dict[str, Any]]] = {
    "model": lambda error: {"model": FailingNet(error)},
    "step_fn": lambda error: {"step_fn": raiser(error)},
    "loss": lambda error: {"step_fn": lambda model, batch: raiser(error)(model(batch))},
    "loss_weight": lambda error: {"loss_weight": raiser(error)},
    **{stage: lambda error, stage=stage: {"hooks": [On(**{stage: raiser(error)})]} for stage in STAGES},
}
ELSEWHERE: dict[str, Callable[[BaseException], dict[str, Any]]] = {
    "data": lambda error: {"data": FailingData(error)},
    "backward": with_backward,
    "optimizer": with_optimizer,
    "scheduler": with_scheduler,
    "eval_func": lambda error: {"hooks": [EvalHook([0], raiser(error))]},
    "eval_data": lambda error: {"hooks": [EvalHook(FailingData(error), lambda model, batch: {"a": [1.0]})]},
}
PLACES = {**IN_THE_STEP, **ELSEWHERE}


def trainer_failing(tmp_path: Path, place: str, error: BaseException, *hooks: HookBase, **settings: Any) -> Trainer:
    made = PLACES[place](error)
    return make_trainer(tmp_path / "run", **{**settings, **made, "hooks": [*hooks, *made.pop("hooks", [])]})


# ---------------------------------------------------------------- hooks are told, and closed


@pytest.mark.parametrize("place", PLACES)
def test_each_hook_is_told_of_the_error_and_closed_once(place: str, tmp_path: Path) -> None:
    error = ValueError("mine")
    first, last = witness(), witness()
    trainer = trainer_failing(tmp_path, place, error, first, last)
    assert raised_by(trainer.train, ValueError) is error
    for hook in (first, last):
        assert (hook.calls, hook.errors) == (["on_exception", "close"], [error])


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["model", "before_train", "after_iter", "eval_func"])
def test_ctrl_c_and_exit_are_told_as_errors_are(place: str, error: type[BaseException], tmp_path: Path) -> None:
    raised, hook = error("mine"), witness()
    trainer = trainer_failing(tmp_path, place, raised, hook)
    assert raised_by(trainer.train, error) is raised
    assert (hook.calls, hook.errors) == (["on_exception", "close"], [raised])
    assert error.__name__ in Path(trainer.log_file).read_text(encoding="utf-8")


def test_a_normal_end_closes_and_tells_of_no_error(tmp_path: Path) -> None:
    hook = witness()
    make_trainer(tmp_path, hooks=[hook]).train()
    assert hook.calls == ["close"]


def test_a_hook_that_fails_at_an_error_does_not_hide_it(tmp_path: Path) -> None:
    error = ValueError("mine")
    first, last = witness(), witness()
    failing = On(on_exception=raiser(RuntimeError("on_exception")), close=raiser(RuntimeError("close")))
    trainer = make_trainer(tmp_path, hooks=[first, failing, last], step_fn=raiser(error))
    assert raised_by(trainer.train, ValueError) is error
    assert first.calls == last.calls == ["on_exception", "close"]
    assert first.errors == last.errors == [error]


def test_a_close_that_fails_is_raised_when_all_the_others_are_closed(tmp_path: Path) -> None:
    error = ValueError("mine")
    first, last = witness(), witness()
    trainer = make_trainer(tmp_path, hooks=[first, On(close=raiser(error)), last])
    assert raised_by(trainer.train, ValueError) is error
    assert first.calls == last.calls == ["close"]


def test_a_run_can_be_started_again_after_an_error(tmp_path: Path) -> None:
    """A notebook's user interrupts, looks, and goes on."""
    model = Net()
    failing = On(after_iter=at_iter(2, raiser(KeyboardInterrupt())))
    trainer = make_trainer(tmp_path, model, hooks=[failing], gradient_accumulation_steps=2)
    raised_by(trainer.train, KeyboardInterrupt)
    failing.after_iter = lambda: None  # type: ignore[method-assign]
    trainer.hook_caller.stages["after_iter"].clear()
    trainer.train()
    assert trainer.progress.epoch == 2


# ---------------------------------------------------------------- files are closed, nothing is left changed


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("place", [*PLACES, "close", "nowhere"])
def test_all_files_and_handlers_are_closed_however_the_run_ends(place: str, tmp_path: Path) -> None:
    logger = logging.getLogger("torch_frame")
    before = (logger.level, logger.propagate, list(logger.handlers), threading.active_count())
    hooks: list[HookBase] = [CheckpointerHook(), LoggerHook(period=1)]
    error = ValueError("mine")
    if place == "nowhere":
        make_trainer(tmp_path / "run", hooks=hooks).train()
    elif place == "close":
        raised_by(make_trainer(tmp_path / "run", hooks=[*hooks, On(close=raiser(error))]).train, ValueError)
    else:
        raised_by(trainer_failing(tmp_path, place, error, *hooks).train, ValueError)
    assert [name for name in open_files() if name.startswith(str(tmp_path))] == []
    assert (logger.level, logger.propagate, list(logger.handlers), threading.active_count()) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["model", "loss", "eval_func", "before_update", "backward"])
def test_torchs_modes_are_as_they_were(place: str, precision: Any, tmp_path: Path) -> None:
    trainer = trainer_failing(tmp_path, place, ValueError(), precision=precision)
    raised_by(trainer.train, ValueError)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert trainer.model.training


# ---------------------------------------------------------------- the traceback


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}], ids=["each", "windows"])
@pytest.mark.parametrize("data", [make_batches, Unsized], ids=["list", "no_length"])
@pytest.mark.parametrize("place", IN_THE_STEP)
def test_at_most_three_frames_of_ours_stand_above_the_users_error(
    place: str, data: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    error = ValueError("mine")
    made = {"data": data(), **settings, **PLACES[place](error)}
    raised = raised_by(make_trainer(tmp_path, **made).train, ValueError)
    assert raised is error
    assert len(library_frames(raised)) <= 3, library_frames(raised)


@pytest.mark.parametrize("stage", ["before_update", "after_update"])
def test_so_few_also_in_the_last_window_of_a_loader_without_length(stage: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, data=Unsized(), gradient_accumulation_steps=9, hooks=[On(**{stage: raiser(ValueError())})]
    )
    frames = library_frames(raised_by(trainer.train, ValueError))
    assert 0 < len(frames) <= 3, frames


@pytest.mark.parametrize("place", ELSEWHERE)
def test_at_most_six_frames_stand_above_any_other_error(place: str, tmp_path: Path) -> None:
    error = ValueError("mine")
    frames = library_frames(raised_by(make_trainer(tmp_path, **PLACES[place](error)).train, ValueError))
    assert 0 < len(frames) <= 6, frames


@pytest.mark.parametrize("place", PLACES)
def test_the_traceback_is_not_edited(place: str, tmp_path: Path) -> None:
    """It leads from this test to the raising line, and no other error is put in front of or behind it."""
    error = ValueError("mine")
    raised_by(make_trainer(tmp_path, **PLACES[place](error)).train, ValueError)
    names, traceback = [], error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert names[:2] == ["raised_by", "train"]
    assert names[-1] in ("fail", "forward", "backward", "__iter__", "rate")
    assert error.__cause__ is None
    assert error.__context__ is None
    assert str(error) == "mine"


# ---------------------------------------------------------------- a real Ctrl-C

SCRIPT = """
import os, sys, time
import torch
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook

torch.set_num_threads(1)
where = sys.argv[1]

class Told(HookBase):
    def on_exception(self, error):
        print("told", type(error).__name__, flush=True)
    def close(self):
        print("closed", flush=True)

def wait():
    if trainer.epoch == 1:
        trainer.wait_for_saves()  # the second Ctrl-C gives up a save that is under way
        print("ready", flush=True)
        while trainer.stop_signals.received is None:
            time.sleep(0.01)
        print("asked to end", flush=True)
        time.sleep(60)

def step(model, batch):
    if where == "step":
        wait()
    return model(batch)

def evaluate(model, batch):
    if where == "eval":
        wait()
    return {"acc": [1.0]}

model = Net()
trainer = make_trainer("run", model, step_fn=step, max_epochs=3, create_new_dir=None,
                       hooks=[EvalHook(make_batches(1), evaluate), Told(), CheckpointerHook(), LoggerHook()])
try:
    trainer.train()
except KeyboardInterrupt:
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}")] if os.path.isdir("/proc/self/fd") else []
    print("open", [name for name in names if name.startswith(os.path.abspath("run"))], flush=True)
    raise
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console")
@pytest.mark.parametrize("where", ["step", "eval"])
def test_a_second_ctrl_c_ends_a_run_at_once_and_in_order(where: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), where]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert "ready\n" in process.stdout  # reads up to this line
            process.send_signal(signal.SIGINT)  # asks the run to end when the step is done
            assert "asked to end\n" in process.stdout
            process.send_signal(signal.SIGINT)  # ends it now
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    lines = output.splitlines()
    assert lines.index("told KeyboardInterrupt") < lines.index("closed") < lines.index("open []")
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "KeyboardInterrupt" in Path(tmp_path, "run", "log.txt").read_text(encoding="utf-8")
    resumed = make_trainer(tmp_path / "run", create_new_dir=None, max_epochs=3, hooks=[CheckpointerHook()])
    resumed.load_checkpoint("latest.pth")
    assert resumed.progress.epoch >= 1


def test_a_failed_runs_model_can_be_freed(tmp_path: Path) -> None:
    """Nothing of ours keeps the model alive by the traceback or by a handler."""
    model: nn.Module = Net()
    alive = weakref.ref(model)
    trainer = make_trainer(tmp_path, model, step_fn=raiser(ValueError()), hooks=[LoggerHook()])
    with pytest.raises(ValueError, match=r"^$"):
        trainer.train()
    del model, trainer
    gc.collect()
    assert alive() is None
