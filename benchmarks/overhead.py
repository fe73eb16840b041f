"""What a training step costs beside the hand-written loop: process CPU time, interleaved in one run, on a tiny MLP.

Each row is timed in every round, in turn, over the same batches; `raw again` against `raw` is the error bar. The raw loop is

    for batch in batches:
        loss = model(batch); optimizer.zero_grad(); loss.backward(); optimizer.step()

    python benchmarks/overhead.py [--steps 1000] [--rounds 15] [--output benchmarks/results/overhead.json]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _report import TinyMLP, print_table, summary, write
from torch import nn

from torch_frame import CheckpointerHook, LoggerHook, Trainer

Timed = Callable[[], float]


def make(optimizer_name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyMLP()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer_name]
    return model, kind(model.parameters(), lr=1e-3)


def raw(batches: list[Any], optimizer_name: str) -> Timed:
    model, optimizer = make(optimizer_name)

    def run() -> float:
        started = time.process_time()
        for batch in batches:
            loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.process_time() - started

    return run


def naive(batches: list[Any], optimizer_name: str) -> Timed:
    """The loop that people write: the bar shows each step's loss."""
    from tqdm import tqdm

    model, optimizer = make(optimizer_name)

    def run() -> float:
        started = time.process_time()
        with tqdm(batches) as bar:
            for batch in bar:
                loss = model(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.set_postfix(loss=loss.item())
        return time.process_time() - started

    return run


def ours(batches: list[Any], optimizer_name: str, hooks: Callable[[], list[Any]], work_dir: str) -> Timed:
    """Times `train_one_epoch`: what is done once a run (folders, writers) and once an epoch (files) is left out."""
    model, optimizer = make(optimizer_name)
    seconds: list[float] = []

    class Timing(Trainer):
        def train_one_epoch(self) -> None:
            started = time.process_time()
            super().train_one_epoch()
            seconds.append(time.process_time() - started)

    trainer = Timing(model, optimizer, None, batches, 0, work_dir, hooks=hooks())

    def run() -> float:
        trainer.max_epochs += 1
        trainer.train(console_log_level=3)
        return seconds[-1]

    return run


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """stderr is a terminal inside, so that bars are drawn as for a person."""
    leader, follower = os.openpty()
    reader = subprocess.Popen(["cat"], stdin=leader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = sys.stderr
    sys.stderr = os.fdopen(follower, "w")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        os.close(leader)
        reader.wait(timeout=10)


def measure(optimizer_name: str, steps: int, rounds: int, work_dir: str) -> dict[str, list[float]]:
    """name -> CPU microseconds a step, one for each round."""
    batches = [(torch.randn(16, 32), torch.randint(0, 10, (16,))) for _ in range(steps)]
    rows: dict[str, Timed] = {
        "raw": raw(batches, optimizer_name),
        "torch-frame, no hooks": ours(batches, optimizer_name, list, f"{work_dir}/no_hooks"),
        "raw again": raw(batches, optimizer_name),
        "torch-frame, default hooks": ours(
            batches, optimizer_name, lambda: [CheckpointerHook(), LoggerHook()], f"{work_dir}/default"
        ),
        "naive loop (item, set_postfix)": naive(batches, optimizer_name),
    }
    for run in rows.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            times[name].append(run() / steps * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as work_dir:
        for optimizer_name in ("sgd", "adamw"):
            with terminal():
                times = measure(optimizer_name, options.steps, options.rounds, f"{work_dir}/{optimizer_name}")
            figures[optimizer_name] = summary(times, "us_per_step")
            print(
                f"\n{optimizer_name}: CPU time a step, {options.rounds} rounds of {options.steps} steps, ratio to raw"
            )
            print_table(figures[optimizer_name], "us_per_step", width=32)
    write(options.output, figures, steps=options.steps, rounds=options.rounds)


if __name__ == "__main__":
    main()
