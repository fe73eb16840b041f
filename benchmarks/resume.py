"""How long a run waits for its first batch when it resumes far inside an epoch: at batch 100,000 of 64, of 10 million samples.

Ours reaches the place directly. A StatefulDataLoader and a DataLoader whose first batches are skipped are measured at smaller
positions, and extrapolated by a straight line through two of them; such figures are marked.

    python benchmarks/resume.py [--rounds 5] [--output benchmarks/results/resume.json]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from torch_frame import InfiniteDataLoader
from torch_frame.data.source import source_of

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdata.stateful_dataloader import StatefulDataLoader
except ImportError:
    StatefulDataLoader = None

SIZE, BATCH_SIZE, BATCHES = 10_000_000, 64, 100_000
MEASURED = (1000, 20_000)
"""Batches at which the others are measured."""


class Numbers(Dataset[int]):
    """Costs nothing to load: what is timed is the way to the place alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def ours(make: Callable[..., Any], batches: int, **settings: Any) -> float:
    """Milliseconds until the first batch is there."""
    loader = make(Numbers(SIZE), batch_size=BATCH_SIZE, **settings)
    started = time.perf_counter()
    source = source_of(loader, seed=0)
    next(source.epoch(0, batches * BATCH_SIZE))
    waited = time.perf_counter() - started
    source.close()
    return waited * 1e3


def skipped(batches: int) -> float:
    loader = DataLoader(Numbers(SIZE), batch_size=BATCH_SIZE, shuffle=True)
    started = time.perf_counter()
    next(itertools.islice(iter(loader), batches, None))
    return (time.perf_counter() - started) * 1e3


def stateful(batches: int) -> float:
    loader = StatefulDataLoader(Numbers(SIZE), batch_size=BATCH_SIZE, shuffle=True)
    running = iter(loader)
    for _ in range(batches):
        next(running)
    state = loader.state_dict()
    del running
    resumed = StatefulDataLoader(Numbers(SIZE), batch_size=BATCH_SIZE, shuffle=True)
    started = time.perf_counter()
    resumed.load_state_dict(state)
    next(iter(resumed))
    return (time.perf_counter() - started) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"ms_median": round(statistics.median(values), 3), "ms_p95": round(p95, 3)}


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    replaced = WeightedRandomSampler(torch.ones(SIZE // 10), SIZE // 10)
    direct: dict[str, Callable[[], float]] = {
        "ours, first batch of the epoch": lambda: ours(DataLoader, 0, shuffle=True),
        "ours, DataLoader": lambda: ours(DataLoader, BATCHES, shuffle=True),
        "ours, InfiniteDataLoader": lambda: ours(InfiniteDataLoader, BATCHES, shuffle=True),
        "ours, WeightedRandomSampler, batch 15,000": lambda: ours(DataLoader, 15_000, sampler=replaced),
    }
    others: dict[str, Callable[[int], float]] = {"DataLoader, batches skipped": skipped}
    if StatefulDataLoader is not None:
        others["StatefulDataLoader"] = stateful
    times: dict[str, list[float]] = {name: [] for name in direct}
    at: dict[str, dict[int, list[float]]] = {name: {batches: [] for batches in MEASURED} for name in others}
    for round_ in range(rounds):
        for name, run in direct.items():
            times[name].append(run())
        if round_ < 2:
            for name, run_to in others.items():
                for batches in MEASURED:
                    at[name][batches].append(run_to(batches))
    table: dict[str, dict[str, Any]] = {name: spread(values) for name, values in times.items()}
    for name, by_batches in at.items():
        medians = {batches: statistics.median(values) for batches, values in by_batches.items()}
        for batches, values in by_batches.items():
            table[f"{name}, batch {batches:,}"] = spread(values)
        low, high = MEASURED
        slope = (medians[high] - medians[low]) / (high - low)
        far = medians[high] + max(slope, 0.0) * (BATCHES - high)  # a slope below 0 is noise: it does not grow
        table[f"{name}, batch {BATCHES:,}"] = {"ms_median": round(far, 1), "extrapolated": True}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    torch.set_num_threads(1)
    figures = measure(options.rounds)
    print(f"Time to the first batch of {BATCH_SIZE}, epoch of {SIZE:,} samples; ours at batch {BATCHES:,}: ms")
    for name, row in figures.items():
        note = "extrapolated" if row.get("extrapolated") else f"95th percentile {row['ms_p95']:.2f}"
        print(f"  {name:<45} {row['ms_median']:12.2f}   ({note})")
    if options.output:
        setting = {
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": options.rounds,
        }
        options.output.write_text(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
