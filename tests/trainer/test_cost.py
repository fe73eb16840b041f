"""What the loop costs a step, in calls of the library's functions: a count that is the same on every machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.optim import SGD

import torch_frame
from tests.small_hooks import On
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook, HookBase, LoggerHook, Trainer

OURS = str(Path(torch_frame.__file__).parent)


def functions_called(trainer: Trainer) -> int:
    """How many functions of the library, and of contextlib for it, one epoch's batches call."""
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call":
            count += frame.f_code.co_filename.startswith((OURS, contextlib.__file__))

    epoch = trainer.train_one_epoch

    def profiled() -> None:
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            epoch()
        finally:
            sys.setprofile(before)

    trainer.train_one_epoch = profiled  # type: ignore[method-assign]
    trainer.train()
    return count


SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "no hooks": ({}, 28),
    "default hooks": ({"hooks": [CheckpointerHook, LoggerHook]}, 30),
    "step_fn": ({"step_fn": lambda model, batch: model(batch)}, 30),
    "windows of 4": ({"gradient_accumulation_steps": 4}, 33),
    "a hook around each update": ({"hooks": [lambda: On(before_update=id, after_update=id)]}, 28),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_calls_few_functions_of_the_library(name: str, tmp_path: Path) -> None:
    settings, most = SETTINGS[name]

    def called(num_batches: int) -> int:
        hooks = [make() for make in settings.get("hooks", ())]
        work_dir = tmp_path / str(num_batches)
        return functions_called(
            make_trainer(work_dir, data=make_batches(num_batches), max_epochs=1, **{**settings, "hooks": hooks})
        )

    a_step = (called(44) - called(20)) / 24  # without what an epoch calls once, and fewer than a log period
    assert a_step <= most


def test_hooks_that_come_in_the_middle_of_an_epoch_are_called_from_then_on(tmp_path: Path) -> None:
    calls: list[str] = []

    class Late(HookBase):
        def before_iter(self) -> None:
            calls.append(f"before {self.trainer.inner_iter}")

        def after_iter(self) -> None:
            calls.append(f"after {self.trainer.inner_iter}")

        def after_update(self) -> None:
            calls.append(f"updated {self.trainer.inner_iter}")

    class Registers(HookBase):
        def before_iter(self) -> None:
            if self.trainer.inner_iter == 1:
                self.trainer.register_hooks([Late()])

    make_trainer(tmp_path, hooks=[Registers()], data=make_batches(3), max_epochs=1).train()
    assert calls == ["before 1", "updated 1", "after 1", "before 2", "updated 2", "after 2"]


def test_a_step_that_gives_another_optimizer_is_updated_by_that_one(tmp_path: Path) -> None:
    model = Net()
    other = SGD(model.parameters(), lr=0.0)

    def step(model: Any, batch: Any) -> Any:
        if trainer.cur_iter == 0:
            trainer.optimizer = other
        return model(batch)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = make_trainer(tmp_path, model, data=make_batches(3), max_epochs=1, step_fn=step)
    trainer.train()
    assert all((now == was).all() for now, was in zip(model.parameters(), before, strict=True))
