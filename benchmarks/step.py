"""Where the microseconds of a step go: each piece of the loop on its own, beside what the raw loop does in its place.

The pieces are the trainer's own methods, called again and again on a run that stands in the middle of an epoch (CPU, a tiny MLP,
SGD, nothing accumulated or clipped). Their sum is what a step costs beyond the model, backward and the optimizer's arithmetic.
Process CPU time.

    python benchmarks/step.py [--output benchmarks/results/step.json]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import TinyMLP, write

from torch_frame import CheckpointerHook, LoggerHook, ThroughputHook, Trainer
from torch_frame.data.move import move_to_device
from torch_frame.tracking.step_times import StepTimes
from torch_frame.training.losses import read_losses

NUMBER, REPEAT = 5000, 9


def microseconds(call: Callable[[], object]) -> float:
    return statistics.median(timeit.repeat(call, timer=time.process_time, number=NUMBER, repeat=REPEAT)) / NUMBER * 1e6


class Middle(Exception):
    """The run stands in the middle of an epoch."""


def measure(work_dir: str) -> dict[str, float]:
    batch = (torch.randn(16, 32), torch.randint(0, 10, (16,)))
    model = TinyMLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows: dict[str, float] = {}

    class Stopped(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            values = super().train_one_iter(batch)
            if self.cur_iter == 60:
                rows.update(pieces(self, batch))
                raise Middle
            return values

    hooks = [CheckpointerHook(), LoggerHook(progress_bar=False)]
    trainer = Stopped(model, optimizer, None, [batch] * 100, 1, work_dir, hooks=hooks)
    try:
        trainer.train(5, 5)
    except Middle:
        pass
    return rows


def pieces(trainer: Trainer, batch: Any) -> dict[str, float]:
    model, optimizer, updater, progress = trainer.model, trainer.optimizer, trainer.updater, trainer.progress
    loss = model(batch)
    loss.backward()
    total, values = read_losses(loss.detach().requires_grad_())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    row = {**trainer._names.step_row(values), "lr": 0.001}

    def counted() -> None:
        progress.in_iter = True
        progress.end_iter(progress.position)

    def timed() -> None:
        trainer._feed.times.ask()
        trainer.stop_signals.begin_wait(may_interrupt=False)
        trainer._feed.times.receive()

    def contexts() -> None:
        with updater.micro_batch(is_last=True):
            pass

    def stages() -> None:
        for stage in ("before_iter", "after_iter"):
            for _ in trainer.stages[stage]:
                pass

    split = ThroughputHook()
    split.trainer = trainer
    split.before_train()
    calls = split.time_split.around([("ThroughputHook", split.after_iter), ("LoggerHook", lambda: None)])
    plain = StepTimes()

    def split_of_time() -> None:
        split.time_split.ask()
        split.time_split.receive()
        for call in calls:
            call()

    def no_split() -> None:
        plain.ask()
        plain.receive()

    logger_after_iter = next(hook.after_iter for hook in trainer.hooks if isinstance(hook, LoggerHook))
    return {
        "raw: optimizer.zero_grad()": microseconds(optimizer.zero_grad),
        "gradients cleared by hand, the window's context": microseconds(contexts),
        "raw: loss.item()": microseconds(loss.item),
        "loss checked before backward, and read for the record": 2 * microseconds(loss.item),
        "what the model returned is read (read_losses)": microseconds(lambda: read_losses(total)),
        "gradients looked at once (finite?)": microseconds(lambda: updater._finite_check(gradients)),
        "the batch is on its device (move_to_device)": microseconds(lambda: move_to_device(batch, trainer.device)),
        "times, and whether a signal waits": microseconds(timed),
        "counters": microseconds(counted),
        "learning rate read": microseconds(lambda: trainer.lr),
        "schedule and count of updates": microseconds(trainer.optimization.unit.schedules[0].step),
        "values recorded in rows": microseconds(lambda: trainer.record(row)),
        "safe point": microseconds(trainer.safe_point),
        "stages without a hook": microseconds(stages),
        "LoggerHook.after_iter (a row each 50 batches, no bar)": microseconds(logger_after_iter),
        "ThroughputHook, if it is there": microseconds(split_of_time) - microseconds(no_split),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work_dir:
        rows = measure(work_dir)
    for name, value in rows.items():
        print(f"{name:<60} {value:7.2f} us")
    write(options.output, {name: round(value, 2) for name, value in rows.items()})


if __name__ == "__main__":
    main()
