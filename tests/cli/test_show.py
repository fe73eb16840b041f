"""`torch-frame show`, from a run's files alone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_runs import environment, make_batches, make_trainer
from torch_frame import CheckpointerHook, EvalHook, LoggerHook
from torch_frame.cli.main import main

SCORES = {"first": [0.25, 0.75, 0.5], "second": [0.5, 0.5, 0.875]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in SCORES}
    for name, folder in folders.items():
        trained(folder, SCORES[name])
    return folders


def trained(folder: Path, scores: list[float]) -> None:
    of_calls = iter([0.0, *scores])  # the trial is the first
    hook = EvalHook(
        make_batches(1), lambda model, batch: {"acc": [next(of_calls)]}, save_metric="acc", progress_bar=False
    )
    trainer = make_trainer(folder, max_epochs=3, hooks=[hook, CheckpointerHook(), LoggerHook(progress_bar=False)])
    trainer.train(5, 2)


def shown(capsys: pytest.CaptureFixture[str], *folders: Path) -> list[str]:
    capsys.readouterr()
    assert main(["show", *map(str, folders)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_runs_table_and_block_are_those_that_it_printed(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [re.sub(r"\d+ \w+ ago", "... ago", line) for line in shown(capsys, runs["first"]) if line]
    log = (runs["first"] / "log.txt").read_text(encoding="utf-8").splitlines()
    logged = [re.sub(r"\d+ \w+ ago", "... ago", line.partition("]: ")[2]) for line in log]
    first = next(number for number, line in enumerate(logged) if line.startswith("Epoch "))
    assert lines == logged[first:]
    assert any(line.strip().startswith("best") and "eval_acc 0.7500 in epoch 2/3" in line for line in lines)


def test_several_runs_stand_side_by_side(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *runs.values())
    assert [line.split() for line in lines if line.startswith(("Epoch ", "state", "best "))] == [
        ["state", "finished", "finished"],
        ["best", "eval_acc", "0.7500", "(epoch", "2/3)", "0.8750", "(epoch", "3/3)"],
        ["Epoch", "1", "0.2500*", "0.5000*"],
        ["Epoch", "2", "0.7500*", "0.5000"],
        ["Epoch", "3", "0.5000", "0.8750*"],
    ]
    assert all(name in lines[1] for name in ("first", "second"))


def test_settings_that_differ_are_shown_and_others_are_not(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder in runs.items():
        text = (folder / "run.json").read_text()
        settings = f'"settings": {{"lr": {0.1 if name == "first" else 0.01}, "seed": 3}}'
        (folder / "run.json").write_text(re.sub(r'"settings": \{[^}]*\}', settings, text))
    lines = shown(capsys, *runs.values())
    assert ["lr", "0.1", "0.01"] in [line.split() for line in lines]
    assert not any(line.startswith("seed") for line in lines)


def test_many_runs_are_broken_into_groups_that_fit(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = shown(capsys, *runs.values())
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("state") for line in lines) == 2


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err


SCRIPT = """
import sys, time
from pathlib import Path
from tests.small_hooks import On
from tests.small_runs import make_trainer
from torch_frame import CheckpointerHook, LoggerHook

slow = On(after_iter=lambda trainer: time.sleep(0.05))
hooks = [CheckpointerHook(), LoggerHook(progress_bar=False), slow]
make_trainer(Path(sys.argv[1]), max_epochs=1000, hooks=hooks).train()
"""


def test_a_run_under_way_and_a_killed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")], env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        table = tmp_path / "run" / "table.jsonl"
        while not table.exists() or not table.read_text().count("\n"):
            assert process.poll() is None
            time.sleep(0.02)
        lines = shown(capsys, tmp_path / "run")
        assert any(re.match(r"Running: Epoch \d+/1000, ", line) for line in lines), lines
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = shown(capsys, tmp_path / "run")
    assert any(line.startswith("Killed") for line in lines), lines
    assert any("nothing was saved yet" in line or "to continue: " in line for line in lines), lines
