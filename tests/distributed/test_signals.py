"""Signals on two ranks, to one of them or to all and to their workers: all end together, saved, and go on bitwise."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

from tests.distributed.processes import Failed, on_processes, results_in, start, wait
from tests.small_data import wait_until
from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, weights_of
from torch_frame import CheckpointerHook, EvalHook, LoggerHook, Trainer

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"), pytest.mark.timeout(300)]

STATUS = {"TERM": 143, "INT": 1, "USR1": 138, "USR2": 140}  # KeyboardInterrupt: see `processes._run`
BATCHES, WAITS_AT, WINDOW = 8, 4, 2


class Noisy(Dataset[Any]):
    """32 samples with random augmentation."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((3,), index / 32) + 0.1 * torch.randn(3)
        return x, x[:1]


def train(folder: Path, waits_in: str | None, ranks: tuple[int, ...], again: bool = False) -> dict[str, Tensor]:
    """Train two epochs.

    Args:
        waits_in: "training" or "evaluation": there these ranks write down their processes and wait for their signal.
        again: rank 1 gets a Ctrl-C of its own when all have agreed to end.
    """
    rank = dist.get_rank()

    def wait_for_signal(trainer: Any) -> None:
        if rank in ranks and not (folder / f"waits_{rank}").exists():
            found = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            (folder / f"waits_{rank}.tmp").write_text(json.dumps(found))
            os.replace(folder / f"waits_{rank}.tmp", folder / f"waits_{rank}")
            while trainer.stop_signals.received is None:
                time.sleep(0.01)

    def score(model: Any, batch: Any) -> dict[str, Tensor]:
        if waits_in == "evaluation" and evaluation.trainer.progress.iter == BATCHES:  # not in the look at names
            wait_for_signal(evaluation.trainer)
        return {"loss": model(batch).reshape(1)}

    def after_train(trainer: Any) -> None:
        if again and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        (folder / f"after_train_{rank}").touch()

    evaluation = EvalHook(DataLoader(Noisy(), 4, num_workers=1), score, progress_bar=False)
    training = at_iter(WAITS_AT, wait_for_signal) if waits_in == "training" else lambda trainer: None
    hooks = [
        evaluation,
        CheckpointerHook(),
        LoggerHook(progress_bar=False),
        On(after_iter=training, after_train=after_train),
    ]
    torch.manual_seed(rank)
    model = Net(dropout=True)
    loader = DataLoader(Noisy(), 2, shuffle=True, num_workers=1)
    trainer = Trainer(
        model, SGD(model.parameters(), lr=0.1, momentum=0.9), None, loader, 2, folder / "run", hooks=hooks, seed=7,
        gradient_accumulation_steps=WINDOW, create_new_dir=None, resume="auto",
    )  # fmt: skip
    trainer.train()
    return weights_of(model)


def end(folder: Path, name: str, to: tuple[int, ...], waits_in: str, again: bool = False) -> list[int | None]:
    """Signal these ranks, and their workers if all of them get it; the exit codes."""
    context = start(train, folder, 2, folder, waits_in, to, again)
    paths = [folder / f"waits_{rank}" for rank in to]
    assert wait_until(
        lambda: all(path.exists() for path in paths) or not any(p.is_alive() for p in context.processes), 120
    )
    for path in paths:
        pids = json.loads(path.read_text())
        assert len(pids) >= 2, "no worker is there"
        for pid in pids if len(to) == 2 else pids[:1]:
            os.kill(pid, getattr(signal, f"SIG{name}"))
    return wait(context, 120)


def saved_iter(folder: Path) -> int:
    iterations: int = torch.load(folder / "run" / "checkpoints" / "latest.pth")["progress"]["iter"]
    return iterations


@pytest.mark.parametrize(
    ("name", "to"),
    [
        pytest.param("USR2", (1,), marks=pytest.mark.slow),
        pytest.param("USR1", (0, 1), marks=pytest.mark.slow),
        pytest.param("TERM", (1,), marks=pytest.mark.slow),
        pytest.param("INT", (0, 1), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_or_to_all_ends_all_and_the_run_goes_on_bitwise(
    name: str, to: tuple[int, ...], tmp_path: Path
) -> None:
    expected = on_processes(train, tmp_path / "whole", 2, tmp_path / "whole", None, ())
    folder = tmp_path / "cut"
    assert end(folder, name, to, "training") == [STATUS[name]] * 2
    assert saved_iter(folder) == WAITS_AT + WINDOW, "at the window's end"
    told = next(line for line in (folder / "run" / "log.txt").read_text().splitlines() if f"SIG{name} came" in line)
    assert ("s ago, on rank 1, in epoch 1, iteration 4 of the run (test_signals.py, line " in told) == (to == (1,))
    assert "in wait_for_signal)" in told
    resumed = on_processes(train, folder, 2, folder, None, ())
    assert [differences(after, before) for after, before in zip(resumed, expected, strict=True)] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_an_evaluation_whose_workers_get_the_signal_too_is_finished_and_saved(name: str, tmp_path: Path) -> None:
    """torchrun sends SIGTERM to whole process groups; workers that die of it would end the run without a save."""
    assert end(tmp_path, name, (0, 1), "evaluation") == [STATUS[name]] * 2
    assert saved_iter(tmp_path) == BATCHES
    assert (tmp_path / "run" / "checkpoints" / "best.pth").exists()


@pytest.mark.slow
def test_a_ctrl_c_of_which_the_other_rank_has_told_already_is_no_second_one(tmp_path: Path) -> None:
    assert end(tmp_path, "INT", (0,), "training", again=True) == [1, 1]
    assert saved_iter(tmp_path) == WAITS_AT + WINDOW
    assert (tmp_path / "after_train_1").exists()
    assert all(isinstance(result, Failed) and result.kind == "KeyboardInterrupt" for result in results_in(tmp_path, 2))
