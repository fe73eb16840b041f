"""What a hook has changed in an after_epoch is not done twice if a signal ends it there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, weights_of
from torch_frame import EvalHook, Trainer
from torch_frame.run.watch import Watch

# ---------------------------------------------------------------- in a run


class Center:
    """Has a state that is a copy."""

    def __init__(self) -> None:
        self.rows = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.clone(), "as_array": self.rows.numpy().copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


class WithAttributes(Trainer):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.center = Center()
        self.teacher = nn.Linear(1, 1, bias=False)
        self.teacher.weight.data.fill_(1)


@torch.no_grad()
def shrink(trainer: Any) -> None:
    for parameter in trainer.model.parameters():
        parameter.mul_(0.9)


def shrink_past_torch(trainer: Any) -> None:
    for parameter in trainer.model.parameters():
        parameter.data.mul_(0.9)


def shrink_average(trainer: Any) -> None:
    for parameter in trainer.model_ema.model.parameters():
        parameter.data.mul_(0.9)


def halve_rate(trainer: Any) -> None:
    trainer.optimizer.param_groups[0]["lr"] *= 0.5


def halve_momentum(trainer: Any) -> None:
    for state in trainer.optimizer.state.values():
        state["momentum_buffer"].mul_(0.5)


def freeze_or_unfreeze(trainer: Any) -> None:
    weight = trainer.model.layers[0].weight
    weight.requires_grad_(not weight.requires_grad)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda trainer: None,
    "weights": shrink,
    "weights, past torch": shrink_past_torch,
    "EMA": shrink_average,
    "learning rate": halve_rate,
    "momentum": halve_momentum,
    "requires_grad": freeze_or_unfreeze,
    "an attribute": lambda trainer: trainer.center.rows.add_(1),
    "a module of the trainer": lambda trainer: trainer.teacher.weight.data.mul_(2),
    "a schedule": lambda trainer: trainer.lr_scheduler.step_scheduler(),
}


def build(folder: Path, change: Callable[[Any], Any], *, stopped: bool) -> Trainer:
    def score(model: Any, batch: Any) -> dict[str, Tensor]:
        if stopped and len(scored) == 7:  # the second batch of the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        scored.append(trainer.epoch)
        return {"loss": (model.predict(batch[0]) - batch[1]).flatten()}

    scored: list[int] = []
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    hooks = [On(after_epoch=change), EvalHook(make_batches(), score, save_last=False, progress_bar=False)]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = WithAttributes(
        model,
        optimizer,
        schedule,
        make_batches(),
        4,
        folder,
        hooks=hooks,
        create_new_dir=None,
        resume="auto",
        use_ema=True,
    )
    trainer.scored = scored
    return trainer


def outcome(trainer: Any) -> list[Any]:
    own = [trainer.center.rows, weights_of(trainer.teacher), trainer.optimizer.state_dict()["state"], trainer.lr]
    return [weights_of(trainer.model), weights_of(trainer.model_ema.model), *own]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_hook_changes_before_a_signal_is_done_once(change: Callable[[Any], Any], tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", change, stopped=False)
    whole.train()
    first = build(tmp_path / "run", change, stopped=True)
    with pytest.raises(SystemExit):
        first.train()
    assert len(first.scored) == (8 if change is CHANGES["nothing"] else 10)  # at once, or after the evaluation
    second = build(tmp_path / "run", change, stopped=False)
    second.train()
    assert differences(outcome(whole), outcome(second)) == []


# ---------------------------------------------------------------- what is seen


def trained() -> tuple[nn.Module, Adam]:
    model = nn.Linear(2, 2)
    optimizer = Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


SEEN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "a write": lambda model, optimizer, things: model.weight.detach().add_(1),
    "a write past torch": lambda model, optimizer, things: model.weight.data.add_(1),
    "other data": lambda model, optimizer, things: setattr(model.weight, "data", model.weight.data + 1),
    "another parameter": lambda model, optimizer, things: setattr(model, "weight", nn.Parameter(torch.zeros(2, 2))),
    "requires_grad": lambda model, optimizer, things: model.weight.requires_grad_(False),
    "a state of the optimizer": lambda model, optimizer, things: optimizer.state[model.bias]["exp_avg"].mul_(2),
    "a state that is gone": lambda model, optimizer, things: optimizer.state.clear(),
    "a setting": lambda model, optimizer, things: optimizer.param_groups[0].update(betas=(0.8, 0.9)),
    "a group": lambda model, optimizer, things: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "an array": lambda model, optimizer, things: things["array"].__setitem__(0, 1),
    "an element": lambda model, optimizer, things: things["list"].append(1),
    "NaN in a tensor": lambda model, optimizer, things: things["tensor"].__setitem__(1, 0),
}


def things_of() -> tuple[nn.Module, Adam, dict[str, Any]]:
    model, optimizer = trained()
    odd = [
        torch.eye(2).to_sparse(),
        torch.empty(1, device="meta"),
        torch.tensor([1 + 2j]).conj(),
        nn.UninitializedBuffer(),
    ]
    return (
        model,
        optimizer,
        {"array": np.zeros(2), "list": [], "tensor": torch.tensor([1, torch.nan]), "odd": odd, "o": object()},
    )


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_a_change_is_seen(change: Callable[[Any, Any, Any], Any]) -> None:
    things = things_of()
    watch = Watch(lambda: things)
    assert not watch.sees_change()
    change(*things)
    assert watch.sees_change()


def test_a_step_is_seen_and_reading_is_not() -> None:
    model, optimizer, _ = things_of()
    watch = Watch(lambda: [model, optimizer])
    with torch.no_grad():
        model.eval()(torch.ones(1, 2))
    assert not watch.sees_change()
    optimizer.step()
    assert watch.sees_change()
