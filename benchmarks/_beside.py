"""An epoch by Trainer beside a hand-written loop of the same work, on a device, in the time and the memory that there is."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _networks import Made
from _report import print_table, summary

from torch_frame import CheckpointerHook, LoggerHook, ThroughputHook, Trainer
from torch_frame.bench.work import is_out_of_memory

Timed = Callable[[], float]


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def raw(make: Made, batches: list[Any], device: torch.device, *, move: bool = False) -> Timed:
    """Seconds of an epoch of the loop that people write; the device is done when the time is taken."""
    model, optimizer = make(device)
    model.train()

    def epoch() -> float:
        wait(device)
        started = time.perf_counter()
        for batch in batches:
            if move:
                batch = tuple(part.to(device, non_blocking=True) for part in batch)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device)
        return time.perf_counter() - started

    return epoch


def ours(make: Made, batches: list[Any], device: torch.device, hooks: list[Any], folder: str, **settings: Any) -> Timed:
    """The same epoch by Trainer: what is done once a run or between epochs (files, saves) is not in the time."""
    model, optimizer = make(device)
    seconds: list[float] = []

    class Timing(Trainer):
        def train_one_epoch(self) -> None:
            wait(device)
            started = time.perf_counter()
            super().train_one_epoch()
            wait(device)
            seconds.append(time.perf_counter() - started)

    trainer = Timing(model, optimizer, None, batches, 0, folder, precision="bf16", hooks=hooks, **settings)

    def epoch() -> float:
        trainer.max_epochs += 1
        trainer.train(console_log_level=3)
        return seconds[-1]

    return epoch


class NoFiles(CheckpointerHook):
    """Between the epochs nothing is saved: saves have a part of their own, and files take long."""

    def save_model(self) -> None:
        """Asks for no file."""


def default_hooks() -> list[Any]:
    return [NoFiles(), LoggerHook(progress_bar=False)]


def in_turn(rows: dict[str, Timed], rounds: int, num_steps: int, ends_at: float) -> dict[str, list[float]]:
    """row -> microseconds a step, one for each round; another row begins each round.

    Args:
        rounds: at most; after the second one they end when the next would be over too late.
        ends_at: that time, as `time.perf_counter` has it.
    """
    for epoch in rows.values():
        epoch()
    begun = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for number in range(rounds):
        a_round = (time.perf_counter() - begun) / max(number, 1)
        if number >= 2 and time.perf_counter() + a_round > ends_at:
            print(f"  {number} rounds in the time there was, instead of {rounds}")
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(rows[name]() / num_steps * 1e6)
    return times


def until_it_fits(measure: Callable[[int], dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """What `measure` finds with the batch size, halved as often as the device has no memory for it; how large it was, too."""
    wanted = batch_size
    while True:
        try:
            found = measure(batch_size)
            break
        except RuntimeError as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        batch_size //= 2
        print(f"  out of memory; again with a batch of {batch_size}")
        gc.collect()  # models and trainers hold each other
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    return {"batch_size": batch_size, **({"wanted_batch_size": wanted} if batch_size < wanted else {}), **found}


def num_steps_in_time(make: Made, batch: Any, most: int, options: argparse.Namespace, ends_at: float) -> int:
    """Steps of an epoch, so that all rounds of all five rows, and the one that warms up, are done in time; 3 at least."""
    epoch = raw(make, [batch] * 2, options.device)
    epoch()
    seconds = epoch() / 2
    return max(min(most, int((ends_at - time.perf_counter()) / (5 * (options.rounds + 1) * seconds))), min(most, 3))


def beside_raw(make: Made, batches: list[Any], options: argparse.Namespace, ends_at: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "raw": raw(make, batches, options.device),
            "torch-frame, no hooks": ours(make, batches, options.device, [], f"{folder}/none"),
            "raw again": raw(make, batches, options.device),
            "torch-frame, default hooks": ours(make, batches, options.device, default_hooks(), f"{folder}/default"),
            "... and ThroughputHook": ours(
                make, batches, options.device, [*default_hooks(), ThroughputHook()], f"{folder}/split"
            ),
        }
        times = in_turn(rows, options.rounds, len(batches), ends_at)
        found = summary(times, "us_per_step")
    print_table(found, "us_per_step", width=30)
    return {
        "batch": [list(part.shape) for part in batches[0]],
        "steps": len(batches),
        "rounds": len(times["raw"]),
        **found,
    }
