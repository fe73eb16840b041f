"""What an epoch over a real DataLoader costs beside the loop that people write: process CPU time, without workers.

Rows take turns in every round; `raw again` against `raw` is the error bar. The raw loop is

    for batch in DataLoader(dataset, batch_size=64, shuffle=True):
        loss = model(batch); optimizer.zero_grad(); loss.backward(); optimizer.step()

The epoch is timed with what belongs to it: beginning the iteration, hooks, and with default hooks one save and one line.
Ignite's row needs `make bench-peers`. With `--workers` it is wall time: the workers' time does not count as this process's.

    python benchmarks/epoch.py [--batches 1000] [--rounds 7] [--only tensors] [--workers 0] [--output epoch.json]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import TinyMLP, print_table, summary, write
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torch_frame import Trainer

BATCH_SIZE = 64
Timed = Callable[[], float]


class Numpy(Dataset[Any]):
    """Pure python and numpy, nothing random: a row of 32 numbers."""

    def __init__(self, size: int) -> None:
        self.rows = np.random.default_rng(0).standard_normal((1024, 32), dtype=np.float32)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % 1024], index % 10


class Flips(Numpy):
    """The same, turned around by one of numpy's random numbers."""

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index % 1024]
        if np.random.rand() < 0.5:
            row = row[::-1].copy()
        return row, index % 10


class Pictures(Dataset[Any]):
    """32x32 pictures with PIL: flip, crop, rotate, jitter by python's random numbers."""

    def __init__(self, size: int) -> None:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (64, 40, 40, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        from PIL import Image, ImageEnhance

        image = self.images[index % 64]
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = random.randint(0, 8), random.randint(0, 8)
        image = image.crop((left, top, left + 32, top + 32)).rotate(random.uniform(-15, 15))
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.6, 1.4))
        pixels = np.asarray(image, dtype=np.float32).reshape(-1)[:32] / 255
        return pixels, index % 10


DATASETS: dict[str, Callable[[int], Dataset[Any]]] = {
    "tensors": lambda size: TensorDataset(torch.randn(size, 32), torch.randint(0, 10, (size,))),
    "numpy": Numpy,
    "flips": Flips,
    "pictures": Pictures,
}


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyMLP()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def now(loader: DataLoader[Any]) -> float:
    return time.perf_counter() if loader.num_workers else time.process_time()


def raw(loader: DataLoader[Any]) -> Timed:
    model, optimizer = make()

    def run() -> float:
        started = now(loader)
        for batch in loader:
            loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return now(loader) - started

    return run


def ours(loader: DataLoader[Any], work_dir: str, *, hooks: Any, **settings: Any) -> Timed:
    """Times an epoch with its hooks and its save; what is done once a run (folder, writers) is left out."""
    model, optimizer = make()
    started: list[float] = []
    seconds: list[float] = []

    class Timing(Trainer):
        def train_one_epoch(self) -> None:
            started.append(now(loader))
            super().train_one_epoch()

        def call(self, stage: str) -> None:
            super().call(stage)
            if stage == "after_train":
                self.wait_for_saves()
                seconds.append(now(loader) - started[-1])

    trainer = Timing(model, optimizer, None, loader, 0, work_dir, hooks=hooks, create_new_dir=None, **settings)

    def run() -> float:
        trainer.max_epochs += 1
        trainer.train(console_log_level=3)
        return seconds[-1]

    return run


def ignite(loader: DataLoader[Any]) -> Timed | None:
    try:
        from ignite.engine import Engine
    except ImportError:
        return None
    model, optimizer = make()

    def step(engine: Any, batch: Any) -> float:
        model.train()
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    engine = Engine(step)

    def run() -> float:
        started = now(loader)
        engine.run(loader, max_epochs=1)
        return now(loader) - started

    return run


def rows_of(name: str, batches: int, workers: int, work_dir: str) -> dict[str, Timed]:
    dataset = DATASETS[name](BATCH_SIZE * batches)

    def loader() -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers)

    rows: dict[str, Timed | None] = {
        "raw": raw(loader()),
        "torch-frame, no hooks": ours(loader(), f"{work_dir}/no_hooks", hooks=[]),
        "raw again": raw(loader()),
        "torch-frame, default hooks": ours(loader(), f"{work_dir}/default", hooks=None),
        "torch-frame, default hooks, take_over=False": ours(loader(), f"{work_dir}/left", hooks=None, take_over=False),
        "Ignite": ignite(loader()),
    }
    return {row: run for row, run in rows.items() if run is not None}


def measure(name: str, batches: int, rounds: int, workers: int, work_dir: str) -> dict[str, list[float]]:
    """row -> microseconds a batch, one for each round."""
    rows = rows_of(name, batches, workers, work_dir)
    for run in rows.values():
        run()
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row, run in rows.items():
            times[row].append(run() / batches * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(DATASETS), nargs="*", default=list(DATASETS))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work_dir:
            figures[name] = summary(
                measure(name, options.batches, options.rounds, options.workers, work_dir), "us_per_batch"
            )
        time_ = f"wall time with {options.workers} workers" if options.workers else "CPU time"
        print(f"\n{name}: {time_} a batch of 64, {options.rounds} epochs of {options.batches} batches, ratio to raw")
        print_table(figures[name], "us_per_batch", width=45)
    write(options.output, figures, batches=options.batches, rounds=options.rounds, workers=options.workers)


if __name__ == "__main__":
    main()
