"""A `train_one_iter` of one's own: with autocast() and update() it is the plain Trainer's; without, the user is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from tests.small_hooks import On, Stages, at_iter
from tests.small_runs import (
    Net,
    Unsized,
    UserError,
    differences,
    fail,
    library_frames,
    make_batches,
    raised_by,
    seed_everything,
    weights_of,
)
from tests.training.small_updates import poisoned, poisoned_step
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, MetricStorage, Trainer
from torch_frame.errors import NonFiniteError, SettingError, StepOutputError
from torch_frame.hooks.defaults import default_hooks
from torch_frame.run.table import table


def step(model: Any, batch: Any) -> Tensor:
    return model(batch)


class Own(Trainer):
    def train_one_iter(self, batch: Any) -> Any:
        with self.autocast():
            loss = step(self.model, batch)
        self.update(loss)
        return {"total_loss": loss}


class Old(Trainer):
    """As a subclass written for 1.7."""

    def train_one_iter(self, batch: Any) -> Any:
        loss = step(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"total_loss": loss.detach()}


def build(kind: type[Trainer], work_dir: Path, *, schedule: bool = True, epochs: int = 3, **settings: Any) -> Trainer:
    model = Net(norm=True, dropout=True)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = ExponentialLR(optimizer, 0.9) if schedule else None
    data = settings.pop("data", make_batches(7))
    given = {"hooks": [], "step_fn": step if kind is Trainer else None, **settings}
    return kind(model, optimizer, scheduler, data, epochs, work_dir, **given)


def state_of(trainer: Trainer) -> Any:
    left_out = ("metric_storage", "environment", "hooks", "settings", "rng", "modes")
    return {name: part.state_dict() for name, part in table(trainer._run).items() if name not in left_out}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"clip_grad_norm": 0.1},
    "warm-up": {"warmup_method": "linear", "warmup_iters": 5},
    "by iteration": {"lr_scheduler_interval": "iter"},
    "ema": {"use_ema": True},
    "weights": {"loss_weight": lambda batch: len(batch[0]), "data": make_batches(7, last=2), "gradient_accumulation_steps": 2},
    "no length": {"data": Unsized(), "gradient_accumulation_steps": 3},
    "all": {
        "precision": "fp16",
        "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.1,
        "warmup_method": "exp",
        "warmup_iters": 4,
        "lr_scheduler_interval": "iter",
        "use_ema": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_with_autocast_and_update_it_has_the_plain_trainers_bits(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for kind in (Trainer, Own):
        seed_everything(0)
        stages = Stages("before_update", "after_update", "after_iter")
        trainer = build(kind, tmp_path / kind.__name__, hooks=[stages], **SETTINGS[name])
        trainer.train()
        runs.append(
            (state_of(trainer), stages.calls, {key: buffer.latest for key, buffer in trainer.metric_storage.items()})
        )
    (plain, plain_calls, plain_values), (own, own_calls, own_values) = runs
    assert differences(plain, own) == []
    assert plain_calls == own_calls
    times = {"data_time", "iter_time"}
    assert {k: v for k, v in plain_values.items() if k not in times} == {
        k: v for k, v in own_values.items() if k not in times
    }
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_skipped_updates_are_the_plain_trainers(tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            losses = poisoned_step(self.model, batch)
            self.update(sum(losses.values()))  # type: ignore[arg-type]
            return {"total_loss": 0.0}

    data = poisoned(8, {2, 5}, "nan_input")
    runs = []
    for kind in (Trainer, Poisoned):
        trainer = build(kind, tmp_path / kind.__name__, data=data, on_nonfinite="skip", step_fn=poisoned_step)
        seed_everything(0)
        trainer.train(5, 5)
        runs.append(state_of(trainer))
        assert trainer.updater.num_skipped == 6
    assert differences(*runs) == []


def test_it_is_resumed_bitwise_inside_an_epoch(tmp_path: Path) -> None:
    def run(folder: str, epochs: int = 3, resume: Any = None, stop: bool = False) -> Trainer:
        seed_everything(0)
        hooks: list[HookBase] = [CheckpointerHook(every_n_iters=4)]
        hooks += [On(before_iter=lambda trainer: trainer.cur_iter == 11 and fail())] if stop else []
        more = {**SETTINGS["all"], "hooks": hooks, "create_new_dir": None, "resume": resume}
        trainer = build(Own, tmp_path / folder, epochs=epochs, **more)
        trainer.train(5, 5)
        return trainer

    whole = run("whole")
    raised_by(lambda: run("parts", stop=True), UserError)
    resumed = run("parts", resume="auto")
    assert differences(state_of(whole), state_of(resumed)) == []


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({"precision": "bf16"}, "precision='bf16'"),
    "fp16": ({"precision": "fp16"}, "the gradient scaler of precision='fp16'"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
    "clipping": ({"clip_grad_norm": 1.0}, "clip_grad_norm=1"),
    "warm-up": ({"warmup_method": "linear"}, "warmup_method='linear'"),
    "schedule": ({"schedule": True, "lr_scheduler_interval": "iter"}, "lr_scheduler_interval='iter'"),
    "ema": ({"use_ema": True}, "use_ema=True"),
    "hooks": ({"hooks": [On(before_update=lambda trainer: None)]}, "before_update and after_update of On"),
    "weights": ({"loss_weight": lambda batch: 1.0}, "loss_weight"),
    "skip": ({"on_nonfinite": "skip"}, "on_nonfinite='skip'"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_has_no_effect_without_update_is_told_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, words = NAMED[name]
    build(Old, tmp_path, **{"schedule": False, **settings}).train()
    (told,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "train_one_iter is overridden and does not call self.update()" in told
    assert words in told


def test_what_has_an_effect_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class AsIn17(Old):
        def train_one_iter(self, batch: Any) -> Any:
            values = super().train_one_iter(batch)
            self.lr_scheduler.step()
            assert self.model_ema is not None
            self.model_ema.update(self.model)
            return values

    class Standard(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            return {**super().train_one_iter(batch), "more": 1.0}

    class Sometimes(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            loss = step(self.model, batch)
            if self.inner_iter % 2 == 1:
                self.update(loss)
            return {"total_loss": loss}

    build(Old, tmp_path / "none", schedule=True).train()
    build(AsIn17, tmp_path / "17", use_ema=True, warmup_method="linear").train()
    build(Standard, tmp_path / "standard", step_fn=step, **SETTINGS["all"]).train()
    build(Sometimes, tmp_path / "sometimes", use_ema=True, clip_grad_norm=1.0).train()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_update_without_autocast_is_told_where_it_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoAutocast(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            loss = step(self.model, batch)
            self.update(loss)
            return {"total_loss": loss}

    build(NoAutocast, tmp_path, precision="bf16", clip_grad_norm=1.0).train()
    (told,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert "does not call self.autocast(), so these settings have no effect: precision='bf16'." in told


def test_a_weight_may_be_given_with_each_loss(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            loss = step(self.model, batch)
            self.update(loss, weight=len(batch[0]))
            return {"total_loss": loss}

    sizes: Any = {"data": make_batches(4, last=2), "gradient_accumulation_steps": 2, "epochs": 1}
    seed_everything(0)
    plain = build(Trainer, tmp_path / "plain", loss_weight=lambda batch: len(batch[0]), **sizes)
    plain.train(5, 5)
    seed_everything(0)
    own = build(Weighted, tmp_path / "own", **sizes)
    own.train(5, 5)
    assert differences(weights_of(plain.model), weights_of(own.model)) == []


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a dict": (lambda loss: {"loss": loss}, StepOutputError, "got a dict; it takes the loss"),
    "detached": (lambda loss: loss.detach(), StepOutputError, "has no graph"),
    "two elements": (lambda loss: loss * torch.ones(2), StepOutputError, "one element"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_loss_is_a_sentence(name: str, tmp_path: Path) -> None:
    spoil, error, text = BAD[name]

    class Wrong(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            self.update(spoil(step(self.model, batch)))

    with pytest.raises(error, match=text):
        build(Wrong, tmp_path).train(5, 5)


def test_a_name_or_weights_that_do_not_belong_are_errors(tmp_path: Path) -> None:
    class Wrong(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            weight = 1.0 if self.named is None and self.cur_iter == 1 else None
            self.update(step(self.model, batch), self.named, weight)
            return {"total_loss": 0.0}

        named: str | None = None

    with pytest.raises(SettingError, match="Give each one a weight"):
        build(Wrong, tmp_path / "weights", gradient_accumulation_steps=2).train(5, 5)
    trainer = build(Wrong, tmp_path / "name")
    trainer.named = "g"  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match="has no dict of them"):
        trainer.train(5, 5)


@pytest.mark.parametrize("stage", ["before_update", "after_update"])
def test_few_library_frames_stand_above_an_error_in_a_hook(stage: str, tmp_path: Path) -> None:
    trainer = build(Own, tmp_path, hooks=[On(**{stage: fail})])
    assert len(library_frames(raised_by(trainer.train, UserError))) <= 3


# ---------------------------------------------------------------- other methods of 1.7


def test_an_override_of_train_one_epoch_that_trains_by_itself_is_refused(tmp_path: Path) -> None:
    """The run ended behind it, with nothing counted and without a word."""

    class Epoch(Trainer):
        def train_one_epoch(self) -> None:
            for batch, _ in self.batches():
                self.train_one_iter(batch)

    class Skips(Trainer):
        def train_one_epoch(self) -> None:
            if self.epoch != 1:
                super().train_one_epoch()

    for kind in (Epoch, Skips):
        model = Net()
        trainer = kind(model, SGD(model.parameters(), lr=0.1), None, make_batches(), 3, tmp_path, hooks=[])
        with pytest.raises(SettingError, match=rf"{kind.__name__}.train_one_epoch returned, but no epoch was trained"):
            trainer.train()


def test_train_one_epoch_of_17_is_refused_with_its_new_name(tmp_path: Path) -> None:
    class Epoch(Trainer):
        def _train_one_epoch(self) -> None: ...

    with pytest.raises(SettingError, match=r"Epoch overrides _train_one_epoch.*train_one_epoch\(\) now"):
        build(Epoch, tmp_path)


def test_call_hooks_of_17_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class Timed(Trainer):
        def _call_hooks(self, stage: str) -> None: ...

    with pytest.raises(SettingError, match=r"Timed overrides _call_hooks.*Write a hook"):
        build(Timed, tmp_path)


def test_a_method_of_ones_own_called_call_is_not_the_loops(tmp_path: Path) -> None:
    class Old17(Trainer):
        def call(self, number: int) -> int:  # type: ignore[override]
            return number + 1

    stages = Stages("before_train", "before_epoch", "after_epoch", "after_train")
    build(Old17, tmp_path, hooks=[stages]).train()
    assert stages.calls[0] == "before_train"
    assert stages.calls[-1] == "after_train"


def test_overrides_of_17s_private_methods_are_called(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Old17(Trainer):
        def _prepare_for_training(self, console_log_level: int = 2, file_log_level: int = 2) -> None:
            super()._prepare_for_training(console_log_level, file_log_level)
            calls.append(("prepare", console_log_level, file_log_level))

        def _build_default_hooks(self) -> list[HookBase]:
            return [*default_hooks(), On(before_train=lambda trainer: calls.append("before_train"))]

        def _update_iter_metrics(self, loss_dict: Any, data_time: float, iter_time: float, lr: float) -> None:
            assert all(type(value) is float for value in (*loss_dict.values(), data_time, iter_time, lr))
            super()._update_iter_metrics({**loss_dict, "twice": 2 * loss_dict["total_loss"]}, data_time, iter_time, lr)

    trainer = build(Old17, tmp_path, step_fn=step, hooks=None, epochs=1)
    trainer.train(5, 5)
    assert calls == [("prepare", 5, 5), "before_train"]
    storage = trainer.metric_storage
    assert storage["twice"].latest == pytest.approx(2 * storage["total_loss"].latest)
    assert {"lr", "data_time", "iter_time"} <= set(storage)


def test_metrics_may_be_logged_by_the_override_itself(tmp_path: Path) -> None:
    class Old17(Trainer):
        def _update_iter_metrics(self, loss_dict: Any, data_time: float, iter_time: float, lr: float) -> None:
            self.log(self.cur_iter, data_time=data_time, iter_time=iter_time)
            self.log(self.cur_iter, lr=lr, smooth=False)
            self.log(self.cur_iter, **{f"my_{name}": value for name, value in loss_dict.items()})

    trainer = build(Old17, tmp_path, step_fn=step, hooks=[LoggerHook(progress_bar=False)], epochs=2)
    trainer.train(5, 5)
    assert set(trainer.metric_storage) == {"my_total_loss", "lr", "data_time", "iter_time"}


def test_an_override_of_loggerhooks_tensorboard_is_called(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Own17(LoggerHook):
        def _write_tensorboard(self) -> None:
            seen.append({name: step for name, (step, _) in self.metric_storage.values_maybe_smooth.items()})
            super()._write_tensorboard()

    build(Trainer, tmp_path, hooks=[Own17(period=3, progress_bar=False)], epochs=1).train(5, 5)
    assert [row["total_loss"] for row in seen] == [2, 5, 6]


# ---------------------------------------------------------------- objects that scripts and hooks set


def test_an_optimizer_that_is_set_counts_and_an_undriven_schedule_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other(trainer: Any) -> None:
        if trainer.epoch == 1:
            trainer.optimizer = SGD(trainer.model.parameters(), lr=0.0)

    weights: list[Any] = []
    note = On(after_epoch=lambda trainer: weights.append(trainer.model.layers[0].weight.detach().clone()))
    trainer = build(Trainer, tmp_path, hooks=[On(before_epoch=other), note])
    trainer.train()
    assert torch.equal(weights[0], weights[1])
    assert trainer.lr == 0.0
    (told,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert told.startswith("trainer.optimizer was set during the run, but lr_scheduler drives the old one")


def test_with_its_schedule_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(Trainer, tmp_path, epochs=2)
    optimizer = SGD(trainer.model.parameters(), lr=0.02)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = ExponentialLR(optimizer, 0.5)
    trainer.train()
    assert trainer.optimizer is optimizer
    assert trainer.lr == 0.005
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("had", [False, True])
def test_a_scheduler_that_is_set_has_the_warm_up_of_one_that_was_given(had: bool, tmp_path: Path) -> None:
    warmup: Any = {"warmup_method": "linear", "warmup_iters": 5, "warmup_factor": 0.1, "lr_scheduler_interval": "iter"}
    rates: list[list[float]] = []
    for given in (True, False):
        seen: list[float] = []
        trainer = build(
            Trainer,
            tmp_path / str(given),
            schedule=given or had,
            hooks=[On(before_iter=lambda trainer, seen=seen: seen.append(trainer.lr))],
            epochs=1,
            **warmup,
        )
        if not given:
            trainer.lr_scheduler = ExponentialLR(trainer.optimizer, 0.9)
        trainer.train(5, 5)
        rates.append(seen)
    assert rates[0] == rates[1]


def test_an_optimizer_cannot_be_set_inside_a_window(tmp_path: Path) -> None:
    def other(trainer: Any) -> None:
        trainer.optimizer = SGD(trainer.model.parameters(), lr=0.1)

    trainer = build(Trainer, tmp_path, gradient_accumulation_steps=2, hooks=[On(after_iter=other)])
    with pytest.raises(SettingError, match="inside a window"):
        trainer.train(5, 5)


def test_a_state_with_an_optimizer_that_was_set_resumes(tmp_path: Path) -> None:
    def run(epochs: int, folder: str, resume: Any = None) -> Trainer:
        seed_everything(0)
        trainer = build(
            Trainer,
            tmp_path / folder,
            epochs=epochs,
            hooks=[CheckpointerHook()],
            create_new_dir=None,
            resume=resume,
            schedule=False,
        )
        trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.01)
        trainer.train(5, 5)
        return trainer

    whole = run(3, "whole")
    run(1, "parts")
    assert differences(state_of(whole), state_of(run(3, "parts", "auto"))) == []


def test_an_optimizer_that_a_hook_sets_in_before_train_takes_its_state(tmp_path: Path) -> None:
    class Sets(HookBase):
        def before_train(self) -> None:
            self.trainer.optimizer = SGD(self.trainer.model.parameters(), lr=0.05, momentum=0.9)

    def run(epochs: int, folder: str, resume: Any = None) -> Trainer:
        seed_everything(0)
        more: Any = {"create_new_dir": None, "resume": resume, "warmup_method": "linear", "warmup_iters": 9}
        hooks = [Sets(), CheckpointerHook()]
        trainer = build(Trainer, tmp_path / folder, epochs=epochs, schedule=False, hooks=hooks, **more)
        trainer.train(5, 5)
        return trainer

    whole = run(3, "whole")
    run(1, "parts")
    assert differences(state_of(whole), state_of(run(3, "parts", "auto"))) == []


def test_an_update_in_a_method_of_ones_own_is_looked_for_until_the_epochs_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class InAMethod(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            return {"total_loss": self.second(batch) if self.inner_iter % 2 else 0.0}

        def second(self, batch: Any) -> float:
            self.update(step(self.model, batch))
            return 1.0

    build(InAMethod, tmp_path, clip_grad_norm=1.0).train()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_start_epoch_may_be_set_by_a_script_or_in_before_train(tmp_path: Path) -> None:
    for by_hook in (False, True):
        epochs: list[int] = []
        hooks: list[HookBase] = [On(before_epoch=lambda trainer, epochs=epochs: epochs.append(trainer.epoch))]
        if by_hook:
            hooks.append(On(before_train=lambda trainer: setattr(trainer, "start_epoch", 1)))
        trainer = build(Trainer, tmp_path / str(by_hook), hooks=hooks)
        if not by_hook:
            trainer.start_epoch = 1
        trainer.train(5, 5)
        assert epochs == [1, 2]
        assert (trainer.start_epoch, trainer.cur_iter) == (1, 20)


def test_a_start_epoch_that_is_trained_already_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(Trainer, tmp_path, hooks=[On(after_epoch=lambda trainer: setattr(trainer, "start_epoch", 0))])
    trainer.train()
    assert "which changes nothing" in caplog.text
    trainer.start_epoch = 1
    with pytest.raises(SettingError, match="3 epochs and 0 batches are trained"):
        trainer.train(5, 5)


def test_gradients_of_parameters_that_no_optimizer_has_do_not_add_up(tmp_path: Path) -> None:
    norms: list[float] = []
    model = Net()
    note = On(after_iter=lambda trainer: norms.append(model.layers[0].weight.grad.norm().item()))
    optimizer = SGD(model.layers[2].parameters(), lr=0.0)
    batch = make_batches(1)
    Trainer(model, optimizer, None, batch, 3, tmp_path, hooks=[note]).train(5, 5)
    assert norms[0] == norms[1] == norms[2] > 0


def test_accumulation_that_a_hook_changes_counts_from_the_next_window(tmp_path: Path) -> None:
    ends: list[int] = []

    def shorter(trainer: Any) -> None:
        trainer.gradient_accumulation_steps = 2

    hooks = [
        On(before_epoch=lambda trainer: trainer.epoch == 1 and shorter(trainer)),
        On(after_update=lambda trainer: ends.append(trainer.inner_iter)),
    ]
    model, by_hand = Net(), Net()
    trainer = Trainer(model, SGD(model.parameters(), lr=0.1), None, make_batches(4), 2, tmp_path, hooks=hooks)
    trainer.train(5, 5)
    assert ends == [0, 1, 2, 3, 1, 3]
    optimizer = SGD(by_hand.parameters(), lr=0.1)
    for window in (1, 2):
        for first in range(0, 4, window):
            optimizer.zero_grad()
            for batch in make_batches(4)[first : first + window]:
                (by_hand(batch) / window).backward()
            optimizer.step()
    for name, value in weights_of(by_hand).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_what_stands_for_several_optimizers_cannot_be_changed_unnoticed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    several: Any = [SGD(model[0].parameters(), lr=0.1), SGD(model[1].parameters(), lr=0.1)]
    trainer = Trainer(model, several, None, [torch.ones(2, 3)], 1, tmp_path, hooks=[])
    with pytest.raises(TypeError):
        trainer.optimizer[0] = several[1]
    trainer.optimizer = several[::-1]
    assert trainer.optimizer == tuple(several[::-1])


def set_attribute(name: str, make: Any) -> Any:
    return lambda trainer: setattr(trainer, name, make(trainer))


SET_WRONGLY: dict[str, tuple[Any, type[Exception], str]] = {
    "no optimizer": (set_attribute("optimizer", lambda trainer: "sgd"), TypeError, "optimizer is str"),
    "another model's": (
        set_attribute("optimizer", lambda trainer: SGD(Net().parameters(), lr=0.1)),
        SettingError,
        "none of the model's trainable parameters",
    ),
    "another optimizer's scheduler": (
        set_attribute("lr_scheduler", lambda trainer: ExponentialLR(SGD(Net().parameters(), lr=0.1), 0.9)),
        SettingError,
        "was made for another optimizer",
    ),
    "a plateau without a metric": (
        set_attribute("lr_scheduler", lambda trainer: ReduceLROnPlateau(trainer.optimizer)),
        SettingError,
        "ReduceLROnPlateau follows a metric",
    ),
    "no number of batches": (
        set_attribute("gradient_accumulation_steps", lambda trainer: 0),
        SettingError,
        "gradient_accumulation_steps was set to 0",
    ),
}


@pytest.mark.parametrize("name", SET_WRONGLY)
def test_what_is_set_wrongly_is_an_error_before_the_first_step(name: str, tmp_path: Path) -> None:
    do_set, error, text = SET_WRONGLY[name]
    trainer = build(Trainer, tmp_path)

    def set_and_train() -> None:
        do_set(trainer)
        trainer.train(5, 5)

    with pytest.raises(error, match=text):
        set_and_train()
    assert trainer.progress.iter == 0


# ---------------------------------------------------------------- another metric_storage


def replaced(storage: MetricStorage) -> Any:
    def put(trainer: Trainer) -> None:
        trainer.metric_storage = storage

    return put


@pytest.mark.parametrize("stage", ["script", "before_train", "before_epoch"])
def test_a_metric_storage_that_is_set_is_the_runs(stage: str, tmp_path: Path) -> None:
    own = MetricStorage(default_win_size=50)
    put = replaced(own)
    hooks = [CheckpointerHook(save_metric="total_loss", max_first=False), LoggerHook(progress_bar=False)]
    hooks += [] if stage == "script" else [On(**{stage: put})]
    trainer = build(Trainer, tmp_path, schedule=False, epochs=1, hooks=hooks)
    if stage == "script":
        put(trainer)
    trainer.train(5, 5)
    assert trainer.metric_storage is own
    assert own.value("lr") == 0.1
    saved = torch.load(f"{trainer.ckpt_dir}/latest.pth")["metric_storage"]
    assert saved["total_loss"]["latest_iter"] == 6
    assert Path(trainer.ckpt_dir, "best.pth").exists()
    assert "total_loss" in Path(trainer.work_dir, "metrics.jsonl").read_text()


def test_steps_that_are_skipped_are_in_no_mean_of_a_storage_that_is_set(tmp_path: Path) -> None:
    def run(name: str, *hooks: HookBase) -> Trainer:
        settings = {"step_fn": poisoned_step, "data": poisoned(7, {2}, "nan_gradient"), "on_nonfinite": "skip"}
        seed_everything(0)
        trainer = build(Trainer, tmp_path / name, epochs=2, hooks=[*hooks], **settings)
        trainer.train(5, 5)
        return trainer

    own = run("own", On(before_epoch=lambda trainer: replaced(MetricStorage())(trainer) if trainer.epoch else None))
    assert own.value("total_loss") == run("plain").value("total_loss")


def test_something_else_than_a_metric_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="it has to be a MetricStorage"):
        build(Trainer, tmp_path).metric_storage = {}  # type: ignore[assignment]


# ---------------------------------------------------------------- another model to use


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, batch: Any) -> Any:
        return self.inner(batch)


@pytest.mark.parametrize("name", ["model_or_module", "model_evaluate"])
def test_files_hold_the_weights_of_the_model_that_is_evaluated(name: str, tmp_path: Path) -> None:
    class Old17(Trainer):
        pass

    setattr(Old17, name, property(lambda trainer: trainer.model.inner))
    model, seen = Wrapped(), []

    def score(evaluated: nn.Module, batch: Any) -> dict[str, list[float]]:
        seen.append(evaluated)
        return {"acc": [1.0]}

    trainer = Old17(
        model,
        SGD(model.parameters(), lr=0.1),
        None,
        make_batches(2),
        1,
        tmp_path,
        hooks=[EvalHook(make_batches(1), score, save_metric="acc", progress_bar=False)],
    )
    trainer.train(5, 5)
    assert all(evaluated is model.inner for evaluated in seen)
    best = torch.load(f"{trainer.ckpt_dir}/best.pth")
    assert not differences(best, model.inner.state_dict())
    assert list(torch.load(f"{trainer.ckpt_dir}/latest.pth")["model"]) == list(model.state_dict())


def test_nan_is_looked_for_in_the_model_that_a_file_holds(tmp_path: Path) -> None:
    other = Net()
    with torch.no_grad():
        next(other.parameters()).fill_(float("nan"))

    class Old17(Trainer):
        @property
        def model_evaluate(self) -> nn.Module:
            return other

    with pytest.raises(NonFiniteError):
        build(Old17, tmp_path, step_fn=None).save_checkpoint("best.pth")


# ---------------------------------------------------------------- other places for files


class InItsOwnPlaces(Trainer):
    """As a subclass of 1.7 that has its files elsewhere; `sub` is set when the trainer is made already."""

    sub = "a/weights"

    @property
    def ckpt_dir(self) -> str:
        return str(Path(self.work_dir, self.sub))

    @property
    def log_file(self) -> str:
        return str(Path(self.work_dir, "train.log"))


def trained_in_its_own_places(kind: type[Trainer], work_dir: Path, epochs: int, **settings: Any) -> Trainer:
    score = lambda model, batch: {"acc": [float(trainer.epoch)]}  # noqa: E731
    hooks = [
        EvalHook(make_batches(1), score, save_metric="acc", max_to_keep=1, progress_bar=False),
        LoggerHook(progress_bar=False),
    ]
    trainer = build(kind, work_dir, epochs=epochs, hooks=hooks, step_fn=None, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("resume", ["auto", None])
def test_an_override_of_ckpt_dir_says_where_checkpoints_are(resume: str | None, where: str, tmp_path: Path) -> None:
    class Placed(InItsOwnPlaces):
        sub = InItsOwnPlaces.sub if where == "inside" else str(tmp_path / "elsewhere")

    first = trained_in_its_own_places(Placed, tmp_path / "run", 2)
    files = lambda: sorted(path.name for path in Path(first.ckpt_dir).iterdir())  # noqa: E731
    assert files() == ["best.pth", "epoch_1.pth", "latest.pth", "previous.pth"]
    assert not Path(first.work_dir, "checkpoints").exists()
    assert f"{Path(first.ckpt_dir, 'best.pth')}" in Path(first.work_dir, "train.log").read_text()
    assert not Path(first.work_dir, "log.txt").exists()
    second = build(Placed, tmp_path / "run", epochs=3, hooks=[CheckpointerHook(max_to_keep=1)], resume=resume)
    if resume is None:
        second.load_checkpoint("latest.pth")
        assert where == "outside" or second.work_dir == first.work_dir
    second.train()
    assert second.progress.iter == 21
    assert files() == ["best.pth", "epoch_1.pth", "epoch_2.pth", "latest.pth", "previous.pth"]
    second.load_best()


def test_the_last_block_finds_the_state_to_continue_from(tmp_path: Path) -> None:
    hooks = [CheckpointerHook(every_n_iters=2), LoggerHook(progress_bar=False), On(after_iter=at_iter(3, fail))]
    trainer = build(InItsOwnPlaces, tmp_path / "run", hooks=hooks, step_fn=None)
    raised_by(trainer.train, UserError)
    assert str(Path(trainer.ckpt_dir, "latest.pth")) in Path(trainer.log_file).read_text()
