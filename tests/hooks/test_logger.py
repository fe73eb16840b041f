"""What is written is what happened, once, wherever the output goes."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_hooks import On, Recorder, at_iter
from tests.small_runs import environment, make_batches, make_trainer, raised_by, run_python
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, SettingError, Trainer


def scores(model: Any, batch: Any) -> dict[str, list[float]]:
    return {"acc": [0.25, 0.75]}


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    lines = Path(trainer.work_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(work_dir: Path, *hooks: HookBase, epochs: int = 2, **kwargs: Any) -> Trainer:
    trainer = make_trainer(work_dir, max_epochs=epochs, hooks=hooks, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("period", "iters"), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, [1, 3, 4, 6, 8, 9]), (50, [4, 9])]
)
def test_a_row_is_written_every_period_and_at_the_end_of_each_epoch(
    period: int, iters: list[int], tmp_path: Path
) -> None:
    rows = rows_of(train(tmp_path, LoggerHook(period)))
    assert sorted({row["iter"] for row in rows if "total_loss" in row}) == iters
    assert {row["epoch"] for row in rows} == {0, 1}


def test_rows_hold_the_values_of_the_run(tmp_path: Path) -> None:
    seen = Recorder(lambda trainer: {"total_loss": trainer.metric_storage["total_loss"].avg, "lr": trainer.lr})
    trainer = train(tmp_path, EvalHook(make_batches(1), scores), seen, LoggerHook(1))
    rows = rows_of(trainer)
    assert [{key: row[key] for key in ("total_loss", "lr")} for row in rows if "total_loss" in row] == seen.values
    assert [row["eval_acc"] for row in rows if "eval_acc" in row] == [0.5, 0.5]


def test_each_evaluation_between_two_log_points_is_written(tmp_path: Path) -> None:
    given = iter(range(20))

    def count(model: Any, batch: Any) -> dict[str, list[float]]:
        return {"count": [float(next(given))]}

    def none(model: Any, batch: Any) -> dict[str, list[float]]:
        return {"none": [0.0]}

    hooks = [
        EvalHook(make_batches(1), count, period=1, period_unit="iter", progress_bar=False),
        EvalHook(make_batches(1), none, period=3, period_unit="iter", prefix="test", progress_bar=False),
    ]
    trainer = train(tmp_path, *hooks, LoggerHook())
    rows = rows_of(trainer)
    first = next(row["eval_count"] for row in rows)  # the trials have counted as well
    assert [(row["iter"], row["eval_count"] - first) for row in rows if "eval_count" in row] == [
        (iteration, float(iteration)) for iteration in range(10)
    ]
    assert [row["iter"] for row in rows if "test_none" in row] == [2, 5, 8, 9]
    assert [row["iter"] for row in rows if "total_loss" in row] == [4, 9]
    assert [row["iter"] for row in rows] == sorted(row["iter"] for row in rows)


def test_each_value_is_written_once(tmp_path: Path) -> None:
    rows = rows_of(train(tmp_path, LoggerHook(2), epochs=3))
    iters = [row["iter"] for row in rows if "total_loss" in row]
    assert len(iters) == len(set(iters))


def test_a_resumed_run_writes_each_row_once(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    def trainer_of(*hooks: HookBase) -> Trainer:
        return make_trainer(tmp_path / "run", max_epochs=3, hooks=[CheckpointerHook(), LoggerHook(1), *hooks])

    raised_by(trainer_of(On(after_iter=at_iter(8, stop))).train, InterruptedError)
    trainer = trainer_of()
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    whole = train(tmp_path / "whole", CheckpointerHook(), LoggerHook(1), epochs=3)
    kept = ("iter", "epoch", "total_loss", "lr")
    parts, expected = ([{key: row.get(key) for key in kept} for row in rows_of(t)] for t in (trainer, whole))
    assert parts == expected


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    class Log(HookBase):
        def after_epoch(self) -> None:
            self.log(self.trainer.epoch, odd=math.nan)

    rows = rows_of(train(tmp_path, Log(), LoggerHook()))
    assert [row["odd"] for row in rows if "odd" in row] == [None, None]


def test_the_console_has_a_line_for_each_epoch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, EvalHook(make_batches(1), scores), LoggerHook())
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Epoch ")]
    head, first, second = lines
    assert head.split() == ["Epoch", "total_loss", "eval_acc", "lr", "batches/s", "time", "ETA"]
    assert re.match(r"Epoch 1/2  +\d+\.\d+  +0\.5000  +0\.05 ", first), first
    assert second.startswith("Epoch 2/2 ")
    assert len({len(line) for line in lines}) == 1  # right-aligned, so all end in one column


def test_the_same_lines_are_in_the_log_file(tmp_path: Path) -> None:
    trainer = train(tmp_path, LoggerHook())
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "Epoch 2/2" in log
    assert "Finished: 2 epochs, 10 batches." in log


def test_a_loader_without_length_is_logged(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(make_batches(3))

    trainer = train(tmp_path, LoggerHook(2), data=Stream())
    assert [row["iter"] for row in rows_of(trainer) if "total_loss" in row] == [1, 2, 4, 5]


def events_of(folder: str) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_tensorboard_gets_the_values_by_mode(folder: str | None, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tb_log_dir = None if folder is None else str(tmp_path / folder)
    hooks = [EvalHook(make_batches(1), scores), LoggerHook(2, tb_log_dir, flush_secs=1)]
    trainer = train(tmp_path / "run", *hooks)
    events = events_of(tb_log_dir or trainer.tb_log_dir)
    assert [step for step, _ in events["train/total_loss"]] == [1, 3, 4, 6, 8, 9]
    assert events["eval/eval_acc"] == [(0, 0.5), (1, 0.5)]
    assert "train/lr" in events


def test_modes_of_ones_own_group_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    hooks = [EvalHook(make_batches(1), scores, prefix="test"), LoggerHook(modes=["train", "test"])]
    assert "test/test_acc" in events_of(train(tmp_path / "run", *hooks).tb_log_dir)


def test_files_are_closed_after_an_error(tmp_path: Path) -> None:
    def fail(model: Any, batch: Any) -> Any:
        raise InterruptedError

    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook(1)], step_fn=fail)
    raised_by(trainer.train, InterruptedError)
    assert "InterruptedError" in Path(trainer.log_file).read_text(encoding="utf-8")
    open_files = Path("/proc/self/fd")
    if open_files.exists():
        targets = [os.readlink(fd) for fd in open_files.iterdir() if fd.is_symlink()]
        assert not [target for target in targets if target.startswith(str(tmp_path))]


@pytest.mark.parametrize("period", [1.5, None, True])
def test_a_bad_period_is_refused(period: Any) -> None:
    with pytest.raises(SettingError, match="period"):
        LoggerHook(period)


def test_the_positional_arguments_are_those_of_1_7(tmp_path: Path) -> None:
    hook = LoggerHook(7, str(tmp_path / "logs"), ["train", "eval"])
    assert (hook._period, hook.tb_log_dir, hook.modes) == (7, str(tmp_path / "logs"), ["train", "eval"])


def test_the_bars_values_are_read_without_a_terminal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    train(tmp_path, LoggerHook(), EvalHook(make_batches(1), scores))


# ---------------------------------------------------------------- in a process of its own

SCRIPT = """
import os, sys
BLOCKED = os.environ.get("BLOCKED", "").split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from pathlib import Path
WORK_DIR = os.environ.get("WORK_DIR", "保存路径")
from torch_frame import EvalHook, LoggerHook, CheckpointerHook, logger
from tests.small_runs import make_batches, make_trainer

