"""`torch-frame show`, from a run's files alone."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
        rate = 0.1 if name == "first" else 0.01
        settings = f'"settings": {{"lr": {rate}, "seed": 3, "two\\\\nlines": {rate}}}'
        (folder / "run.json").write_text(re.sub(r'"settings": \{[^}]*\}', settings, text))
    lines = shown(capsys, *runs.values())
    assert ["lr", "0.1", "0.01"] in [line.split() for line in lines]
    assert ["two\\nlines", "0.1", "0.01"] in [line.split() for line in lines]
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


def test_columns_of_late_scores_stand_where_the_run_had_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    hooks = [
        EvalHook([0], lambda model, batch: {"acc": [math.inf]}, 2, prefix=name, progress_bar=False)
        for name in ("b", "a")
    ]
    trainer = make_trainer(tmp_path / "run", max_epochs=3, hooks=[*hooks, LoggerHook(progress_bar=False)])
    trainer.train(5, 2)
    logged = [line.partition("]: ")[2] for line in Path(trainer.log_file).read_text(encoding="utf-8").splitlines()]
    table = [line for line in logged if line.startswith("Epoch ")]
    assert "inf" in table[2]
    assert [line for line in shown(capsys, tmp_path / "run") if line.startswith("Epoch ")] == table


def test_runs_counted_in_epochs_and_in_batches_stand_below_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, length in {"epochs": {"max_epochs": 3}, "batches": {"max_epochs": None, "max_iters": 10}}.items():
        hooks = [
            EvalHook([0], lambda model, batch: {"acc": [0.5]}, progress_bar=False),
            LoggerHook(5, progress_bar=False),
        ]
        make_trainer(tmp_path / name, hooks=hooks, **length).train(5, 2)  # type: ignore[arg-type]
    lines = shown(capsys, tmp_path / "epochs", tmp_path / "batches")
    start = lines.index("total_loss by epoch")
    assert [line.split()[:2] for line in lines[start + 1 :]] == [
        *(["Epoch", f"{number}"] for number in (1, 2, 3)),
        *(["Iter", f"{number}"] for number in (5, 10)),
    ]
    assert all(len(line.split()) == 3 for line in lines[start + 1 :]), lines


JUNK: list[Any] = [
    None,
    True,
    -1,
    10**400,
    "",
    "x",
    "\x1b[31m",
    "\n",
    [],
    {},
    [1],
    {"a": 1},
    "Epoch",
    "NaN",
    [[]],
    {"eval_acc": 3},
]


def damaged(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {name: damaged(item, draw) if name == key else item for name, item in value.items()}
    if isinstance(value, list) and value and draw.random() < 0.6:
        return [damaged(value[0], draw), *value[1:]]
    return draw.choice(JUNK)


def test_files_damaged_in_any_way_are_shown_as_far_as_they_go(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    facts = json.loads((runs["first"] / "run.json").read_text())
    rows = [json.loads(line) for line in (runs["first"] / "table.jsonl").read_text().splitlines()]
    for _ in range(200):
        text = json.dumps(damaged(facts, draw))
        (tmp_path / "run.json").write_text(text[: draw.randrange(len(text) * 5) + 1])
        lines = "\n".join(json.dumps(damaged(row, draw) if draw.random() < 0.5 else row) for row in rows)
        (tmp_path / "table.jsonl").write_text(lines[: draw.randrange(len(lines) * 5) + 1])
        (tmp_path / "metrics.jsonl").write_text('{"iter": 0, "epoch": 0, "total_loss": 0.5}')
        assert main(["show", str(tmp_path)]) == 0
        assert main(["show", str(tmp_path), str(runs["second"])]) == 0
        assert "\x1b" not in capsys.readouterr().out


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
