"""On several processes what decides is the same everywhere, and only rank 0 writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook, EarlyStoppingHook, HookBase, LoggerHook
from torch_frame.tracking.writers import JsonlWriter, TensorBoardWriter

SCORES = {0: [0.1, 0.5, 0.4, 0.3, 0.2, 0.1], 1: [0.6, 0.5, 0.4, 0.3, 0.2, 0.9]}


class RankScore(HookBase):
    """Logs another score on each rank, and shows a picture on each."""

    def after_epoch(self) -> None:
        self.log(self.trainer.epoch, score=SCORES[dist.get_rank()][self.trainer.epoch], smooth=False)
        self.trainer.add_image("picture", torch.rand(3, 2, 2))
        self.trainer.add_text("note", "once")


class CountingWriter(JsonlWriter):
    """Counts what it is given on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def begin(self, run: Any) -> None:
        self.num_calls += 1
        super().begin(run)

    def write(self, step: int, values: Any) -> None:
        self.num_calls += 1
        super().write(step, values)

    def image(self, step: int, name: str, image: Any) -> None:
        self.num_calls += 1


def decide(work_dir: Path) -> dict[str, Any]:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    best, stop = CheckpointerHook(save_metric="score"), EarlyStoppingHook("score", patience=3)
    writer = CountingWriter()
    hooks = [RankScore(), best, stop, LoggerHook(1, writers=[writer, TensorBoardWriter()])]
    inputs, targets = make_batches(1, 16)[0]
    data = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    trainer = make_trainer(
        work_dir, model, optimizer, ReduceLROnPlateau(optimizer, "max", patience=1), data, 6,
        lr_scheduler_metric="score", hooks=hooks,
    )  # fmt: skip
    trainer.train()
    return {
        "decided": (best.cur_best, stop.best, stop.best_epoch, trainer.progress.epoch, trainer.lr),
        "num_calls": writer.num_calls,
    }


def test_the_score_of_rank_0_decides_and_only_rank_0_writes(tmp_path: Path) -> None:
    first, second = on_processes(decide, tmp_path, 2, tmp_path / "run")
    assert first["decided"] == second["decided"]
    assert first["decided"][:4] == (0.5, 0.5, 1, 5)  # as one process with rank 0's scores
    assert first["num_calls"] > 0 == second["num_calls"]
    assert len(os.listdir(tmp_path / "run" / "tb_logs")) == 1
    iters = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "total_loss" in line]
    assert len(iters) == 10
