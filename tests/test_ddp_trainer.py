"""DDPTrainer without a process group, and what it says; on several ranks: tests/distributed and tests/examples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import TensorDataset, WeightedRandomSampler

from tests.small_runs import Net, differences, weights_of
from torch_frame import DDPTrainer, SettingError, Trainer

DATA = TensorDataset(torch.arange(36.0).reshape(12, 3) / 36, torch.ones(12, 1))


def make(folder: Path, params: Any = None, **settings: Any) -> DDPTrainer:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    given = {"batch_size": 4} if params is None else params
    return DDPTrainer(model, optimizer, None, DATA, given, 2, folder, **{"hooks": [], "seed": 3, **settings})


@pytest.mark.parametrize("use_dist", [None, False])
def test_without_a_group_it_trains_as_a_trainer(use_dist: bool | None, tmp_path: Path) -> None:
    trainer = make(tmp_path / "ddp", use_dist=use_dist)
    assert trainer.use_dist is False
    trainer.train(5, 5)
    model = Net()
    loader = torch.utils.data.DataLoader(DATA, 4, shuffle=True)
    Trainer(model, SGD(model.parameters(), lr=0.1), None, loader, 2, tmp_path / "one", hooks=[], seed=3).train(5, 5)
    assert differences(weights_of(trainer.model), weights_of(model)) == []


def test_its_signature_is_that_of_1_7_with_use_dist() -> None:
    names = list(inspect.signature(DDPTrainer).parameters)
    assert " ".join(names) == (
        "model optimizer lr_scheduler dataset dataset_params max_epochs work_dir clip_grad_norm enable_amp warmup_method "
        "warmup_iters warmup_factor hooks use_ema ema_decay create_new_dir use_dist settings"
    )
    own = {name for name in vars(DDPTrainer) if not name.startswith("__")}
    assert own == set(), "it chooses the strategy and makes the loader; the loop is Trainer's"


def test_what_a_data_loader_takes_is_taken(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"batch_size": 5, "drop_last": True, "num_workers": 0})
    assert trainer.epoch_len == 2
    trainer = make(tmp_path, {"batch_size": 5, "sampler": WeightedRandomSampler([1.0] * 12, 7)})
    assert trainer.epoch_len == 2


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"batch_size": 2, "shuffle": True}, SettingError, "'shuffle'.*Remove 'shuffle'"),
        ({"batch_size": 2, "shuffle": False}, SettingError, "'shuffle'.*Remove 'shuffle'"),
        ({"dataset": DATA}, SettingError, "'dataset'"),
        (4, TypeError, "dict"),
    ],
)
def test_what_cannot_be_is_told(params: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path, params)


def test_use_dist_without_a_group_is_told_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no process group.*torchrun.*init_process_group"):
        make(tmp_path, use_dist=True)
    with pytest.raises(TypeError, match="use_dist"):
        make(tmp_path, use_dist="yes")
