"""Each update has the learning rate that torch's scheduler gives it in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.small_hooks import Recorder
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import EvalHook, HookBase, LRWarmupScheduler, SettingError, Trainer

PER_EPOCH = {
    "step": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "multi_step": lambda optimizer: MultiStepLR(optimizer, [1, 3]),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda n: 0.1 * n), ExponentialLR(optimizer, 0.5)], [2]
    ),
}


def optimizer_of(model: nn.Module) -> SGD:
    """Two groups with rates of their own."""
    first, *others = model.parameters()
    return SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.01}], lr=0.1)


@pytest.mark.parametrize("interval", ["epoch", "iter"])
@pytest.mark.parametrize("make", PER_EPOCH.values(), ids=PER_EPOCH)
def test_schedulers_step_per_epoch_or_iteration(make: Any, interval: Any, tmp_path: Path) -> None:
    twin = optimizer_of(Net())
    twin_scheduler = make(twin)
    expected = []
    for _ in range(4):
        for _ in range(3):
            expected.append([group["lr"] for group in twin.param_groups])
            twin.step()
            if interval == "iter":
                twin_scheduler.step()
        if interval == "epoch":
            twin_scheduler.step()

    used: list[list[float]] = []
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.register_step_pre_hook(lambda opt, *_: used.append([group["lr"] for group in opt.param_groups]))
    trainer = make_trainer(
        tmp_path, model, optimizer, make(optimizer), make_batches(3), 4, lr_scheduler_interval=interval
    )
    trainer.train()
    assert used == expected


def test_one_cycle_runs_to_its_last_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.5, epochs=2, steps_per_epoch=3)
    make_trainer(tmp_path, model, optimizer, scheduler, make_batches(3), 2, lr_scheduler_interval="iter").train()


def test_without_a_scheduler_the_rate_is_constant(tmp_path: Path) -> None:
    rates = Recorder(lambda trainer: trainer.lr)
    make_trainer(tmp_path, hooks=[rates]).train()
    assert rates.values == [0.05] * 10


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("constant", [0.01, 0.01, 0.01, 0.01, 0.1]),
        ("linear", [0.01, 0.0325, 0.055, 0.0775, 0.1]),
        ("exp", [0.01, 0.1 * 0.1**0.75, 0.1 * 0.1**0.5, 0.1 * 0.1**0.25, 0.1]),
    ],
)
def test_warm_up_counts_updates(method: Any, expected: list[float], tmp_path: Path) -> None:
    used: list[float] = []
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    make_trainer(
        tmp_path, model, optimizer, None, make_batches(5), 1, warmup_method=method, warmup_iters=4, warmup_factor=0.1
    ).train()
    assert used == pytest.approx(expected)


def test_reduce_on_plateau_follows_the_evaluation(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    evaluation = EvalHook([0], lambda model, batch: {"loss": [1.0]}, save_last=False)
    rates = Recorder(lambda trainer: trainer.lr)
    make_trainer(
        tmp_path,
        model,
        optimizer,
        scheduler,
        make_batches(1),
        4,
        lr_scheduler_metric="eval_loss",
        hooks=[evaluation, rates],
    ).train()
    assert rates.values == [0.1, 0.1, 0.05, 0.025]


def test_a_plateau_whose_metric_never_comes_is_told_after_the_last_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Late(HookBase):
        """Might log something."""

    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(
        tmp_path, model, optimizer, ReduceLROnPlateau(optimizer), hooks=[Late()], lr_scheduler_metric="acc"
    )
    trainer.train()
    assert trainer.progress.epoch == 2
    assert caplog.text.count("lr_scheduler_metric is 'acc', but nothing has been logged under this name") == 1


# ---------------------------------------------------------------- what scripts give and set


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize(
    ("epoch_len", "interval", "steps"), [(5, "epoch", 2), (None, "epoch", 2), (1, "epoch", 10), (None, "iter", 10)]
)
def test_a_warm_up_scheduler_of_the_scripts_own_steps_once(
    is_set: bool, epoch_len: int | None, interval: Any, steps: int, tmp_path: Path
) -> None:
    """As scripts of 1.7 set it. It was stepped twice an epoch; given to the constructor, once in `epoch_len` epochs."""
    model = Net()
    optimizer = optimizer_of(model)
    schedule = LRWarmupScheduler(StepLR(optimizer, 1, gamma=0.5), epoch_len)
    given = None if is_set else schedule
    trainer = make_trainer(tmp_path, model, optimizer, given, lr_scheduler_interval=interval)
    if is_set:
        trainer.lr_scheduler = schedule
    trainer.train(5, 5)
    assert trainer.lr == pytest.approx(0.1 * 0.5**steps)


def test_a_second_warm_up_is_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = optimizer_of(model)
    schedule = LRWarmupScheduler(StepLR(optimizer, 1), 5, "linear", 3)
    with pytest.raises(SettingError, match="two warm-ups"):
        make_trainer(tmp_path, model, optimizer, schedule, warmup_method="linear", warmup_iters=3)


class StepsSchedule(Trainer):
    """1.7's step, which steps the schedule itself."""

    def train_one_iter(self, batch: Any) -> Any:
        loss = self.model(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        return {"total_loss": loss.detach()}


class StepsBoth(StepsSchedule):
    """Written for a warm-up and a scheduler that are stepped one by one."""

    def train_one_iter(self, batch: Any) -> Any:
        values = super().train_one_iter(batch)
        if self.lr_scheduler_interval == "iter":
            self.lr_scheduler.step_scheduler()
        return values


@pytest.mark.parametrize("kind", [StepsSchedule, StepsBoth])
@pytest.mark.parametrize(("interval", "steps"), [("epoch", 2), ("iter", 10)])
def test_an_own_step_steps_its_schedule_once(
    kind: type[Trainer], interval: Any, steps: int, tmp_path: Path, caplog: Any
) -> None:
    model = Net()
    optimizer = optimizer_of(model)
    schedule = StepLR(optimizer, 1, gamma=0.5)
    settings: dict[str, Any] = {"hooks": [], "lr_scheduler_interval": interval}
    trainer = kind(model, optimizer, schedule, make_batches(), 2, tmp_path, **settings)
    trainer.train()
    assert trainer.lr == pytest.approx(0.1 * 0.5**steps)
    assert "no effect" not in caplog.text
