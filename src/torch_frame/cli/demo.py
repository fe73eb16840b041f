"""`torch-frame demo`: real handwritten digits, a run killed half way, and the proof that resuming changed nothing.

`train` below is a whole training script; the rest of the file is the show around it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_frame import CheckpointerHook, EvalHook, LoggerHook, Trainer, set_random_seed

GOAL = 0.98
"""Test accuracy that the demo has to reach."""


class DigitsNet(nn.Module):
    """A small CNN for 8x8 digits; in training it returns its loss and a metric, in evaluation the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip  # one block a line
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 2 * 2, 10))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Any:
        images, labels = batch  # (B, 1, 8, 8) in 0..1, (B,)
        scores = self.head(self.features(images))  # (B, 10)
        if not self.training:
            return scores
        accuracy = (scores.argmax(1) == labels).float().mean()
        return {"cross_entropy": nn.functional.cross_entropy(scores, labels)}, {"train_acc": accuracy}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 images, each fifth one for the test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo needs scikit-learn for its data: pip install 'torch-frame[demo]'"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.from_numpy(data.target).long()
    is_test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
    """One score for each image: was it recognised?"""
    _, labels = batch
    return {"acc": (model(batch).argmax(1) == labels).float()}


def train(work_dir: str, max_epochs: int, resume_from: str | None = None) -> Trainer:
    """Train, or go on with an interrupted run."""
    set_random_seed(0)
    torch.set_num_threads(1)  # so small a model is slower with more, and far slower where the cores are busy
    train_set, test_set = digits()
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max_epochs)
    trainer = Trainer(
        model,
        optimizer,
        scheduler,
        DataLoader(train_set, batch_size=64, shuffle=True),
        max_epochs,
        work_dir,
        clip_grad_norm=1.0,
        warmup_method="linear",
        warmup_iters=50,
        hooks=[
            EvalHook(DataLoader(test_set, batch_size=256), score, save_metric="acc"),
            CheckpointerHook(max_to_keep=2),
            LoggerHook(period=10),
        ],
        use_ema=True,
        create_new_dir=None,
    )
    if resume_from is not None:
        trainer.load_checkpoint(resume_from)
    trainer.train()
    return trainer


# -------------------------------------------------------------------- the show


def demo(work_dir: str, max_epochs: int) -> int:
    """Run the demo below `work_dir`; returns the exit status."""
    started = time.perf_counter()
    folder = _new_folder(Path(work_dir))
    _say(f"1. Training a CNN on scikit-learn's handwritten digits, {max_epochs} epochs.")
    trainer = train(str(folder / "whole"), max_epochs)
    accuracy = trainer.metric_storage["eval_acc"].latest
    _say(f"   Test accuracy of the averaged weights: {accuracy:.2%} (goal: at least {GOAL:.0%}).")

    _say("2. The same training in a second process, killed half way (SIGKILL).")
    killed_at = _train_and_kill(folder / "killed", max_epochs)
    _say(f"   Killed when epoch {killed_at} of {max_epochs} had been evaluated. Resuming from its latest.pth.")
    resumed = train(str(folder / "killed"), max_epochs, str(folder / "killed" / "checkpoints" / "latest.pth"))

    same = _same_weights(trainer, resumed)
    _say(f"   Weights, EMA and optimizer of the two runs are {'equal to the last bit' if same else 'NOT equal'}.")
    _say(_closing_words(folder, time.perf_counter() - started))
    return 0 if same and accuracy >= GOAL else 1


def _new_folder(work_dir: Path) -> Path:
    """A folder for this demo alone: earlier ones stay."""
    number = 1
    while True:
        folder = work_dir / f"demo_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _train_and_kill(folder: Path, max_epochs: int) -> int:
    """Train in another process, and kill it when half of the epochs are logged; returns how many were."""
    command = [sys.executable, "-m", "torch_frame.cli.demo", str(folder), str(max_epochs)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    half, metrics = (max_epochs + 1) // 2, folder / "metrics.jsonl"
    try:
        while process.poll() is None and _epochs_logged(metrics) < half:
            time.sleep(0.005)
    finally:
        process.kill()
        _, errors = process.communicate()
    if process.returncode == 1:
        raise RuntimeError(f"The second process failed:\n{errors}")
    return _epochs_logged(metrics)


def _epochs_logged(metrics: Path) -> int:
    """How many epochs have been evaluated, by metrics.jsonl."""
    if not metrics.exists():
        return 0
    return metrics.read_text(encoding="utf-8").count('"eval_acc"')


def _same_weights(one: Trainer, other: Trainer) -> bool:
    return _equal(one.model.state_dict(), other.model.state_dict()) and (
        _equal(one.model_evaluate.state_dict(), other.model_evaluate.state_dict())
        and _equal(one.optimizer.state_dict(), other.optimizer.state_dict())
    )


def _equal(one: Any, other: Any) -> bool:
    """The same containers, numbers and tensors, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _closing_words(folder: Path, seconds: float) -> str:
    run = folder / "whole"
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    best = max(row.get("eval_acc", 0.0) for row in rows)
    lines = [
        f"Done in {seconds:.0f} s. Best test accuracy {best:.2%}. What there is to look at:",
        f"   work dir      {run}",
        f"   checkpoints   {run / 'checkpoints'} (best.pth: weights; latest.pth: to resume from)",
        f"   TensorBoard   {run / 'tb_logs'}: tensorboard --logdir {folder}",
        f"   curves        {_curves(folder)}",
        f"   side by side  torch-frame show {run} {folder / 'killed'}",
        "Try next: Ctrl-C in the middle of a run and load_checkpoint('latest.pth'), examples/, and your own model in `train`:",
        f"   {os.path.abspath(__file__)}",
    ]
    return "\n".join(lines)


def _curves(folder: Path) -> Path:
    """A picture of both runs' curves; without matplotlib the numbers alone."""
    from torch_frame.report.curves import plot_curves

    runs = [folder / "whole", folder / "killed"]
    try:
        return plot_curves(runs, folder / "curves.png", names=["total_loss", "eval_acc"])
    except ModuleNotFoundError:
        return runs[0] / "metrics.jsonl"


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":  # the process that is killed
    train(sys.argv[1], int(sys.argv[2]))
