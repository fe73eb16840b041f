"""Which parameters are trained is part of the run: hooks that unfreeze layers, and what a resume makes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.small_runs import copied, differences, make_batches, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, HookBase, Trainer


def make_model(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    return model


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


class Unfreezing(HookBase):
    """Trains the first layer from epoch 1 on, in a group of its own."""

    def unfreeze(self) -> None:
        layer = self.trainer.model[0]  # type: ignore[index]
        layer.requires_grad_(True)
        self.trainer.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.02})

    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.unfreeze()


class WithState(Unfreezing):
    """Does so again when it gets its state."""

    done = False

    def before_epoch(self) -> None:
        super().before_epoch()
        self.done = self.done or self.trainer.epoch == 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["done"] and not self.done:
            self.done = True
            self.unfreeze()


class BeforeTraining(Unfreezing):
    """Does so again before the run continues."""

    def before_train(self) -> None:
        if self.trainer.start_epoch >= 1:
            self.unfreeze()


def make_run(
    folder: Path, hook: HookBase, *, epochs: int = 4, seed: int = 0, schedule: bool = True, **more: Any
) -> Trainer:
    model = make_model(seed)
    optimizer = SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if schedule else None
    settings: dict[str, Any] = {"step_fn": loss_of, "create_new_dir": None, **more}
    return Trainer(
        model, optimizer, scheduler, make_batches(), epochs, folder, hooks=[hook, CheckpointerHook()], **settings
    )


@pytest.mark.parametrize("kind", [WithState, BeforeTraining])
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_hook_that_unfreezes_layers_can_do_so_again(kind: type[Unfreezing], use_ema: bool, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", kind(), use_ema=use_ema)
    whole.train(5, 2)
    make_run(tmp_path / "parts", kind(), epochs=3, use_ema=use_ema).train(5, 2)
    parts = make_run(tmp_path / "parts", kind(), seed=5, resume="auto", use_ema=use_ema)
    parts.train(5, 2)
    ends = [
        copied([t.model.state_dict(), t.optimizer.state_dict(), t.lr_scheduler.state_dict()]) for t in (whole, parts)
    ]
    assert differences(ends[0], ends[1]) == []


def test_a_hook_that_does_not_is_an_error_that_names_the_layers(tmp_path: Path) -> None:
    make_run(tmp_path, Unfreezing(), epochs=3).train(5, 2)
    trainer = make_run(tmp_path, Unfreezing(), resume="auto")
    for _ in range(2):  # a second call does not go on without the state either
        error = raised_by(lambda: trainer.train(5, 2), CheckpointError)
        assert (
            "had 0.weight, 0.bias, now it has not; a hook that unfreezes layers adds them in load_state_dict or"
            in str(error)
        )


def test_after_a_resume_that_failed_training_does_not_begin_anew(tmp_path: Path) -> None:
    make_run(tmp_path, WithState(), epochs=1).train(5, 2)
    trainer = make_run(tmp_path, WithState(), resume="auto", precision="bf16")
    for _ in range(2):
        raised_by(lambda: trainer.train(5, 2), CheckpointError)
    assert trainer.progress.iter == 0


def test_where_a_resume_fails_what_hooks_changed_is_put_back(tmp_path: Path) -> None:
    make_run(tmp_path, WithState(), epochs=3).train(5, 2)
    hook = WithState()
    trainer = make_run(tmp_path, hook, seed=5, precision="bf16", use_ema=True)
    assert trainer.model_ema is not None
    scheduler, metrics = trainer.lr_scheduler, trainer.metric_storage

    def everything() -> Any:
        held: list[Any] = [trainer.model, trainer.optimizer, scheduler, trainer.progress, metrics]
        flags = [p.requires_grad for p in trainer.model.parameters()]
        return copied([*(one.state_dict() for one in held), flags, hook.done, trainer.model_ema.model.state_dict()])

    before = everything()
    error = raised_by(lambda: trainer.load_checkpoint("latest.pth"), CheckpointError)
    assert "precision was fp32" in str(error)
    assert "use_ema was False" in str(error)
    assert differences(before, everything()) == []
    assert len(trainer.optimizer.param_groups) == 1


class Thaw(HookBase):
    """Trains the first layer, which the optimizer has from the beginning, from epoch 1 on."""

    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.trainer.model.requires_grad_(True)


def test_requires_grad_comes_back_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = []
    for folder, epochs, seed in (("whole", 4, 0), ("parts", 3, 0), ("parts", 4, 7)):
        model = make_model(seed)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        hooks = [Thaw(), CheckpointerHook()]
        settings: dict[str, Any] = {"hooks": hooks, "step_fn": loss_of, "create_new_dir": None, "resume": "auto"}
        caplog.clear()
        Trainer(model, optimizer, None, make_batches(), epochs, tmp_path / folder, **settings).train(5, 2)
        ends.append(weights_of(model))
    assert differences(ends[0], ends[2]) == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["0.weight, 0.bias are trained, as saved; the script had it frozen."]
    assert "0.weight, 0.bias are trained" in (tmp_path / "parts" / "log.txt").read_text()
