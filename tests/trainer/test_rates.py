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
from torch_frame import EvalHook, HookBase

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
