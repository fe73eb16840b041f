"""Processes that are started at once in one folder: one trains, the other gets a sentence, and nothing is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.kit import Config, Training, checkpoints, is_whole, temporary_files
from tests.small_data import wait_until
from tests.small_runs import environment

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="POSIX signals"), pytest.mark.timeout(3600)]

FILES = ["checkpoints", "log.txt", "metrics.jsonl", "run.json", "table.jsonl", "tb_logs"]

SCRIPT = """
import os, sys, time, torch
from torch import nn
from torch_frame import CheckpointerHook, LoggerHook, Trainer

folder, name, resume, seconds = sys.argv[1], sys.argv[2], sys.argv[3] or None, float(sys.argv[4])
torch.set_num_threads(1)
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = lambda model, batch: (time.sleep(seconds / 40), model(batch).square().mean())[1]
trainer = Trainer(
    model, optimizer, None, [torch.ones(4, 2)] * 10, 4, folder + "/run", create_new_dir=None, resume=resume, step_fn=loss,
    hooks=[CheckpointerHook(every_n_iters=3), LoggerHook(period=1, progress_bar=False)],
)
open(f"{folder}/ready_{name}", "w").close()
while not os.path.exists(folder + "/go"):
    pass
trainer.train(5, 2)
"""


def start_together(folder: Path, resume: str, seconds: float) -> list[tuple[int, str]]:
    """Two processes, past a barrier right before `train()`: (status, last line of errors) of each, the one that trained first."""
    folder.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    processes = [
        subprocess.Popen([*command, name, resume, str(seconds)], env=environment(), stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    try:
        assert wait_until(lambda: all((folder / f"ready_{name}").exists() for name in "ab"), 120)
        (folder / "go").touch()
        outputs = [process.communicate(timeout=seconds + 120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ended = [
        (p.returncode, (text.strip().splitlines() or [""])[-1]) for p, text in zip(processes, outputs, strict=True)
    ]
    return sorted(ended)


def check_that_one_has_trained(folder: Path, ended: list[tuple[int, str]]) -> None:
    (status, _), (other_status, words) = ended
    assert (status, other_status) == (0, 1), ended
    assert "WorkDirError" in words, words
    assert "is in use: process" in words, words
    for name in ("latest.pth", "previous.pth", "best.pth"):
        assert is_whole(checkpoints(folder) / name), name
    assert torch.load(checkpoints(folder) / "latest.pth")["progress"]["epoch"] == 4
    rows = [json.loads(line)["iter"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(40))
    assert not temporary_files(folder)
    assert sorted(os.listdir(folder / "run")) == FILES


@pytest.mark.parametrize("resume", ["", "auto"])
def test_of_two_processes_started_at_once_one_trains(resume: str, tmp_path: Path) -> None:
    check_that_one_has_trained(tmp_path / "a", start_together(tmp_path / "a", resume, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["", "auto"])
@pytest.mark.parametrize("turn", range(5))
def test_of_two_processes_that_train_for_10_seconds_one_does_50_times(turn: int, resume: str, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    with ThreadPoolExecutor(len(folders)) as pool:
        for folder, ended in zip(
            folders, pool.map(lambda one: start_together(one, resume, 10.0), folders), strict=True
        ):
            check_that_one_has_trained(folder, ended)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_after_a_sigkill_with_busy_workers_the_next_start_succeeds_at_once(context: str, tmp_path: Path) -> None:
    """Only the training process is killed: its workers live on in the folder, inside a sample."""
    options = Config("plain", 2, context).options
    with Training(tmp_path, *options, "--block", "3") as first:
        first.wait_for("blocked")
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(30)
        workers = first.members()
        assert len(workers) >= 1, "its workers have ended already"
        started = time.monotonic()
        with Training(tmp_path, *options) as second:
            second.wait_for("begin")
            begun: Any = time.monotonic() - started
            assert second.wait() == 0, second.tail()
        assert begun < 30 * first.slowness
