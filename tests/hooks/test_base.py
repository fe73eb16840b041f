"""Hooks are called in the order that HookBase documents, and each at its time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from tests.small_hooks import Stages
from tests.small_runs import Net, UserError, make_batches, make_trainer, raised_by
from torch_frame import HookBase, LoggerHook, SettingError, Trainer
from torch_frame.hooks.base import STAGES, HookTrainer


class WatchedTrainer(Trainer):
    calls: list[str]

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        self.calls.append(f"save {file_name}")


class AskForSaves(HookBase):
    """Asks for a whole state after each batch and after each epoch."""

    def after_iter(self) -> None:
        self.trainer.save_at_safe_point("iter", save_single_model=False)

    def after_epoch(self) -> None:
        self.trainer.save_at_safe_point("epoch", save_single_model=False)


def documented_order(num_epochs: int, num_batches: int, window_len: int, interval: str) -> list[str]:
    """The pseudo-code of HookBase, run."""
    order = ["before_train"]
    for _ in range(num_epochs):
        order += ["before_epoch"]
        for batch in range(1, num_batches + 1):
            order += ["before_iter", "forward", "backward"]
            is_complete = batch % window_len == 0 or batch == num_batches
            if is_complete:
                order += ["before_update", "optimizer.step"]
                order += ["scheduler.step"] if interval == "iter" else []
                order += ["ema.update", "after_update"]
            order += ["after_iter"]
            order += ["save iter"] if is_complete else []
        order += ["scheduler.step"] if interval == "epoch" else []
        order += ["after_epoch", "save epoch"]
    return [*order, "after_train", "close"]


@pytest.mark.parametrize("interval", ["epoch", "iter"])
@pytest.mark.parametrize("window_len", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("num_epochs", "num_batches"), [(0, 3), (1, 1), (2, 5)])
def test_the_order_of_calls_is_the_documented_one(
    num_epochs: int, num_batches: int, window_len: int, interval: Any, tmp_path: Path
) -> None:
    hook = Stages()
    calls = hook.calls
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.register_forward_pre_hook(lambda *_: calls.append("forward"))
    model.layers[0].bias.register_post_accumulate_grad_hook(lambda *_: calls.append("backward"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("optimizer.step"))

    class WatchedScheduler(StepLR):
        def step(self, *args: Any) -> None:
            calls.append("scheduler.step")
            super().step(*args)

    scheduler = WatchedScheduler(optimizer, 1)
    trainer = WatchedTrainer(
        model, optimizer, scheduler, make_batches(num_batches), num_epochs, tmp_path / "run",
        hooks=[AskForSaves(), hook], use_ema=True, gradient_accumulation_steps=window_len, lr_scheduler_interval=interval,
    )  # fmt: skip
    trainer.calls = calls
    update = trainer.model_ema.update
    trainer.model_ema.update = lambda model: (calls.append("ema.update"), update(model))
    calls.clear()
    trainer.train()
    assert calls == documented_order(num_epochs, num_batches, window_len, interval)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("on_exception", "close", "after_train")])
def test_an_exception_is_told_to_all_hooks_and_all_are_closed(stage: str, tmp_path: Path) -> None:
    class Failing(HookBase):
        pass

    def fail(self: Any) -> None:
        raise UserError("mine")

    setattr(Failing, stage, fail)
    calls: list[str] = []
    first = Stages(note=lambda stage, trainer: f"a.{stage}", into=calls)
    second = Stages(note=lambda stage, trainer: f"b.{stage}", into=calls)
    trainer = make_trainer(tmp_path, hooks=[first, Failing(), second])
    error = raised_by(trainer.train, UserError)
    assert str(error) == "mine"
    assert first.errors == second.errors == [error]
    assert calls[-4:] == ["a.on_exception", "b.on_exception", "a.close", "b.close"]
    assert f"a.{stage}" in calls
    assert f"b.{stage}" not in calls
    assert not any("after_train" in call for call in calls)


def test_ctrl_c_is_told_and_goes_on(tmp_path: Path) -> None:
    hook = Stages()

    def interrupt(model: Any, batch: Any) -> Any:
        raise KeyboardInterrupt

    error = raised_by(make_trainer(tmp_path, hooks=[hook], step_fn=interrupt).train, KeyboardInterrupt)
    assert hook.calls[-2:] == ["on_exception", "close"]
    assert hook.errors == [error]


def test_a_hook_that_fails_at_an_error_does_not_hide_it(tmp_path: Path) -> None:
    class Failing(HookBase):
        def before_iter(self) -> None:
            raise UserError("the first")

        def on_exception(self, error: BaseException) -> None:
            raise RuntimeError("the second")

        def close(self) -> None:
            raise RuntimeError("the third")

    hook = Stages()
    error = raised_by(make_trainer(tmp_path, hooks=[Failing(), hook]).train, UserError)
    assert str(error) == "the first"
    assert hook.calls[-2:] == ["on_exception", "close"]
    assert hook.errors == [error]


def test_a_close_that_fails_is_raised_after_all_are_closed(tmp_path: Path) -> None:
    class Failing(HookBase):
        def close(self) -> None:
            raise UserError("closing")

    hook = Stages()
    raised_by(make_trainer(tmp_path, hooks=[Failing(), hook]).train, UserError)
    assert hook.calls[-1] == "close"


def test_hooks_run_in_the_order_of_registration_with_the_logger_last(tmp_path: Path) -> None:
    first, second, third, logger = Stages(), Stages(), Stages(), LoggerHook()
    trainer = make_trainer(tmp_path, hooks=[logger, first, None, second])
    trainer.register_hooks([third])
    assert trainer.hooks == (first, second, third, logger)
    assert trainer.registered_hook_names == ["Stages", "Stages", "Stages", "LoggerHook"]


def test_one_object_cannot_be_registered_twice(tmp_path: Path) -> None:
    hook = Stages()
    with pytest.raises(SettingError, match="twice"):
        make_trainer(tmp_path, hooks=[hook, hook])


def test_a_method_put_on_the_object_is_called(tmp_path: Path) -> None:
    hook, epochs = HookBase(), []
    hook.after_epoch = lambda: epochs.append(hook.trainer.epoch)  # type: ignore[method-assign]
    make_trainer(tmp_path, hooks=[hook]).train()
    assert epochs == [0, 1]


def test_every_n_and_is_last_count_as_their_names_say(tmp_path: Path) -> None:
    rows: dict[str, list[int]] = {}

    class Times(HookBase):
        def note(self, name: str, is_time: bool) -> None:
            if is_time:
                rows.setdefault(name, []).append(self.trainer.cur_iter)

        def after_iter(self) -> None:
            self.note("iters 4", self.every_n_iters(4))
            self.note("iters 0", self.every_n_iters(0))
            self.note("inner 2", self.every_n_inner_iters(2))
            self.note("last inner", self.is_last_inner_iter())
            self.note("last", self.is_last_iter())

        def after_epoch(self) -> None:
            self.note("epochs 2", self.every_n_epochs(2))
            self.note("last epoch", self.is_last_epoch())
            self.note("epochs -1", self.every_n_epochs(-1))

    make_trainer(tmp_path, data=make_batches(3), max_epochs=5, hooks=[Times()]).train()
    assert rows == {
        "iters 4": [3, 7, 11],
        "inner 2": [1, 4, 7, 10, 13],
        "last inner": [2, 5, 8, 11, 14],
        "last": [14],
        "epochs 2": [5, 11],
        "last epoch": [14],
    }


def test_values_of_a_batch_are_there_in_after_iter(tmp_path: Path) -> None:
    class Look(HookBase):
        def after_iter(self) -> None:
            assert self.metric_storage.latest_iters()["total_loss"] == self.trainer.cur_iter

        def after_epoch(self) -> None:
            self.log(self.trainer.epoch, mine=torch.tensor(2.0), smooth=False)

    trainer = make_trainer(tmp_path, hooks=[Look()])
    trainer.train()
    assert trainer.metric_storage["mine"].latest == 2.0
    assert trainer.metric_storage.latest_iters()["mine"] == 1


def test_check_refuses_before_anything_is_made(tmp_path: Path) -> None:
    class Picky(HookBase):
        def check(self) -> None:
            raise SettingError("not like this")

    with pytest.raises(SettingError, match="not like this"):
        make_trainer(tmp_path / "run", hooks=[Picky()]).train()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- what a hook may use of its trainer

NAMES = (
    "epoch inner_iter cur_iter start_epoch epoch_len max_epochs max_iters lr work_dir ckpt_dir tb_log_dir model should_stop "
    "model_or_module model_evaluate optimizer lr_scheduler data_loader metric_storage log log_param register_hooks"
)
RELIED_ON = NAMES.split()
"""What hooks of 1.7 use."""


def names_of_the_protocol() -> set[str]:
    return {name for name in (*HookTrainer.__annotations__, *vars(HookTrainer)) if not name.startswith("_")}


def test_the_protocol_has_what_hooks_rely_on() -> None:
    assert set(RELIED_ON) <= names_of_the_protocol()


def test_a_trainer_has_all_that_the_protocol_promises(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert [name for name in names_of_the_protocol() if not hasattr(trainer, name)] == []
