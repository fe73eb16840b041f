"""Which modules are in eval mode: judged at an epoch's begin; what a hook sets stays in a run resumed inside the epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, EvalHook, Trainer

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
    assert trainer.model[0].calls == [False]  # as before_epoch had put it; no way round by training mode


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
    stops = [stop, lambda trainer: None]
    trainer = build(tmp_path, On(before_iter=at_iter(2, lambda trainer: stops.pop(0)(trainer))), max_epochs=1)
    raised_by(trainer.train, Stopped)
    trainer.model.eval()
    trainer.register_hooks([On(after_iter=lambda t: modes.append(t.model.training))])
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


# ---------------------------------------------------------------- what an epoch begins with


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def modes_in_training(tmp_path: Path, model: nn.Module, *hooks: Any, **settings: Any) -> list[list[str]]:
    """Names of the modules in eval mode, in each step."""
    seen: list[list[str]] = []
    note = On(before_iter=lambda t: seen.append([n for n, m in t.model_or_module.named_modules() if not m.training]))
    settings = {"max_epochs": 2, "data": make_batches(1), **settings}
    make_trainer(tmp_path, model, hooks=[*hooks, note], **settings).train()
    return seen


def test_a_frozen_module_in_eval_mode_stays_and_is_in_the_first_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net(norm=True)
    model.layers[1].eval().requires_grad_(False)
    with caplog.at_level(logging.INFO, "torch_frame"):
        assert modes_in_training(tmp_path, model) == [[NORM]] * 2
    assert torch.equal(model.layers[1].running_mean, torch.zeros(8))
    assert f"  Frozen, in eval mode  {NORM}" in caplog.messages
    assert warned(caplog) == []


def test_a_module_that_no_optimizer_trains_counts_as_frozen(tmp_path: Path) -> None:
    model = Net(norm=True)
    model.layers[1].eval()
    optimizer = torch.optim.SGD([*model.layers[0].parameters(), *model.layers[3].parameters()], lr=0.1)
    assert modes_in_training(tmp_path, model, optimizer=optimizer) == [[NORM]] * 2


@pytest.mark.parametrize("name", ["", "layers", "layers.0"])
def test_a_trained_module_in_eval_mode_is_put_into_training_and_told_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers' from_pretrained gives a model: its dropouts would be off."""
    model = Net(dropout=True)
    model.get_submodule(name).eval()
    assert modes_in_training(tmp_path, model) == [[]] * 2
    (line,) = warned(caplog)
    assert line.startswith(f"{name or 'Net'} was in eval mode when epoch 1 began, and is put into training mode")


def test_a_module_without_parameters_is_put_into_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(dropout=True)
    model.layers[2].eval()
    assert modes_in_training(tmp_path, model) == [[]] * 2
    assert "layers.2 was in eval mode" in warned(caplog)[0]


def test_the_whole_is_judged_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(norm=True).eval()
    model.layers[1].requires_grad_(False)  # of a model in eval mode: not frozen on purpose
    assert modes_in_training(tmp_path, model) == [[]] * 2
    assert warned(caplog)[0].startswith("Net was in eval mode")


def test_what_is_frozen_stays_so_though_a_hook_leaves_the_whole_model_in_eval_mode(tmp_path: Path) -> None:
    model = Net(norm=True)
    model.layers[1].eval().requires_grad_(False)
    leaves = On(after_epoch=lambda t: t.model.eval())
    assert modes_in_training(tmp_path, model, leaves) == [[NORM]] * 2
    model = Net(norm=True)
    model.layers[1].eval().requires_grad_(False)
    leaves = On(before_epoch=lambda t: t.model.eval())
    assert modes_in_training(tmp_path, model, leaves) == [[NORM]] * 2


def test_what_is_trained_again_is_put_into_training(tmp_path: Path) -> None:
    model = Net(norm=True)
    model.layers[1].eval().requires_grad_(False)
    unfreezes = On(after_epoch=lambda t: t.model.layers[1].requires_grad_(True))
    assert modes_in_training(tmp_path, model, unfreezes) == [[NORM], []]


class KeepsNormsFrozen(Net):
    """As detection backbones do (norm_eval): its train() keeps the norms in eval mode, trained parameters or not."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.layers[1].eval()
        return self


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_class_with_a_train_of_its_own_decides(
    evaluates: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    score = lambda model, batch: {"zero": [0.0]}  # noqa: E731
    hooks = [EvalHook(make_batches(1), score, period_unit="iter")] if evaluates else []
    assert modes_in_training(tmp_path, KeepsNormsFrozen(norm=True).eval(), *hooks) == [[NORM]] * 2
    assert len(warned(caplog)) == 1


class LoRA(nn.Linear):
    """As loralib has it: eval() merges, train() takes apart."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.ones(1, sizes[0])), nn.Parameter(torch.full((sizes[1], 1), 0.125))
        self.merged, self.calls = False, 0

    def train(self, mode: bool = True) -> LoRA:
        super().train(mode)
        if mode == self.merged:
            self.calls += 1
            self.weight.data += (self.b @ self.a).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


def train_lora(tmp_path: Path, *hooks: Any, in_eval: bool = False, **settings: Any) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(LoRA(2, 2), nn.Linear(2, 1)).double()
    model.train(not in_eval)
    data = [torch.ones(4, 2).double(), -torch.ones(4, 2).double()] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0625)
    step = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    settings = {"max_epochs": 2, "step_fn": step, "create_new_dir": None, **settings}
    trainer = make_trainer(tmp_path, model, optimizer, data=data, hooks=[*hooks, CheckpointerHook()], **settings)
    trainer.train()
    return trainer


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("unit", ["iter", "epoch"])
@pytest.mark.parametrize("in_eval", [False, True])
def test_layers_that_merge_in_eval_mode_train_as_without_evaluation(unit: Any, in_eval: bool, tmp_path: Path) -> None:
    plain = train_lora(tmp_path / "plain", use_ema=True)
    seen = []

    def score(model: Any, batch: Any) -> Any:
        seen.append((model[0].merged, model.training))
        return {"zero": [0.0]}

    def hooks() -> list[Any]:
        return [EvalHook([torch.ones(4, 2).double()], score, period_unit=unit, save_last=False)]

    evaluated = train_lora(tmp_path / "evaluated", *hooks(), in_eval=in_eval, use_ema=True)
    assert close(plain.model, evaluated.model)
    assert close(plain.model_evaluate, evaluated.model_evaluate)
    assert set(seen) == {(True, False)}
    train_lora(tmp_path / "parts", *hooks(), in_eval=in_eval, use_ema=True, max_epochs=None, max_iters=5)
    parts = train_lora(tmp_path / "parts", *hooks(), in_eval=in_eval, use_ema=True, resume="auto")
    assert close(plain.model, parts.model)
    assert close(plain.model_evaluate, parts.model_evaluate)


def test_an_evaluation_touches_no_layer_whose_mode_stays(tmp_path: Path) -> None:
    """A merged layer that is taken apart and merged again has other last bits."""
    model = nn.Sequential(LoRA(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False).eval()
    hook = EvalHook(make_batches(1), lambda model, batch: {"zero": [0.0]}, period_unit="iter")
    step = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    make_trainer(tmp_path, model, hooks=[hook], step_fn=step).train()
    assert model[0].calls == 1  # eval() above
