"""What waiting for data costs: at the border of an epoch and inside it, and what seeding each sample adds.

Waits are wall time until a batch is there, while each step takes 5 ms as a model would; loaders take turns, round by round.
Seeding is CPU time of loading in the main process (num_workers=0) beside a DataLoader over the same dataset and order.

    python benchmarks/loader.py [--rounds 5] [--epochs 4] [--output benchmarks/results/loader.json]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_frame import InfiniteDataLoader
from torch_frame.data.source import source_of

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdata.stateful_dataloader import StatefulDataLoader
except ImportError:
    StatefulDataLoader = None

STEP_S = 0.005
BATCH_SIZE = 8
BATCHES = 12


class Images(Dataset[Tensor]):
    """A small image, and little work on it."""

    def __init__(self, size: int, side: int) -> None:
        self.size = size
        self.image = torch.zeros(3, side, side)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return self.image + index


def waits(loader: Iterable[Any], epochs: int) -> tuple[list[float], list[float]]:
    """Milliseconds until a batch is there: (the first one of an epoch, all others); the first epoch starts workers."""
    border, inside = [], []
    for epoch in range(epochs + 1):
        started = time.perf_counter()
        for i, _ in enumerate(loader):
            waited = (time.perf_counter() - started) * 1e3
            if epoch:
                (inside if i else border).append(waited)
            time.sleep(STEP_S)
            started = time.perf_counter()
    return border, inside


def loaders() -> dict[str, Callable[[], Any]]:
    settings: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": 2}
    rows: dict[str, Callable[[], Any]] = {
        "InfiniteDataLoader (ours)": lambda: InfiniteDataLoader(dataset, seed=0, **settings),
        "InfiniteDataLoader (ours), spawn": lambda: InfiniteDataLoader(
            dataset, seed=0, **settings, multiprocessing_context="spawn"
        ),
        "DataLoader, persistent_workers": lambda: DataLoader(dataset, **settings, persistent_workers=True),
        "DataLoader": lambda: DataLoader(dataset, **settings),
        "DataLoader, spawn": lambda: DataLoader(dataset, **settings, multiprocessing_context="spawn"),
    }
    if StatefulDataLoader is not None:
        rows["StatefulDataLoader, persistent_workers"] = lambda: StatefulDataLoader(
            dataset, **settings, persistent_workers=True
        )
    dataset = Images(BATCH_SIZE * BATCHES, side=32)
    return rows


def measure_waits(rounds: int, epochs: int) -> dict[str, dict[str, float]]:
    border: dict[str, list[float]] = {name: [] for name in loaders()}
    inside: dict[str, list[float]] = {name: [] for name in loaders()}
    for round_ in range(rounds):
        for name, make in loaders().items():
            slow = name == "DataLoader, spawn"  # seconds a border
            if slow and round_ > 1:
                continue
            with contextlib.ExitStack() as stack:
                loader = make()
                if isinstance(loader, InfiniteDataLoader):
                    stack.enter_context(loader)
                at_border, in_epoch = waits(loader, 1 if slow else epochs)
            border[name] += at_border
            inside[name] += in_epoch
    table = {}
    for name in border:
        table[name] = {
            "borders": len(border[name]),
            "border_ms_median": round(statistics.median(border[name]), 3),
            "border_ms_p95": round(percentile_95(border[name]), 3),
            "inside_ms_median": round(statistics.median(inside[name]), 3),
            "inside_ms_p95": round(percentile_95(inside[name]), 3),
            "difference_of_medians_ms": round(statistics.median(border[name]) - statistics.median(inside[name]), 3),
        }
    return table


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def measure_seeding(rounds: int, batch_size: int, batches: int) -> dict[str, dict[str, float]]:
    """CPU microseconds a sample of an epoch in the main process."""
    dataset = Images(batch_size * batches, side=2)
    torch_order = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    ours = source_of(DataLoader(dataset, batch_size=batch_size, shuffle=True), seed=0)
    rows: dict[str, Callable[[], Iterable[Any]]] = {
        "DataLoader": lambda: torch_order,
        "ours, seeded": lambda: ours.epoch(0),
        "DataLoader again": lambda: torch_order,
    }
    if StatefulDataLoader is not None:
        stateful = StatefulDataLoader(dataset, batch_size=batch_size, shuffle=True)
        rows["StatefulDataLoader"] = lambda: stateful
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(rounds + 1):
        for name, make in rows.items():
            started = time.process_time()
            for _ in make():
                pass
            if round_:
                times[name].append((time.process_time() - started) / len(dataset) * 1e6)
    added = {
        name: [x - base for x, base in zip(values, times["DataLoader"], strict=True)] for name, values in times.items()
    }
    return {
        name: {
            "us_per_sample": round(statistics.median(values), 2),
            "added_us_median": round(statistics.median(added[name]), 2),
            "added_us_p95": round(percentile_95(added[name]), 2),
        }
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="borders of each loader in a round")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"waits": measure_waits(options.rounds, options.epochs)}
    print(f"Wait for a batch, 2 workers, {STEP_S * 1e3:.0f} ms a step: median (95th percentile), ms")
    for name, row in figures["waits"].items():
        border = f"{row['border_ms_median']:9.2f} ({row['border_ms_p95']:.2f})"
        inside = f"{row['inside_ms_median']:7.2f} ({row['inside_ms_p95']:.2f})"
        print(f"  {name:<40} border {border:<20} inside {inside:<16} n = {row['borders']}")
    for batch_size, batches in ((8, 1000), (8, 150), (64, 150)):  # short epochs: the border's cost is among it
        table = measure_seeding(2 * options.rounds, batch_size, batches)
        figures[f"seeding_batch_{batch_size}_of_{batches}"] = table
        print(
            f"Loading in the main process, {batches} batches of {batch_size}: CPU us a sample, and what it adds to DataLoader"
        )
        for name, row in table.items():
            print(
                f"  {name:<40} {row['us_per_sample']:8.2f}   {row['added_us_median']:+8.2f} ({row['added_us_p95']:+.2f})"
            )
    if options.output:
        setting = {
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": options.rounds,
            "epochs": options.epochs,
            "step_ms": STEP_S * 1e3,
        }
        options.output.write_text(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
