"""AccelerateTrainer on scikit-learn's handwritten digits: one script for one process and for several.

python examples/accelerate_digits.py
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/accelerate_digits.py     # without a GPU
accelerate launch examples/accelerate_digits.py --mixed-precision bf16      # as `accelerate config` says
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_frame import AccelerateTrainer, CheckpointerHook, EvalHook, LoggerHook


def make_datasets() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 x 8 pixels, every fifth one for evaluation."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    is_held_out = torch.arange(len(targets)) % 5 == 0
    return (
        TensorDataset(pixels[~is_held_out], targets[~is_held_out]),
        TensorDataset(pixels[is_held_out], targets[is_held_out]),
    )


class Classifier(nn.Module):
    """model(batch) returns the loss in training, else the classes' scores, (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def forward(self, batch: tuple[Tensor, Tensor]) -> Any:
        images, labels = batch
        scores = self.layers(images)
        return {"loss": F.cross_entropy(scores, labels)} if self.training else scores


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """1 for each image that is recognised, else 0."""
    return {"acc": (model(batch).argmax(dim=1) == batch[1]).float()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--work-dir", default="work_dir/accelerate_digits")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    args = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = make_datasets()
    model = Classifier()
    trainer = AccelerateTrainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.003),
        "cosine",
        DataLoader(training, args.batch_size, shuffle=True),
        args.epochs,
        args.work_dir,
        mixed_precision=args.mixed_precision,
        warmup_iters=20,
        use_ema=True,
        ema_decay=0.99,
        hooks=[
            EvalHook(DataLoader(held_out, 128), accuracy, save_metric="acc"),
            CheckpointerHook(),
            LoggerHook(),
        ],
        resume="auto" if args.resume else None,
    )
    trainer.train()


if __name__ == "__main__":
    main()
