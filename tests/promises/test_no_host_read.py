"""On a device other than the CPU a step waits for nothing: torch's meta device has no values, so reading one is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from torch_frame import HookBase, LoggerHook, Trainer

BATCHES = 10


class Losses(HookBase):
    """Counts the steps, and logs a value of its own."""

    def __init__(self) -> None:
        self.num_steps = 0

    def after_iter(self) -> None:
        self.num_steps += 1
        self.trainer.log(self.trainer.cur_iter, norm=self.trainer.model[0].weight.norm())


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    images, labels = batch
    scores = model(images)
    return {"ce": nn.functional.cross_entropy(scores, labels), "size": scores.square().mean()}


def steps_before_a_read(
    work_dir: Path, optimizer: type[Optimizer] = AdamW, period: int = BATCHES + 1, **settings: Any
) -> int:
    """How many steps of a run on the meta device come before anything is read, which ends it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 4)).to("meta")
    made = optimizer(model.parameters(), lr=0.1)
    data = [(torch.randn(4, 8), torch.randint(0, 4, (4,))) for _ in range(BATCHES)]
    losses = Losses()
    hooks = [losses, LoggerHook(period, progress_bar=False)]
    trainer = Trainer(model, made, StepLR(made, 3), data, 3, work_dir, hooks=hooks, step_fn=step, **settings)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        trainer.train()
    return losses.num_steps


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 1.0},
        {"use_ema": True},
        {"gradient_accumulation_steps": 4},
        {"loss_weight": lambda batch: batch[1].ne(0).sum()},
        {"loss_weight": lambda batch: batch[1].ne(0).sum(), "gradient_accumulation_steps": 4},
        {"warmup_method": "linear", "warmup_iters": 5, "lr_scheduler_interval": "iter"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_nothing_is_read_before_the_epoch_ends(
    settings: dict[str, Any], optimizer: type[Optimizer], tmp_path: Path
) -> None:
    assert steps_before_a_read(tmp_path, optimizer, **settings) == BATCHES


def test_leaving_steps_out_where_they_are_not_finite_reads_once_an_update(tmp_path: Path) -> None:
    assert steps_before_a_read(tmp_path, on_nonfinite="skip") == 0


def test_a_log_point_reads(tmp_path: Path) -> None:
    assert steps_before_a_read(tmp_path, period=3) == 3
