"""Trains a small ResNet on Fashion-MNIST to more than 92 % on two CPU cores, in a few minutes.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py
    python examples/fashion_mnist.py --resume     # goes on where an interrupted run with the same options stood
    torchrun --nproc-per-node 2 examples/fashion_mnist.py         # two processes, which share each batch

It trains on the 60,000 training images and scores the 10,000 test images after each epoch. Quote the score at the end:
the best one, which `best.pth` follows, was chosen by looking at the test images.
"""

import argparse
import gzip
import math
import os
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


def load_split(folder: Path, name: str) -> Batch:
    """Read the "train" or the "t10k" split: IDX files are a header of 16 or 8 bytes, then uint8 values."""
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return (
        torch.tensor(np.frombuffer(images, np.uint8, offset=16)).view(-1, 1, 28, 28),
        torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long(),
    )


def augment(batch: Batch) -> Batch:
    """Mirror about half of the images, and shift all of them by up to 2 pixels each way."""
    images, labels = batch
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    top, left = torch.randint(5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2))[..., top : top + 28, left : left + 28], labels


def conv_bn(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Block(nn.Module):
    """Halves the resolution: two 3x3 convolutions, and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(in_channels, channels, 3, stride=2)
        self.conv2 = conv_bn(channels, channels, 3)
        self.shortcut = conv_bn(in_channels, channels, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """(N, 1, 28, 28) uint8 -> (N, 10) logits; 78,042 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3)
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32), Block(32, 64))  # 28 -> 14 -> 7 -> 4 pixels
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = (images / 255 - 0.286) / 0.353  # mean and standard deviation of the training images
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


def train_step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    images, labels = batch
    logits = model(images)
    return F.cross_entropy(logits, labels), {"acc": (logits.argmax(1) == labels).float().mean()}


def evaluate(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    images, labels = batch
    return {"acc": (model(images).argmax(1) == labels).float()}  # one score for each image


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    set_random_seed(args.seed)

    try:
        images, labels = load_split(args.data, "train")
        test_images, test_labels = load_split(args.data, "t10k")
    except FileNotFoundError as error:
        sys.exit(
            f"There is no {error.filename}: install Fashion-MNIST with `apt-get install dataset-fashion-mnist`, "
            "or name its folder with --data."
        )

    # Under torchrun each process is dealt every so many-th batch: smaller ones, so that an update is made of as many images.
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = args.batch_size // num_processes
    # With batch_size=None the sampler hands over whole lists of indices: a batch is one look into the tensors.
    train_set = TensorDataset(images[: args.limit], labels[: args.limit])
    batches = BatchSampler(RandomSampler(train_set), batch_size, drop_last=False)
    train_loader = DataLoader(train_set, batch_size=None, sampler=batches, collate_fn=augment)
    test_batches = list(zip(test_images.split(500), test_labels.split(500), strict=True))

    model = ResNet().to(memory_format=torch.channels_last)  # on a CPU 2 to 3 times as fast as the default
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    num_updates = args.epochs * math.ceil(len(train_loader) / num_processes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=num_updates)

    eval_hook = EvalHook(test_batches, evaluate, save_metric="acc", max_to_keep=2)  # saves checkpoints, too
    trainer = Trainer(
        model,
        optimizer,
        schedule,
        train_loader,
        max_epochs=args.epochs,
        work_dir=args.work_dir,
        hooks=[eval_hook, LoggerHook()],
        step_fn=train_step,
        lr_scheduler_interval="iter",
    )
    if args.resume:
        trainer.load_checkpoint("latest.pth")

    started_s = time.perf_counter()
    trainer.train()
    if not trainer.check_main():
        return
    minutes = (time.perf_counter() - started_s) / 60
    final = trainer.metric_storage["eval_acc"].latest
    print(f"Test accuracy: {final:.2%} at the end, {eval_hook.cur_best:.2%} at best. It took {minutes:.1f} minutes.")
    print(f"Files: {trainer.work_dir}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small ResNet on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, default="/usr/share/datasets/fashion-mnist", help="folder of .gz files")
    parser.add_argument("--work-dir", default="work_dir/fashion_mnist", help="where the run's files go")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128, help="images in an update, of all processes together")
    parser.add_argument("--limit", type=int, help="train on the first LIMIT images alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of a process; PyTorch decides if it is not given")
    parser.add_argument("--resume", action="store_true", help="go on from latest.pth of --work-dir")
    return parser.parse_args()


if __name__ == "__main__":
    main()
