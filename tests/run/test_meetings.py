"""The ranks of a run meet rarely, all at the same safe points, and what one of them wants is known to all at the same one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes
from tests.distributed.threads import ThreadStrategy, on_ranks
from tests.small_hooks import On, at_iter
from tests.small_runs import Net, make_trainer
from torch_frame import CheckpointerHook, HookBase, LoggerHook
from torch_frame.distributed.ddp import DDP
from torch_frame.run.meetings import INTERVAL_S, MOST, Meetings


def answers(
    strategy: ThreadStrategy, wanted_at: dict[int, int], steps: int, asks: bool = False, step_s: float = 0.0
) -> Any:
    """(safe points at which the answer was yes, all exchanges); rank -> the safe point from which on it wants something."""
    meetings = Meetings(strategy)
    meetings.begin_epoch(asks=asks and strategy.rank == 1)
    wants, yes = False, []
    for step in range(steps):
        time.sleep(step_s * (1 + strategy.rank))
        wants = wants or wanted_at.get(strategy.rank) == step
        if meetings.agree(wants):
            yes.append(step)
            wants = False
    return yes, len(strategy._meeting.names[strategy.rank])


def test_short_steps_share_an_exchange_and_a_wish_waits_for_it(tmp_path: Path) -> None:
    results = on_ranks(lambda strategy: answers(strategy, {1: 70}, 200), 3)
    assert results[0] == results[1] == results[2]
    ((at,), exchanges) = results[0]  # type: ignore[misc]
    assert 70 <= at < 70 + MOST
    assert exchanges <= 1 + 5 + 200 / MOST + 1, "1, 2, 4, ... safe points apart, then MOST"


@pytest.mark.parametrize("at", [0, 1, 17])
def test_where_a_rank_may_ask_in_its_steps_the_answer_comes_at_once(at: int) -> None:
    results = on_ranks(lambda strategy: answers(strategy, {0: at}, 20, asks=True))
    assert results == [([at], 21)] * 2


def test_long_steps_meet_at_each() -> None:
    results = on_ranks(lambda strategy: answers(strategy, {0: 3, 1: 5}, 8, step_s=INTERVAL_S * 0.6))
    assert results == [([3, 5], 9)] * 2


def test_steps_that_get_longer_are_met_more_often_again() -> None:
    def work(strategy: ThreadStrategy) -> list[int]:
        meetings, every = Meetings(strategy), []
        meetings.begin_epoch(asks=False)
        for step in range(150):
            if step >= 100:
                time.sleep(INTERVAL_S / 4)
            meetings.agree(False)
            every.append(meetings._every)
        return every

    first, second = on_ranks(work)
    assert first == second
    assert max(first) == MOST
    assert first[-1] <= 4


# ---------------------------------------------------------------- runs on two processes


class Counting(DDP):
    """Counts what the ranks exchange beside DDP's gradients, and when."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        super().__init__()

    def agree(self, flag: bool) -> bool:
        self.calls.append("agree")
        return super().agree(flag)

    def sum(self, value: Any) -> Any:
        self.calls.append("sum")
        return super().sum(value)


def loader(batches: int, size: int = 2) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(batches * size * 2, 3), torch.randn(batches * size * 2, 1))
    return DataLoader(data, size, shuffle=True)


def calls(folder: Path, batches: int, **settings: Any) -> dict[str, int]:
    strategy = Counting()
    make_trainer(folder, Net(), None, None, loader(batches), 1, strategy=strategy, **settings).train(5, 5)
    return {name: strategy.calls.count(name) for name in ("agree", "sum")}


def stopped(folder: Path, hooks: list[HookBase] | None = None, step_fn: Any = None, batches: int = 200) -> int:
    trainer = make_trainer(folder, Net(), None, None, loader(batches), 1, hooks=hooks or [], step_fn=step_fn)
    TRAINERS.append(trainer)
    trainer.train(5, 5)
    return trainer.progress.iter


TRAINERS: list[Any] = []


def stop_on_rank_1(trainer: Any) -> None:
    trainer.should_stop = trainer.should_stop or trainer.strategy.rank == 1


def stops_in_its_step(model: nn.Module, batch: Any) -> Tensor:
    if TRAINERS[-1].cur_iter == 50:
        stop_on_rank_1(TRAINERS[-1])
    loss: Tensor = model(batch)
    return loss


def signalled(folder: Path) -> dict[str, Any]:
    """A signal to one rank, with the default hooks."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        if trainer.cur_iter == 40 and trainer.strategy.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loss: Tensor = model(batch)
        return loss

    hooks = [CheckpointerHook(every_n_minutes=30), LoggerHook(progress_bar=False)]
    trainer = make_trainer(folder, Net(), None, None, loader(200), 1, hooks=hooks, step_fn=step, create_new_dir=None)
    try:
        trainer.train(5, 5)
    except SystemExit as error:
        saved = torch.load(folder / "checkpoints" / "latest.pth", weights_only=True)["progress"]["iter"]
        return {"code": error.code, "iter": trainer.progress.iter, "saved": saved}
    return {}


def all_runs(folder: Path) -> dict[str, Any]:
    hooks = {
        "after_iter": [On(after_iter=at_iter(50, stop_on_rank_1))],
        "before_epoch": [On(before_epoch=stop_on_rank_1)],
    }
    return {
        "short": calls(folder / "a", 8),
        "long": calls(folder / "b", 72),
        "long, defaults": calls(folder / "c", 72, hooks=None),
        "accumulated": calls(folder / "d", 72, gradient_accumulation_steps=2, clip_grad_norm=1.0, on_nonfinite="skip"),
        "hook": calls(folder / "e", 72, hooks=[On(after_iter=lambda trainer: None)]),
        "stopped by a hook": stopped(folder / "f", hooks["after_iter"]),
        "stopped before": stopped(folder / "g", hooks["before_epoch"]),
        "stopped by a step": stopped(folder / "h", step_fn=stops_in_its_step),
        "signal": signalled(folder / "i"),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
def test_a_plain_step_exchanges_gradients_and_nothing_else(tmp_path: Path) -> None:
    first, second = on_processes(all_runs, tmp_path, 2, tmp_path)
    assert first == second
    assert first["short"]["agree"] == first["long"]["agree"], "none is made in a step"
    assert first["accumulated"]["agree"] == first["long"]["agree"]
    assert first["long"]["sum"] < 72
    assert first["long, defaults"]["sum"] < 72
    assert first["long, defaults"]["agree"] < first["long"]["agree"] + 10, "saves and evaluations of an epoch"
    assert first["hook"]["agree"] - first["long"]["agree"] == 72, "one for each step"
    assert first["stopped by a hook"] == 51
    assert first["stopped before"] == 1
    assert 51 <= first["stopped by a step"] <= 51 + MOST
    assert first["signal"]["code"] == 143
    assert 41 <= first["signal"]["iter"] == first["signal"]["saved"] <= 41 + MOST
