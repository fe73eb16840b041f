"""A setting that cannot be right is an error with a sentence, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import On, Recorder
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, LoggerHook, SettingError, Trainer


def model_and_optimizer() -> dict[str, Any]:
    model = Net()
    return {"model": model, "optimizer": SGD(model.parameters(), lr=0.1)}


BAD_SETTINGS = {
    "model_of_another_type": {"model": 3},
    "optimizer_of_another_model": {"optimizer": SGD(Net().parameters(), lr=0.1)},
    "scheduler_of_another_optimizer": {"lr_scheduler": StepLR(SGD(Net().parameters(), lr=0.1), 1)},
    "dataset_without_loader": {"data_loader": TensorDataset(torch.ones(3))},
    "loader_not_iterable": {"data_loader": 5},
    "negative_epochs": {"max_epochs": -1},
    "epochs_not_whole": {"max_epochs": 1.5},
    "interval": {"lr_scheduler_interval": "step"},
    "precision": {"precision": "fp8"},
    "accumulation": {"gradient_accumulation_steps": 0},
    "warmup_method": {"warmup_method": "quadratic"},
    "ema_decay": {"use_ema": True, "ema_decay": 1.5},
    "create_new_dir": {"create_new_dir": "year"},
    "on_nonfinite": {"on_nonfinite": "ignore"},
    "hook_class": {"hooks": [LoggerHook]},
    "hook_not_in_list": {"hooks": LoggerHook()},
    "no_hook": {"hooks": ["logger"]},
    "plateau_metric_alone": {"lr_scheduler_metric": "total_loss"},
}


@pytest.mark.parametrize("bad", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_an_error_with_a_sentence(bad: dict[str, Any], tmp_path: Path) -> None:
    good = {"lr_scheduler": None, "data_loader": make_batches(), "max_epochs": 1, "work_dir": tmp_path / "run"}
    error = raised_by(lambda: Trainer(**{**model_and_optimizer(), **good, **bad}), Exception)
    assert isinstance(error, ValueError | TypeError)
    assert len(str(error)) > 30
    assert list(tmp_path.iterdir()) == []


def test_hooks_none_is_a_checkpointer_and_a_logger(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=None)
    assert [type(hook) for hook in trainer.hooks] == [CheckpointerHook, LoggerHook]


def test_a_model_with_frozen_parameters_trains_the_others(tmp_path: Path) -> None:
    model = Net()
    model.layers[0].requires_grad_(False)
    before = weights_of(model)
    make_trainer(tmp_path, model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)).train()
    changed = {line.split(":")[0] for line in differences(before, weights_of(model))}
    assert changed == {".layers.2.weight", ".layers.2.bias"}


# ---------------------------------------------------------------- settings that are set later


def by_iter(trainer: Trainer) -> None:
    trainer.lr_scheduler_interval = "iter"


@pytest.mark.parametrize(
    ("hooks", "steps"),
    [
        ({}, [0, 0, 0, 1, 1, 1]),
        ({"before_train": by_iter}, [1, 2, 3, 4, 5, 6]),
        ({"before_epoch": lambda trainer: by_iter(trainer) if trainer.epoch == 1 else None}, [0, 0, 0, 2, 3, 4]),
    ],
    ids=["not set", "in before_train", "in the second epoch"],
)
def test_an_interval_that_is_set_counts_from_then_on(hooks: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = Recorder(lambda trainer: trainer.lr)
    schedule = ExponentialLR(optimizer, 0.5)
    make_trainer(tmp_path, model, optimizer, schedule, make_batches(3), hooks=[On(**hooks), rates]).train()
    assert rates.values == [0.1 * 0.5**step for step in steps]


def test_an_interval_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="lr_scheduler_interval was set to 'iters'"):
        make_trainer(tmp_path).lr_scheduler_interval = "iters"  # type: ignore[assignment]


@pytest.mark.parametrize(("name", "value"), [("on_nonfinite", "skip"), ("take_over", False)])
def test_a_setting_that_would_not_count_cannot_be_set(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(make_trainer(tmp_path), name, value)


def test_prefetch_may_be_set(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, data=DataLoader(TensorDataset(torch.ones(4, 3)), num_workers=1))
    trainer.prefetch = False
    with pytest.raises(SettingError, match="prefetch=False, but data_loader has 1 workers"):
        trainer.train()


def test_a_seed_is_set_before_the_run(tmp_path: Path) -> None:
    """In it the data's order is of the old one, and the state would have said that it is of the new one."""
    trainer = make_trainer(tmp_path, hooks=[On(before_train=lambda trainer: setattr(trainer, "seed", 5))], seed=3)
    trainer.seed = 4
    with pytest.raises(SettingError, match="is in the order of seed 4"):
        trainer.train()


def test_a_seed_that_a_script_has_set_is_compared_on_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"create_new_dir": None, "hooks": [CheckpointerHook()]}
    make_trainer(tmp_path / "run", max_epochs=1, seed=3, **settings).train()
    trainer = make_trainer(tmp_path / "run", resume="auto", **{**settings, "hooks": [CheckpointerHook()]})
    trainer.seed = 4
    with pytest.raises(CheckpointError, match="seed was 3, now it is 4"):
        trainer.train()
