"""Modes that a hook sets in before_epoch, which is not repeated, stay in a run that is resumed inside the epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, Trainer

NORM = "layers.1"


class Stopped(Exception):
    pass


def stop(trainer: Any) -> None:
    raise Stopped


def freeze_statistics(trainer: Any) -> None:
    for module in trainer.model_or_module.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def build(folder: Path, *hooks: Any, **settings: Any) -> Trainer:
    return make_trainer(
        folder,
        Net(norm=True, dropout=True),
        hooks=[On(before_epoch=freeze_statistics), CheckpointerHook(every_n_iters=1), *hooks],
        create_new_dir=None,
        **settings,
    )


@pytest.mark.parametrize("iter", [2, 7])
@pytest.mark.parametrize("settings", [{}, {"compile": {"backend": "eager"}}], ids=["bare", "compiled"])
def test_batch_norm_in_eval_mode_resumes_bitwise(iter: int, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = build(tmp_path / "whole", max_epochs=3)
    whole.train()
    torch.manual_seed(0)
    raised_by(build(tmp_path / "parts", On(before_iter=at_iter(iter, stop)), max_epochs=3).train, Stopped)
    modes: list[list[str]] = []
    note = On(
        before_iter=at_iter(iter, lambda t: modes.append([n for n, m in t.model.named_modules() if not m.training]))
    )
    parts = build(tmp_path / "parts", note, max_epochs=3, resume="auto", **settings)
    parts.train()
    assert modes == [[NORM]]
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []
    assert torch.equal(parts.model.layers[1].running_mean, torch.zeros(8))


class Noting(nn.Linear):
    """Does work when its mode changes, as LoRA's layers do."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> Noting:
        if hasattr(self, "calls"):
            self.calls.append(mode)
        return super().train(mode)


def test_a_layer_that_does_work_in_train_and_eval_sees_it(tmp_path: Path) -> None:
    def make(*hooks: Any, **settings: Any) -> Trainer:
        model = nn.Sequential(Noting(), nn.Dropout())
        before = On(before_epoch=lambda trainer: trainer.model[0].eval())
        hooks = (before, CheckpointerHook(every_n_iters=1), *hooks)
        step = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
        return make_trainer(tmp_path, model, hooks=hooks, create_new_dir=None, step_fn=step, **settings)

    raised_by(make(On(before_iter=at_iter(2, stop))).train, Stopped)
    trainer = make(resume="auto", max_epochs=1)
    trainer.train()
    assert trainer.model[0].calls[-2:] == [True, False]


def test_a_model_left_in_eval_mode_by_before_epoch_is_trained(tmp_path: Path) -> None:
    modes: list[bool] = []
    hooks = [On(before_epoch=lambda t: t.model.eval(), before_iter=lambda t: modes.append(t.model.training))]
    make_trainer(tmp_path, hooks=hooks, max_epochs=1).train()
    assert all(modes)


def test_a_part_of_it_may_be_trained_alone(tmp_path: Path) -> None:
    modes: list[Any] = []

    def only_the_head(trainer: Any) -> None:
        trainer.model.eval()
        trainer.model.layers[-1].train()

    hooks = [On(before_epoch=only_the_head, before_iter=lambda t: modes.append(t.model.layers[0].training))]
    make_trainer(tmp_path, hooks=hooks, max_epochs=1).train()
    assert not any(modes)


def test_a_state_of_an_epochs_end_says_nothing_of_modes(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_epochs=1)
    trainer.train()
    trainer.model.eval()
    assert torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)["modes"] == {"eval": []}
    trainer = build(tmp_path, max_epochs=2, resume="auto")
    trainer.train()


def test_train_called_again_puts_the_model_into_training(tmp_path: Path) -> None:
    modes: list[bool] = []
    trainer = build(tmp_path, On(before_iter=at_iter(2, stop)), max_epochs=1)
    raised_by(trainer.train, Stopped)
    trainer.model.eval()
    trainer.register_hooks([On(after_iter=lambda t: modes.append(t.model.training))])
    trainer.hook_caller.stages["before_iter"].clear()
    trainer.train()
    assert modes == [True] * 3


class TwoNets(Trainer):
    """Its second net, an attribute, takes part in the step; a hook puts its dropout into eval mode."""

    def train_one_iter(self, batch: Any) -> Any:
        values = super().train_one_iter(batch)
        loss = self.second(batch)  # type: ignore[attr-defined]
        self.its_optimizer.zero_grad()  # type: ignore[attr-defined]
        loss.backward()
        self.its_optimizer.step()  # type: ignore[attr-defined]
        return values


@pytest.mark.parametrize("name", ["dropout", "all of it"])
def test_the_modes_of_a_trainers_other_modules_stay_as_well(name: str, tmp_path: Path) -> None:
    def set_modes(trainer: Any) -> None:
        trainer.second.train()
        (trainer.second if name == "all of it" else trainer.second.layers[2]).eval()

    def run(folder: str, *hooks: Any, **settings: Any) -> Any:
        torch.manual_seed(0)
        model, second = Net(), Net(dropout=True, seed=1)
        hooks = [On(before_epoch=set_modes), CheckpointerHook(every_n_iters=1), *hooks]  # type: ignore[assignment]
        settings = {"hooks": hooks, "create_new_dir": None, **settings}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        trainer: Any = TwoNets(model, optimizer, None, make_batches(), 3, tmp_path / folder, **settings)
        trainer.second = second
        trainer.its_optimizer = torch.optim.SGD(second.parameters(), lr=0.05)
        return trainer

    whole = run("whole")
    whole.train()
    raised_by(run("parts", On(before_iter=at_iter(7, stop))).train, Stopped)
    parts = run("parts", resume="auto")
    parts.train()
    assert differences(weights_of(whole.second), weights_of(parts.second)) == []
