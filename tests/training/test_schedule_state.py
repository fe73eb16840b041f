"""Schedulers that people write and find: with a function, with another scheduler inside, with values of any kind."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from tests.small_hooks import On
from tests.small_runs import make_trainer, raised_by
from tests.small_scripts import STOP, Script, sgd, warned
from torch_frame import CheckpointError, Trainer
from torch_frame.checkpoint.values import encode
from torch_frame.training.schedule_state import state_of


class ThenAnother(LRScheduler):
    """Rises to the full rate, and steps another scheduler from there, as GradualWarmupScheduler does."""

    def __init__(self, optimizer: Optimizer, steps: int, after: LRScheduler) -> None:
        self.steps, self.after = steps, after
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * (self.last_epoch + 1) / (self.steps + 1) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch < self.steps:
            super().step()
        else:
            self.after.step()


class ByFunction(LRScheduler):
    def __init__(self, optimizer: Optimizer, function: Callable[[int], float]) -> None:
        self.function = function
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.function(self.last_epoch) for base in self.base_lrs]


class Phase(enum.Enum):
    FIRST = 1
    LATER = 2


class OfManyKinds(LRScheduler):
    def __init__(self, optimizer: Optimizer) -> None:
        self.recent: deque[int] = deque(maxlen=2)
        self.phase = Phase.FIRST
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.recent.append(self.last_epoch)
        factor = 1.0 if self.phase is Phase.FIRST else 0.5
        self.phase = Phase.LATER
        return [base * factor / (1 + sum(self.recent)) for base in self.base_lrs]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "another inside": lambda o: ThenAnother(o, 3, CosineAnnealingLR(o, 13)),
    "a function": lambda o: ByFunction(o, lambda step: 0.9**step),
    "a function inside": lambda o: SequentialLR(o, [LinearLR(o), ByFunction(o, lambda step: 0.9**step)], [3]),
    "many kinds": OfManyKinds,
}


@pytest.mark.parametrize("choice", [None, "checkpoint", "script"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_run_has_the_rates_of_the_uninterrupted_one(
    name: str, choice: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(sgd(), SCHEDULERS[name], {"lr_scheduler_interval": "iter"})
    whole = script.whole(tmp_path / "whole")
    script.stopped(tmp_path / "parts")
    caplog.clear()
    assert script.resumed(tmp_path / "parts", resume_settings=choice).rates == whole.rates[STOP:]
    assert warned(caplog) == []


def test_the_settings_of_a_scheduler_inside_count_as_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(eta_min: float) -> Script:
        make = lambda o: ThenAnother(o, 3, CosineAnnealingLR(o, 13, eta_min))  # noqa: E731
        return Script(sgd(), make, {"lr_scheduler_interval": "iter"})

    script(0.0).stopped(tmp_path / "parts")
    resumed = script(0.05).resumed(tmp_path / "parts", resume_settings="script")
    assert resumed.rates == script(0.05).whole(tmp_path / "whole").rates[STOP:]
    assert any("schedulers[0].eta_min (saved 0, the script's 0.05)" in line for line in warned(caplog))


def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        scheduler = LinearLR(optimizer)
        scheduler.thing = object()  # type: ignore[attr-defined]
        return scheduler

    trainer = Script(sgd(), make).trainer(tmp_path)
    error = raised_by(trainer.train, CheckpointError)
    assert "['thing'] is a builtins.object" in str(error)
    assert trainer.cur_iter == 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_an_attribute_is_kept_as_well(name: str, tmp_path: Path) -> None:
    def make() -> tuple[Trainer, Any]:
        trainer = make_trainer(tmp_path, create_new_dir=None)
        trainer.second = SCHEDULERS[name](SGD([torch.ones(1, requires_grad=True)], lr=0.1))  # type: ignore[attr-defined]
        return trainer, trainer.second  # type: ignore[attr-defined]

    trainer, scheduler = make()
    trainer.register_hooks([On(after_iter=lambda _: (scheduler.optimizer.step(), scheduler.step()))])
    trainer.train()
    trainer.save_checkpoint("latest.pth", save_single_model=False)
    resumed, again = make()
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert plain_of(again) == plain_of(scheduler)


def plain_of(scheduler: Any) -> dict[str, Any]:
    made: dict[str, Any] = encode(state_of(scheduler))
    return made