hooks = [EvalHook(make_batches(3), lambda model, batch: {"acc": [1.0]}), LoggerHook(1), CheckpointerHook()]
trainer = make_trainer(Path(WORK_DIR), hooks=hooks)
logger.info("a line with 中文")
trainer.train(1, 1)
assert Path(WORK_DIR, "metrics.jsonl").read_text(encoding="utf-8").count("total_loss") == 10
assert ("tensorboard" in sys.modules) is ("tensorboard" not in BLOCKED)
assert Path(WORK_DIR, "tb_logs").exists() is ("tensorboard" not in BLOCKED)
Path("done").write_text("yes")
"""


def test_without_tensorboard_all_else_is_written_and_one_line_says_so(tmp_path: Path) -> None:
    result = run_python(SCRIPT, tmp_path, env=environment(BLOCKED="tensorboard"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "done").exists()
    lines = [line for line in result.stdout.splitlines() if "tensorboard" in line.replace(str(tmp_path), "")]
    assert len(lines) == 1
    assert "pip install" in lines[0]


POOR_CONSOLE = {
    "PYTHONIOENCODING": "ascii:strict",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "LC_ALL": "C",
    "TERM": "dumb",
}
FROM_A_FILE = "from pathlib import Path; exec(Path('script.py').read_text(encoding='utf-8'))"


def test_a_console_that_knows_neither_colours_nor_chinese_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    result = run_python(FROM_A_FILE, tmp_path, env=environment(WORK_DIR="run", **POOR_CONSOLE))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "done").exists()
    assert "\x1b" not in result.stdout + result.stderr


def test_a_run_without_any_console_ends_well(tmp_path: Path) -> None:
    closed = "import os, sys\nfor fd in (0, 1, 2): os.close(fd)\nsys.stdin = sys.stdout = sys.stderr = None\n"
    assert run_python(closed + SCRIPT, tmp_path).returncode == 0
    assert (tmp_path / "done").exists()


def test_recorded_tensors_are_written_as_numbers(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, LoggerHook(1), step_fn=lambda model, batch: (model(batch), {"t": torch.tensor([2.5]), "n": 3})
    )
    assert {(row["t"], row["n"]) for row in rows_of(trainer)} == {(2.5, 3.0)}
