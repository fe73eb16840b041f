"""Attributes and forms that scripts of 1.7 lean on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, StepLR

from tests.small_hooks import On
from tests.small_runs import Net, make_trainer
from torch_frame import CheckpointerHook, EarlyStoppingHook, LRWarmupScheduler, RepeatDataset


def test_rank_start_iter_and_info_params(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()])
    trainer.log_param("a line", lr=0.1)
    assert (trainer.rank, trainer.start_iter, trainer.info_params) == (0, 0, ["a line", "lr: 0.1"])
    trainer.train()
    resumed = make_trainer(tmp_path / "run", hooks=[CheckpointerHook()], max_epochs=4)
    resumed.load_checkpoint(Path(trainer.ckpt_dir, "latest.pth"))
    assert resumed.start_iter == 10


def test_between_epochs_inner_iter_is_the_last_batchs(tmp_path: Path) -> None:
    seen: list[Any] = []
    look = lambda stage: lambda trainer: seen.append((stage, trainer.inner_iter))  # noqa: E731
    stages = ("before_train", "before_epoch", "after_epoch", "after_train")
    make_trainer(tmp_path, hooks=[On(**{stage: look(stage) for stage in stages})]).train()
    assert seen == [
        ("before_train", 0), ("before_epoch", 0), ("after_epoch", 4), ("before_epoch", 4), ("after_epoch", 4), ("after_train", 4),
    ]  # fmt: skip


def test_numpys_numbers_and_none_for_flags_are_taken(tmp_path: Path) -> None:
    hooks = [
        CheckpointerHook(period=np.int64(1), max_to_keep=np.int32(1)),
        EarlyStoppingHook("total_loss", np.int64(5)),
    ]
    settings = {
        "max_epochs": np.int64(2),
        "use_ema": None,
        "enable_amp": None,
        "gradient_accumulation_steps": np.int16(1),
    }
    trainer = make_trainer(tmp_path, hooks=hooks, **settings)
    trainer.train()
    assert trainer.progress.iter == 10


def test_the_warm_up_is_a_torch_scheduler() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = LRWarmupScheduler(StepLR(optimizer, 1, 0.5), 2, "linear", 4, 0.1, -1)
    for _ in range(6):
        optimizer.step()
        warmup.step()
    assert isinstance(warmup, LRScheduler)
    assert (warmup.last_epoch, list(warmup.base_lrs)) == (6, [1.0])
    assert warmup.get_last_lr() == warmup.get_lr() == [0.125]


def test_accelerate_prepares_the_warm_up_as_a_scheduler() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    optimizer = SGD(model.parameters(), lr=1.0)
    warmup = LRWarmupScheduler(StepLR(optimizer, 1, 0.5), 2, "linear", 4, 0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(warmup)
    assert type(prepared).__name__ == "AcceleratedScheduler"


def test_a_dataset_repeated_no_times_is_empty() -> None:
    assert len(RepeatDataset("ab", np.int64(0))) == 0
    assert list(RepeatDataset("ab", np.int64(2))) == ["a", "b", "a", "b"]
