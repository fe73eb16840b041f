"""Where the microseconds of a batch go in a run over a real DataLoader: each piece timed where it stands.

Alone (`benchmarks/step.py`) a piece runs from warm caches; between two steps of a model it takes two to three times as long. The
pieces are wrapped with a timer, whose own cost is measured and taken off. Wall time, medians over an epoch, no workers. The last
rows are the raw loop's own.

    python benchmarks/in_place.py [--batches 500] [--only numpy] [--output benchmarks/results/in_place.json]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import TinyMLP, write
from epoch import BATCH_SIZE, DATASETS, ours, raw
from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

import torch_frame.data.rng_guard as rng_guard
from torch_frame import LoggerHook, Trainer
from torch_frame.data.loading import Loading
from torch_frame.training.finite import FiniteCheck
from torch_frame.training.schedules import LRWarmupScheduler
from torch_frame.training.update import Update

PIECES: list[tuple[str, Any, str]] = [
    ("a batch is loaded, all in all", Loading, "__getitems__"),
    ("  generators kept and exchanged", rng_guard.LoadingRng, "__enter__"),
    ("  numpy and torch seeded once, all marked", rng_guard.LoadingRng, "seed_and_mark"),
    ("  the dataset and the collate function", Loading, "_load"),
    ("  has a generator moved?", rng_guard.LoadingRng, "moved"),
    ("  generators put back", rng_guard.LoadingRng, "__exit__"),
    ("gradients cleared by hand", Update, "begin"),
    ("gradients looked at once (finite?)", FiniteCheck, "__call__"),
    ("schedule and count of updates", LRWarmupScheduler, "step"),
    ("values recorded in rows", Trainer, "record"),
    ("LoggerHook.after_iter", LoggerHook, "after_iter"),
]
MODEL: list[tuple[str, Any, str]] = [
    ("forward", TinyMLP, "forward"),
    ("backward", torch.Tensor, "backward"),
    ("optimizer.step()", torch.optim.SGD, "step"),
]
RAW: list[tuple[str, Any, str]] = [
    ("raw: a batch is loaded, all in all", _SingleProcessDataLoaderIter, "__next__"),
    ("raw:   the dataset and the collate function", _MapDatasetFetcher, "fetch"),
    ("raw: optimizer.zero_grad()", torch.optim.Optimizer, "zero_grad"),
]


@contextlib.contextmanager
def timed(pieces: list[tuple[str, Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Inside, the seconds of each call are noted, by the piece's name."""
    seconds: dict[str, list[float]] = defaultdict(list)
    originals = [getattr(owner, name) for _, owner, name in pieces]
    for (label, owner, name), function in zip(pieces, originals, strict=True):
        setattr(owner, name, _wrapped(function, seconds[label]))
    try:
        yield seconds
    finally:
        for (_, owner, name), function in zip(pieces, originals, strict=True):
            setattr(owner, name, function)


def _wrapped(function: Any, seconds: list[float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    return call


def timer_cost() -> float:
    seconds: list[float] = []
    nothing = _wrapped(lambda: None, seconds)
    for _ in range(10_000):
        nothing()
    return statistics.median(seconds)


def measure(name: str, batches: int, work_dir: str) -> dict[str, float]:
    """piece -> microseconds a call."""
    dataset = DATASETS[name](BATCH_SIZE * batches)
    rows: dict[str, float] = {}
    raw_model = [(f"raw: {label}", owner, name) for label, owner, name in MODEL]
    runs = [(PIECES + MODEL, lambda loader: ours(loader, work_dir, hooks=None)), (RAW + raw_model, raw)]
    for pieces, run_of in runs:
        run = run_of(DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True))
        run(), run()
        with timed(pieces) as seconds:
            run()
        cost = timer_cost()
        rows |= {label: (statistics.median(seconds[label]) - cost) * 1e6 for label, *_ in pieces if seconds[label]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--only", choices=list(DATASETS), nargs="*", default=["numpy", "flips"])
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work_dir:
            rows = measure(name, options.batches, work_dir)
        print(f"\n{name}")
        for label, value in rows.items():
            print(f"{label:<60} {value:7.2f} us")
        figures[name] = {label.strip(): round(value, 2) for label, value in rows.items()}
    write(options.output, figures, batches=options.batches)


if __name__ == "__main__":
    main()
