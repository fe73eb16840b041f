"""A setting that cannot be right is an error with a sentence, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, LoggerHook, Trainer


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
