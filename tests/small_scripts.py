"""A script, run until its middle and resumed with changes: for tests of what counts then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    LambdaLR,
)
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, make_batches, make_trainer, weights_of
from torch_frame import Trainer

EPOCHS, BATCHES, STOP = 4, 4, 10
MakeOptimizer = Callable[[nn.Module], Optimizer]
MakeScheduler = Callable[[Optimizer], Any]


def sgd(**settings: Any) -> MakeOptimizer:
    return lambda model: SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def two_groups(lr: float = 0.1, **settings: Any) -> MakeOptimizer:
    def make(model: nn.Module) -> Optimizer:
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": lr}, {"params": others, "lr": lr / 10}]
        return SGD(groups, lr=lr, **{"momentum": 0.9, **settings})

    return make


def loader(num: int = 16, size: int = 4, **settings: Any) -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*make_batches(num // 4), strict=True))
    return DataLoader(TensorDataset(x, y), size, shuffle=True, **settings)


@dataclass(frozen=True)
class Script:
    """A script: what it makes, and its other settings of the trainer."""

    optimizer: MakeOptimizer = field(default_factory=sgd)
    scheduler: MakeScheduler = lambda optimizer: None
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = EPOCHS

    def but(self, **settings: Any) -> Script:
        return replace(self, settings={**self.settings, **settings})

    def trainer(self, folder: Path, *hooks: Any, max_epochs: int | None = None, **more: Any) -> Trainer:
        model = Net()
        optimizer = self.optimizer(model)
        scheduler = self.scheduler(optimizer)
        settings = {"data": make_batches(BATCHES), "seed": 3, "create_new_dir": None, **self.settings, **more}
        settings["hooks"] = [*settings.get("hooks", ()), *hooks]
        return make_trainer(folder, model, optimizer, scheduler, max_epochs=max_epochs or self.epochs, **settings)

    def stopped(self, folder: Path, at: int = STOP, **more: Any) -> None:
        """Train the first iterations, and leave a `latest.pth`."""

        def save(trainer: Trainer) -> None:
            trainer.save_checkpoint("latest.pth", save_single_model=False)
            raise Stopped

        trainer = self.trainer(folder, On(after_iter=at_iter(at - 1, save)), **more)
        with pytest.raises(Stopped):
            trainer.train()

    def resumed(self, folder: Path, *hooks: Any, **more: Any) -> Ran:
        trainer = self.trainer(folder, *hooks, resume="auto", **more)
        return ran(trainer)

    def whole(self, folder: Path, **more: Any) -> Ran:
        return ran(self.trainer(folder, **more))


class Stopped(Exception):
    """The interruption."""


@dataclass(frozen=True)
class Ran:
    """What a run has done: the rates and settings of each update, and its last weights."""

    trainer: Trainer
    rates: list[list[float]]
    weights: dict[str, torch.Tensor]


def ran(trainer: Trainer) -> Ran:
    rates: list[list[float]] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(rates_of(optimizer)))
    trainer.train()
    return Ran(trainer, rates, weights_of(trainer.model))


def rates_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings, but not that a schedule counts in another unit than it was made for, as some of the scripts' do."""
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [message for message in messages if not message.startswith("The schedule (")]


def around(gamma: float) -> MakeScheduler:
    return lambda optimizer: LambdaLR(optimizer, lambda step: gamma**step)


def rates_by_hand(make: MakeScheduler, interval: str, optimizer: MakeOptimizer) -> list[list[float]]:
    """The rates of each update in the plain loop."""
    made = optimizer(Net())
    scheduler = make(made)
    rates = []
    for iteration in range(EPOCHS * BATCHES):
        rates.append(rates_of(made))
        made.step()
        if interval == "iter" or iteration % BATCHES == BATCHES - 1:
            scheduler.step()
    return rates


def by_hand(first: Script, second: Script, *, window: int = 1, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """The plain loop: STOP iterations by one script, the rest by another one, with the first one's momentum.

    Args:
        window, clip: of the second.
    """
    batches = make_batches(BATCHES) * EPOCHS
    model = Net()
    optimizer = first.optimizer(model)
    for batch in batches[:STOP]:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    kept = optimizer.state_dict()["state"]
    optimizer = second.optimizer(model)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
    rest = batches[STOP:]
    for begin in range(0, len(rest), window):
        optimizer.zero_grad()
        part = rest[begin : begin + window]
        for batch in part:
            (model(batch) / len(part)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return weights_of(model)
