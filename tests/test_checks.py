"""The mistakes of the first hour: each is told in a sentence, before or at the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.small_runs import Net, differences, make_batches, raised_by, weights_of
from torch_frame import (
    CheckpointerHook,
    EarlyStoppingHook,
    EvalHook,
    LoggerHook,
    NonFiniteError,
    SettingError,
    StepOutputError,
    Trainer,
    WorkDirError,
)

Settings = dict[str, Any]
MAKING, TRAIN, FIRST_STEP = "making the trainer", "train(), before anything is written", "the first step or before it"


@dataclass
class Mistake:
    """What a user gets wrong, when he is to be told, and by which error with which words."""

    make: Callable[[Settings], Settings]
    """From good settings to the ones that differ."""
    when: str
    error: type[Exception] | tuple[type[Exception], ...]
    words: Iterable[str]
    trainer: type[Trainer] = Trainer


def good(tmp_path: Path) -> Settings:
    model = Net()
    return {
        "model": model,
        "optimizer": SGD(model.parameters(), lr=0.05),
        "lr_scheduler": None,
        "data_loader": make_batches(),
        "max_epochs": 2,
        "work_dir": tmp_path / "run",
        "hooks": [],
    }


def fixed(**settings: Any) -> Callable[[Settings], Settings]:
    return lambda _: settings


def returning(form: Callable[[Tensor], Any]) -> Callable[[Settings], Settings]:
    return fixed(step_fn=lambda model, batch: form(model(batch)))


def scores(*values: float) -> Callable[..., Any]:
    return lambda model, batch: {"acc": list(values)}


def frozen(settings: Settings) -> Settings:
    settings["model"].requires_grad_(False)
    return {}


def loss_of_frozen_parts(settings: Settings) -> Settings:
    settings["model"].layers[0].requires_grad_(False)
    return {"step_fn": lambda model, batch: model.layers[0](batch[0]).square().mean()}


def without_grad(settings: Settings) -> Settings:
    @torch.no_grad()
    def step(model: nn.Module, batch: Any) -> Any:
        return model(batch)

    return {"step_fn": step}


def file_in_the_way(settings: Settings) -> Settings:
    settings["work_dir"].parent.joinpath("file").write_text("")
    return {"work_dir": settings["work_dir"].parent / "file" / "run"}


def a_file_itself(settings: Settings) -> Settings:
    settings["work_dir"].write_text("")
    return {"create_new_dir": None}


def one_cycle(interval: str, total_steps: int) -> Callable[[Settings], Settings]:
    return lambda settings: {
        "lr_scheduler": OneCycleLR(settings["optimizer"], 0.1, total_steps=total_steps),
        "lr_scheduler_interval": interval,
    }


def plateau(**settings: Any) -> Callable[[Settings], Settings]:
    return lambda given: {"lr_scheduler": ReduceLROnPlateau(given["optimizer"]), **settings}


def twice(settings: Settings) -> Settings:
    hook = LoggerHook()
    return {"hooks": [hook, hook]}


class ReturnsNothing(Trainer):
    def train_one_iter(self, batch: Any) -> Any:
        super().train_one_iter(batch)


class ReturnsLoss(Trainer):
    def train_one_iter(self, batch: Any) -> Any:
        return super().train_one_iter(batch)["total_loss"]


def other_optimizer() -> SGD:
    return SGD(Net().parameters(), lr=0.05)


def nan_data(settings: Settings) -> Settings:
    return {"data_loader": [(x * float("nan"), y) for x, y in settings["data_loader"]]}


MISTAKES: dict[str, Mistake] = {
    # names that nobody logs
    "save_metric_of_a_checkpointer": Mistake(
        fixed(hooks=[CheckpointerHook(save_metric="totl_loss")]),
        FIRST_STEP,
        SettingError,
        ("'totl_loss'", "total_loss"),
    ),
    "save_metric_of_an_evaluation": Mistake(
        fixed(hooks=[EvalHook([0], scores(1.0), save_metric="accuracy")]),
        FIRST_STEP,
        SettingError,
        ("'accuracy'", "'acc'"),
    ),
    "metric_of_early_stopping": Mistake(
        fixed(hooks=[EarlyStoppingHook("totl_loss")]), FIRST_STEP, SettingError, ("'totl_loss'", "total_loss")
    ),
    "metric_of_the_plateau_scheduler": Mistake(
        plateau(lr_scheduler_metric="totl_loss"), FIRST_STEP, SettingError, ("'totl_loss'", "total_loss")
    ),
    "plateau_scheduler_without_a_metric": Mistake(plateau(), MAKING, SettingError, ("lr_scheduler_metric",)),
    "plateau_scheduler_per_iteration": Mistake(
        plateau(lr_scheduler_metric="total_loss", lr_scheduler_interval="iter"),
        MAKING,
        SettingError,
        ("ReduceLROnPlateau", "epoch"),
    ),
    "metric_without_a_plateau_scheduler": Mistake(
        fixed(lr_scheduler_metric="total_loss"), MAKING, SettingError, ("lr_scheduler_metric",)
    ),
    # things that do not belong together
    "optimizer_of_another_model": Mistake(
        fixed(optimizer=other_optimizer()), MAKING, SettingError, ("optimizer", "model.parameters()")
    ),
    "scheduler_of_another_optimizer": Mistake(
        fixed(lr_scheduler=StepLR(other_optimizer(), 1)), MAKING, SettingError, ("lr_scheduler", "optimizer")
    ),
    "no_trainable_parameter": Mistake(frozen, MAKING, SettingError, ("parameter",)),
    "one_cycle_for_iterations_steps_per_epoch": Mistake(
        one_cycle("epoch", 10), TRAIN, SettingError, ("OneCycleLR", "'iter'")
    ),
    "one_cycle_for_epochs_steps_per_iteration": Mistake(
        one_cycle("iter", 2), TRAIN, SettingError, ("OneCycleLR", "'epoch'")
    ),
    "one_cycle_too_short": Mistake(one_cycle("iter", 7), TRAIN, SettingError, ("OneCycleLR", "total_steps=10")),
    # something else than was asked for
    "model_class": Mistake(fixed(model=Net), MAKING, TypeError, ("model", "Net")),
    "optimizer_class": Mistake(fixed(optimizer=SGD), MAKING, TypeError, ("optimizer", "SGD")),
    "parameters_for_an_optimizer": Mistake(
        lambda settings: {"optimizer": settings["model"].parameters()}, MAKING, TypeError, ("optimizer", "generator")
    ),
    "model_and_optimizer_swapped": Mistake(
        lambda settings: {"model": settings["optimizer"], "optimizer": settings["model"]},
        MAKING,
        TypeError,
        ("model", "SGD"),
    ),
    "scheduler_class": Mistake(fixed(lr_scheduler=StepLR), MAKING, TypeError, ("lr_scheduler", "StepLR")),
    "scheduler_name": Mistake(fixed(lr_scheduler="cosine"), MAKING, TypeError, ("lr_scheduler", "str")),
    "epochs_as_text": Mistake(fixed(max_epochs="10"), MAKING, TypeError, ("max_epochs", "'10'")),
    "epochs_as_float": Mistake(fixed(max_epochs=10.0), MAKING, TypeError, ("max_epochs", "10.0")),
    "negative_epochs": Mistake(fixed(max_epochs=-1), MAKING, SettingError, ("max_epochs", "-1")),
    "dataset_for_a_loader": Mistake(
        fixed(data_loader=TensorDataset(torch.ones(3))), MAKING, TypeError, ("data_loader", "DataLoader(")
    ),
    "loader_class": Mistake(fixed(data_loader=DataLoader), MAKING, TypeError, ("data_loader", "DataLoader")),
    "path_for_a_loader": Mistake(fixed(data_loader="data/train"), MAKING, TypeError, ("data_loader", "str")),
    "number_for_a_loader": Mistake(fixed(data_loader=5), MAKING, TypeError, ("data_loader", "int")),
    "nothing_for_a_loader": Mistake(fixed(data_loader=None), MAKING, TypeError, ("data_loader", "None")),
    "empty_list": Mistake(fixed(data_loader=[]), TRAIN, SettingError, ("data_loader", "no batch")),
    "empty_by_drop_last": Mistake(
        fixed(data_loader=DataLoader(TensorDataset(torch.ones(3)), batch_size=8, drop_last=True)),
        TRAIN,
        SettingError,
        ("3 samples", "batch_size is 8", "drop_last is True"),
    ),
    "generator_for_several_epochs": Mistake(
        fixed(data_loader=(batch for batch in make_batches())), TRAIN, SettingError, ("iterator", "2")
    ),
    "accumulation_of_0": Mistake(
        fixed(gradient_accumulation_steps=0), MAKING, SettingError, ("gradient_accumulation_steps", "0")
    ),
    "accumulation_as_float": Mistake(
        fixed(gradient_accumulation_steps=2.0), MAKING, SettingError, ("gradient_accumulation_steps", "2.0")
    ),
    "clip_grad_norm_none": Mistake(
        fixed(clip_grad_norm=None), MAKING, (TypeError, ValueError), ("clip_grad_norm", "None")
    ),
    "clip_grad_norm_nan": Mistake(fixed(clip_grad_norm=float("nan")), MAKING, ValueError, ("clip_grad_norm", "nan")),
    "clip_grad_norm_as_text": Mistake(
        fixed(clip_grad_norm="1.0"), MAKING, (TypeError, ValueError), ("clip_grad_norm", "'1.0'")
    ),
    "interval": Mistake(fixed(lr_scheduler_interval="step"), MAKING, SettingError, ("'step'", "'iter'")),
    "precision": Mistake(fixed(precision="float16"), MAKING, SettingError, ("'float16'", "'fp16'")),
    "precision_against_amp": Mistake(
        fixed(precision="bf16", enable_amp=True), MAKING, SettingError, ("enable_amp", "'bf16'")
    ),
    "on_nonfinite": Mistake(fixed(on_nonfinite="ignore"), MAKING, SettingError, ("'ignore'", "'skip'")),
    "warmup_method": Mistake(fixed(warmup_method="cosine"), MAKING, SettingError, ("'cosine'", "'linear'")),
    "create_new_dir": Mistake(fixed(create_new_dir="time"), MAKING, ValueError, ("'time'", "'time_s'")),
    "ema_decay": Mistake(fixed(use_ema=True, ema_decay=99.99), MAKING, SettingError, ("ema_decay", "99.99")),
    "step_fn": Mistake(fixed(step_fn="loss"), MAKING, TypeError, ("step_fn",)),
    "loss_weight": Mistake(fixed(loss_weight=16), MAKING, TypeError, ("loss_weight", "16")),
    # hooks
    "hook_class": Mistake(fixed(hooks=[LoggerHook]), MAKING, TypeError, ("LoggerHook(",)),
    "one_hook": Mistake(fixed(hooks=LoggerHook()), MAKING, TypeError, ("[LoggerHook(",)),
    "one_hook_class": Mistake(fixed(hooks=LoggerHook), MAKING, TypeError, ("LoggerHook",)),
    "no_hook": Mistake(fixed(hooks=["logger"]), MAKING, TypeError, ("'logger'", "HookBase")),
    "hook_twice": Mistake(twice, MAKING, SettingError, ("LoggerHook", "twice")),
    # the step
    "returns_nothing": Mistake(returning(lambda loss: None), FIRST_STEP, StepOutputError, ("None", "return")),
    "returns_a_number": Mistake(returning(lambda loss: loss.item()), FIRST_STEP, StepOutputError, ("float", ".item()")),
    "returns_a_list": Mistake(returning(lambda loss: [loss]), FIRST_STEP, StepOutputError, ("list",)),
    "returns_a_vector": Mistake(
        returning(lambda loss: loss.repeat(3)), FIRST_STEP, StepOutputError, ("(3,)", ".mean()")
    ),
    "returns_predictions": Mistake(
        fixed(step_fn=lambda model, batch: model.predict(batch[0])), FIRST_STEP, StepOutputError, ("(4, 1)",)
    ),
    "detached": Mistake(returning(lambda loss: loss.detach()), FIRST_STEP, StepOutputError, ("graph", "requires_grad")),
    "rebuilt": Mistake(
        returning(lambda loss: torch.tensor(loss.item())), FIRST_STEP, StepOutputError, ("graph", "torch.tensor")
    ),
    "no_grad": Mistake(without_grad, FIRST_STEP, StepOutputError, ("graph", "no_grad")),
    "loss_of_frozen_parts": Mistake(loss_of_frozen_parts, FIRST_STEP, StepOutputError, ("graph", "parameter")),
    "total_loss_in_dict": Mistake(
        returning(lambda loss: {"total_loss": loss, "a": loss}), FIRST_STEP, StepOutputError, ("total_loss",)
    ),
    "metric_that_is_text": Mistake(
        returning(lambda loss: ({"a": loss}, {"b": "good"})), FIRST_STEP, StepOutputError, ("'b'",)
    ),
    "train_one_iter_returns_nothing": Mistake(
        fixed(), FIRST_STEP, TypeError, ("train_one_iter", "NoneType", "dict"), ReturnsNothing
    ),
    "train_one_iter_returns_a_loss": Mistake(
        fixed(), FIRST_STEP, TypeError, ("train_one_iter", "Tensor", "dict"), ReturnsLoss
    ),
    "nan_in_the_data": Mistake(nan_data, FIRST_STEP, NonFiniteError, ("epoch 1", "iteration 0", "total_loss=nan")),
    # evaluation
    "mean_of_a_batch": Mistake(
        fixed(hooks=[EvalHook([0], lambda model, batch: {"acc": 0.5}, save_metric="acc")]),
        FIRST_STEP,
        TypeError,
        ("'acc'", "each sample"),
    ),
    "empty_evaluation": Mistake(
        fixed(hooks=[EvalHook([], scores(1.0), save_metric="acc")]), FIRST_STEP, SettingError, ("empty",)
    ),
    # files
    "file_in_the_way_of_the_work_dir": Mistake(file_in_the_way, TRAIN, WorkDirError, ("file",)),
    "work_dir_is_a_file": Mistake(a_file_itself, TRAIN, WorkDirError, ("run",)),
    "work_dir_is_empty": Mistake(fixed(work_dir=""), MAKING, ValueError, ("work_dir",)),
}


def is_a_sentence(text: str) -> bool:
    return len(text) >= 30 and text.rstrip()[-1] in ".)?'"


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_sentence_before_or_at_the_first_step(mistake: Mistake, tmp_path: Path) -> None:
    settings = good(tmp_path)
    model, before = settings["model"], weights_of(settings["model"])
    settings = {**settings, **mistake.make(settings)}
    files_before = sorted(tmp_path.rglob("*"))
    made: list[Trainer] = []

    def use() -> None:
        made.append(mistake.trainer(**settings))
        made[0].train()

    error = raised_by(use, Exception)
    assert isinstance(error, mistake.error), repr(error)
    message = str(error)
    for word in mistake.words:
        assert word in message
    assert is_a_sentence(message), message
    if mistake.when == MAKING:
        assert made == [], "told only by train()"
    if mistake.when in (MAKING, TRAIN):
        assert sorted(tmp_path.rglob("*")) == files_before
        assert differences(before, weights_of(model)) == []
    else:
        assert made[0].progress.num_updates <= 1


def test_a_name_that_only_a_hook_could_log_is_told_after_the_first_epoch(tmp_path: Path) -> None:
    """The evaluation's prefix is missing; what a hook will log is not known before it does."""
    hooks = [EvalHook([0], scores(1.0)), CheckpointerHook(save_metric="acc")]
    trainer = Trainer(**{**good(tmp_path), "hooks": hooks})
    with pytest.raises(SettingError, match=r"'acc'.*eval_acc"):
        trainer.train()
    assert trainer.epoch == 0


