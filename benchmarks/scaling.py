"""Several processes on one machine: samples a second beside a raw DistributedDataParallel loop, and an evaluation's gather.

Both loops train the same small CNN on the same images, in turn, in the same processes; `raw again` is the error bar. A process
has one thread, so two processes are compared with one on two cores. CPU time includes gloo's threads; it is steadier than the
clock if others use the machine. Then the ranks' states of a mean average precision over 5,000 images are put together.

    python benchmarks/scaling.py [--steps 60] [--rounds 5] [--output benchmarks/results/scaling.json]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _report import write
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torch_frame import Trainer
from torch_frame.distributed.ddp import DDP
from torch_frame.hooks.evaluate_total import merge_over_ranks
from torch_frame.metrics import MeanAveragePrecision

BATCH = 32


class SmallCNN(nn.Module):
    """(N, 3, 32, 32) -> the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 8 * 8, 10),
        )  # fmt: skip

    def forward(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)


def make(steps: int, world_size: int) -> tuple[nn.Module, Any, TensorDataset]:
    torch.manual_seed(0)
    size = steps * BATCH * world_size
    return SmallCNN(), None, TensorDataset(torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,)))


class Clock:
    """Seconds by the clock, and of this process's CPU time, since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]


def raw(steps: int, world_size: int) -> Any:
    """The loop that people write."""
    model, _, data = make(steps, world_size)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    sampler = DistributedSampler(data) if world_size > 1 else None
    loader = DataLoader(data, BATCH, sampler=sampler, shuffle=None if sampler else True)
    optimizer = SGD(model.parameters(), lr=0.01)

    def run() -> tuple[float, float]:
        clock = Clock()
        for batch in loader:
            optimizer.zero_grad()
            wrapped(batch).backward()
            optimizer.step()
        return clock.read()

    return run


def ours(steps: int, world_size: int, work_dir: str, hooks: Any) -> Any:
    """Times `train_one_epoch`."""
    model, _, data = make(steps, world_size)
    times: list[tuple[float, float]] = []

    class Timing(Trainer):
        def train_one_epoch(self) -> None:
            clock = Clock()
            super().train_one_epoch()
            times.append(clock.read())

    loader = DataLoader(data, BATCH, shuffle=True)
    trainer = Timing(model, SGD(model.parameters(), lr=0.01), None, loader, 0, work_dir, hooks=hooks)

    def run() -> tuple[float, float]:
        trainer.max_epochs += 1
        trainer.train(console_log_level=5)
        return times[-1]

    return run


def gather_ms(num_images: int) -> float:
    """Milliseconds to put the two ranks' states together on rank 0, after a meeting."""
    strategy = DDP()
    metric = MeanAveragePrecision([f"class {i}" for i in range(80)])
    generator = torch.Generator().manual_seed(strategy.rank)
    for image in range(strategy.rank, num_images, strategy.world_size):
        corners = torch.rand(107, 2, generator=generator) * 400
        boxes = torch.cat([corners, corners + 50], 1)
        labels = torch.randint(0, 80, (107,), generator=generator)
        pred = {"boxes": boxes[:100], "scores": torch.rand(100, generator=generator), "labels": labels[:100]}
        metric.update([image], [pred], [{"boxes": boxes[100:], "labels": labels[100:]}])
    strategy.agree(False)
    started = time.perf_counter()
    merge_over_ranks([metric], strategy)
    strategy.agree(False)
    return 1e3 * (time.perf_counter() - started)


def measure(rank: int, world_size: int, port: int, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        url = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "raw": raw(args.steps, world_size),
            "torch-frame": ours(args.steps, world_size, os.path.join(folder, "none"), []),
            "default hooks": ours(args.steps, world_size, os.path.join(folder, "defaults"), None),
            "raw again": raw(args.steps, world_size),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for index in range(args.rounds + 1):
            for name, run in rows.items():
                if world_size > 1:
                    dist.barrier()
                measured = run()
                if index:  # the first round warms up
                    times[name].append(measured)
        gathers = [gather_ms(args.images) for _ in range(3)] if world_size > 1 else []
    if rank == 0:
        results.put((times, gathers))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_processes(world_size: int, args: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(measure, (world_size, port, args, results), nprocs=world_size, join=False)
    measured = results.get()
    assert context is not None
    while not context.join():
        pass
    return measured


def compared(times: Any, base: Any, num_samples: int) -> tuple[float, dict[str, Any]]:
    """Samples a second, and the median and quartiles of the ratios to the raw loop of the same round."""
    row: dict[str, Any] = {}
    for place, name in enumerate(("time", "cpu")):
        ratios = [one[place] / other[place] for one, other in zip(times, base, strict=True)]
        low, middle, high = (round(value, 3) for value in statistics.quantiles(ratios, n=4))
        row |= {f"{name}_x_raw": middle, f"{name}_quartiles": [low, high]}
    return num_samples / statistics.median(seconds for seconds, _ in times), row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, Any] = {}
    for world_size in (1, 2):
        times, gathers = on_processes(world_size, args)
        for name in times:
            rate, row = compared(times[name], times["raw"], args.steps * BATCH * world_size)
            figures[f"{name}, {world_size}"] = {"samples_per_s": round(rate), **row}
            print(
                f"  {world_size} process{'es' * (world_size > 1):<2}  {name:<13} {rate:9,.0f} samples/s   x raw: "
                f"{row['time_x_raw']:.3f} {row['time_quartiles']}   CPU {row['cpu_x_raw']:.3f} {row['cpu_quartiles']}"
            )
        if gathers:
            figures["gather_ms"] = round(statistics.median(gathers), 1)
            print(
                f"  putting together the states of {args.images} images on 2 ranks: {statistics.median(gathers):.0f} ms"
            )
    one, two = figures["torch-frame, 1"]["samples_per_s"], figures["torch-frame, 2"]["samples_per_s"]
    figures["efficiency"] = round(two / (2 * one), 3)
    print(f"  efficiency of torch-frame at 2 processes: {figures['efficiency']:.0%}")
    write(args.output, figures, steps=args.steps, rounds=args.rounds, batch_size=BATCH, images=args.images)


if __name__ == "__main__":
    main()
