"""Trains a small ResNet on Fashion-MNIST to more than 92 % on two CPU cores, in a few minutes.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py
    python examples/fashion_mnist.py --resume        # goes on where an interrupted run of the same settings stood

It trains on the 60,000 training images and scores the 10,000 test images after each epoch. The final score is the one
to quote; the best one was chosen by looking at the test images.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from torch_frame import EvalHook, LoggerHook, Trainer, set_random_seed

Batch = tuple[Tensor, Tensor]
"""images: (N, 1, 28, 28) uint8; labels: (N,) int64."""


def read_split(folder: Path, name: str, limit: int | None = None) -> Batch:
    """Read the images and labels of "train" or "t10k"; IDX files: a big-endian header of 16 or 8 bytes, then uint8."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:limit].copy()
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:limit].astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


def augment(batch: Batch) -> Batch:
    """Mirror half of the images, and shift the batch by up to two pixels each way."""
    images, labels = batch
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    top, left = torch.randint(0, 5, (2,)).tolist()
    images = torch.where(mirrored, images.flip(-1), images)
    return F.pad(images, (2, 2, 2, 2))[..., top : top + 28, left : left + 28], labels


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first one halves the resolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*(Block(*pair) for pair in zip((widths[0], *widths), widths, strict=False)))
        self.classify = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - 0.286) / 0.353  # mean and deviation of the training images
        return self.classify(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def train_step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    images, labels = batch
    scores = model(images)
    return F.cross_entropy(scores, labels), {"train_acc": (scores.argmax(1) == labels).float().mean()}


def evaluate(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    images, labels = batch
    return {"acc": (model(images).argmax(1) == labels).float()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="DIR")
    parser.add_argument("--work-dir", default="work_dir/fashion_mnist", metavar="DIR")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--wd", type=float, default=0.01)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--ls", type=float, default=0)
    parser.add_argument("--ema", type=float, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--resume", action="store_true", help="continue from the work dir's latest.pth")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.data.is_dir():
        sys.exit(
            f"There is no folder {args.data} with Fashion-MNIST: apt-get install dataset-fashion-mnist, or name it with --data."
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_random_seed(args.seed)

    train_set = TensorDataset(*read_split(args.data, "train", args.limit))
    test_images, test_labels = read_split(args.data, "t10k")
    # A batch is one indexing of the whole tensor, which is much faster than 128 images collated.
    batches = BatchSampler(RandomSampler(train_set), args.batch_size, drop_last=True)
    train_loader = DataLoader(train_set, batch_size=None, sampler=batches, collate_fn=augment)

    model = ResNet(tuple(map(int, args.widths.split(",")))).to(
        memory_format=torch.channels_last
    )  # twice as fast on the CPU
    print(sum(p.numel() for p in model.parameters()))
    if args.opt == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.wd)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, weight_decay=args.wd, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * len(train_loader), pct_start=0.2
    )
    eval_hook = EvalHook(
        list(zip(test_images.split(500), test_labels.split(500), strict=True)),
        evaluate,
        save_metric="acc",
        max_to_keep=2,
    )

    def ts(model, batch):
        images, labels = batch
        scores = model(images)
        return F.cross_entropy(scores, labels, label_smoothing=args.ls), {
            "train_acc": (scores.argmax(1) == labels).float().mean()
        }

    trainer = Trainer(
        model,
        optimizer,
        scheduler,
        train_loader,
        max_epochs=args.epochs,
        work_dir=args.work_dir,
        hooks=[eval_hook, LoggerHook()],
        step_fn=ts,
        lr_scheduler_interval="iter",
        precision=args.precision,
        use_ema=args.ema > 0,
        ema_decay=args.ema or 0.99,
    )
    if args.resume:
        trainer.load_checkpoint("latest.pth")

    started_s = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started_s) / 60
    print(
        f"Test accuracy: {trainer.metric_storage['eval_acc'].latest:.2%} at the end, {eval_hook.cur_best:.2%} at best; "
        f"{minutes:.1f} minutes.\nFiles: {trainer.work_dir}"
    )


if __name__ == "__main__":
    main()