def test_the_good_settings_train(tmp_path: Path) -> None:
    trainer = Trainer(**good(tmp_path))
    trainer.train()
    assert trainer.progress.epoch == 2


class KeepsATensor(Net):
    """Holds a plain tensor, which `model.to(device)` leaves where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(4, 1, device="meta")

    def forward(self, batch: Any) -> Tensor:
        return (self.predict(batch[0]) * self.scale).mean()


def with_model_that_keeps_a_tensor(settings: Settings) -> Settings:
    model = KeepsATensor()
    return {"model": model, "optimizer": SGD(model.parameters(), lr=0.05)}


ON_ANOTHER_DEVICE: dict[str, Callable[[Settings], Settings]] = {
    "made_in_the_step": fixed(
        step_fn=lambda model, batch: (model.predict(batch[0]) + torch.ones(4, 1, device="meta")).mean()
    ),
    "held_by_the_model": with_model_that_keeps_a_tensor,
    "made_for_the_loss": fixed(
        step_fn=lambda model, batch: nn.functional.mse_loss(model.predict(batch[0]), torch.ones(4, 1, device="meta"))
    ),
}


@pytest.mark.parametrize("make", ON_ANOTHER_DEVICE.values(), ids=ON_ANOTHER_DEVICE)
def test_a_tensor_on_another_device_is_torchs_error_with_a_note(make: Any, tmp_path: Path) -> None:
    settings = good(tmp_path)
    trainer = Trainer(**{**settings, **make(settings)})
    error = raised_by(trainer.train, RuntimeError)
    assert any("cpu" in note and "device" in note for note in getattr(error, "__notes__", [])), str(error)


def test_a_model_moved_after_the_trainer_was_made_is_told(tmp_path: Path) -> None:
    settings = good(tmp_path)
    trainer = Trainer(**settings)
    settings["model"].to("meta")
    with pytest.raises(SettingError, match=r"cpu.*meta"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_one_loss_without_a_graph_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = lambda model, batch: {"fine": model(batch), "cut": model(batch).detach(), "off": 0.0}  # noqa: E731
    with caplog.at_level(logging.WARNING, "torch_frame"):
        Trainer(**{**good(tmp_path), "step_fn": step}).train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "cut" in warnings[0]
    assert "fine" not in warnings[0].replace("cut", "")


def test_a_metric_that_a_hook_logs_each_second_epoch_is_no_mistake(tmp_path: Path) -> None:
    """Names that come from a hook are known only when it logs them."""
    evaluation = EvalHook([0], scores(1.0), period=2)
    settings = good(tmp_path)
    settings["hooks"] = [evaluation, EarlyStoppingHook("eval_acc", patience=5)]
    settings["lr_scheduler"] = ReduceLROnPlateau(settings["optimizer"])
    Trainer(**{**settings, "lr_scheduler_metric": "eval_acc", "max_epochs": 4}).train()
