"""Augmentation in a run: the same for any number of workers and after a resume; the guide's dataset runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torch_frame import HookBase, Trainer
from torch_frame.vision import (
    ColorJitter,
    RandomBrightness,
    letterbox,
    mixup_boxes,
    mosaic,
    random_crop,
    random_flip,
    random_perspective,
)

GUIDE = Path(__file__).parents[2] / "docs" / "vision.md"


class Augmented(Dataset):
    """Every augmentation on small pictures; an item is the picture's mean, (3,), and the sum of its boxes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.data = [(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), [[1, 3, 3, 20, 15]]) for _ in range(12)]
        self.jitter, self.old = ColorJitter((-20, 20), hue=(-9, 9), p=0.5), RandomBrightness(p=0.5)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        image, boxes = mosaic([self.data[(index + k) % 12] for k in range(4)], (16, 16))
        image, boxes = mixup_boxes(image, boxes, *self.data[index])
        image, boxes = random_perspective(self.old(self.jitter(image)), boxes, class_first=True)
        image, boxes = random_crop(*random_flip(image, boxes, class_first=True), class_first=True)
        image, boxes, *_ = letterbox(image, (16, 16), boxes, class_first=True)
        return torch.tensor([image.mean(), boxes.sum()], dtype=torch.float32)


class Recorder(HookBase):
    def __init__(self, seen: list[torch.Tensor], stop_after: int | None) -> None:
        self.seen, self.stop_after = seen, stop_after

    def after_iter(self) -> None:
        if self.stop_after is not None and self.trainer.cur_iter + 1 >= self.stop_after:
            self.trainer.should_stop = True


def run(folder: Path, workers: int, stop_after: int | None = None, resume: Any = None) -> list[torch.Tensor]:
    """The batches of two epochs of 4."""
    model, seen = nn.Linear(2, 1), []

    def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.clone())
        return model(batch / 1000).mean()

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(Augmented(), 3, shuffle=True, num_workers=workers)
    hooks = [Recorder(seen, stop_after)]
    settings = {"step_fn": step, "hooks": hooks, "seed": 3, "resume": resume}
    trainer = Trainer(model, optimizer, schedule, loader, 2, folder, **settings)
    trainer.train(5, 5)
    trainer.save_checkpoint("state.pth", save_single_model=False)
    return seen


def test_augmentation_is_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path):
    whole = torch.stack(run(tmp_path / "whole", 0))
    assert len(whole) == 8
    assert len(whole.flatten(0, 1).unique(dim=0)) == 24  # no two samples are alike
    assert torch.equal(whole, torch.stack(run(tmp_path / "workers", 2)))
    first = run(tmp_path / "parts", 0, stop_after=3)
    assert len(first) < 8
    rest = run(tmp_path / "rest", 0, resume=tmp_path / "parts" / "checkpoints" / "state.pth")
    assert torch.equal(whole, torch.stack(first + rest))


def test_the_guides_dataset_runs(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    image, rows = names["image"], names["rows"]
    assert image.shape == (64, 64, 3)
    assert image.dtype == torch.uint8
    assert rows.shape[1] == 5
