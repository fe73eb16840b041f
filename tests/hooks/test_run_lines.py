"""The lines of a run: epoch by epoch, over a resume, and at its end, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, environment, make_batches, make_trainer, raised_by
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook, Trainer
from torch_frame.cli.main import main
from torch_frame.tracking.summary import command_line


def evaluation(scores: list[float] | None = None, **settings: Any) -> EvalHook:
    given = iter([0.0, *(scores or [0.5] * 20)])
    return EvalHook(
        make_batches(1), lambda model, batch: {"acc": [next(given)]}, save_metric="acc", progress_bar=False, **settings
    )


def lines_of(trainer: Trainer) -> list[str]:
    return [line.partition("]: ")[2] for line in Path(trainer.log_file).read_text(encoding="utf-8").splitlines()]


def epochs_in(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match(r"Epoch \d", line)]


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(trainer.work_dir, "table.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_score_stands_in_the_lines_of_its_epochs_only_and_has_its_column_from_the_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=7, hooks=[evaluation(period=3), LoggerHook(progress_bar=False)])
    trainer.train(5, 2)
    lines = lines_of(trainer)
    heads = [line for line in lines if line.startswith("Epoch  ")]
    assert len(heads) == 1
    place = heads[0].index("eval_acc")
    shown = [bool(line[place : place + len("eval_acc")].strip()) for line in epochs_in(lines)]
    assert shown == [False, False, True, False, False, True, True]


def test_the_best_so_far_is_marked_once_for_each_time(tmp_path: Path) -> None:
    hooks = [evaluation([0.5, 0.25, 0.75, 0.75]), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=4, hooks=hooks)
    trainer.train(5, 2)
    assert ["*" in line for line in epochs_in(lines_of(trainer))] == [True, False, True, False]
    assert any("eval_acc 0.7500 in epoch 3/4" in line for line in lines_of(trainer))


def test_of_several_evaluations_in_an_epoch_only_the_best_is_marked_and_told(tmp_path: Path) -> None:
    hooks = [evaluation([0.5, 0.75, 0.25, 0.25, 0.5], period=2, period_unit="iter"), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=hooks)  # of 5 batches: evaluated behind 2, 4, 6, 8, 10
    trainer.train(5, 2)
    assert [row["values"]["eval_acc"] for row in rows_of(trainer)] == [0.75, 0.5]
    assert [row["best"] for row in rows_of(trainer)] == [["eval_acc"], []]


def test_a_best_value_that_a_later_evaluation_of_the_epoch_has_replaced_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = [evaluation([0.75, 0.25, 0.25, 0.5, 0.5], period=2, period_unit="iter"), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=hooks)
    trainer.train(5, 2)
    assert [row["values"]["eval_acc"] for row in rows_of(trainer)] == [0.25, 0.5]
    assert [row["best"] for row in rows_of(trainer)] == [[], []]
    assert any("eval_acc 0.7500 in epoch 1/2" in line for line in lines_of(trainer))
    capsys.readouterr()
    assert main(["show", trainer.work_dir, trainer.work_dir]) == 0
    assert "0.7500 (epoch 1/2)" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [11, 14])  # inside an epoch; behind its last batch
def test_a_resumed_run_has_each_line_once_and_knows_its_best(stop_at: int, tmp_path: Path) -> None:
    scores = [0.25, 0.75, 0.5, 0.5, 0.5]

    def trainer_of(folder: str, scores: list[float], *hooks: HookBase) -> Trainer:
        savers = [CheckpointerHook(every_n_iters=stop_at + 1), LoggerHook(progress_bar=False)]
        return make_trainer(tmp_path / folder, max_epochs=5, hooks=[evaluation(scores), *savers, *hooks])

    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    interrupted = trainer_of("run", scores, On(before_iter=at_iter(stop_at + 1, stop)))
    raised_by(lambda: interrupted.train(5, 2), InterruptedError)
    resumed = trainer_of("run", [0.5, *scores[2:]] if stop_at == 14 else scores[2:])
    resumed.load_checkpoint("latest.pth")
    resumed.train(5, 2)
    whole = trainer_of("whole", scores)
    whole.train(5, 2)
    kept = ("label", "iter", "epoch", "best")
    assert [[row[key] for key in kept] for row in rows_of(resumed)] == [
        [row[key] for key in kept] for row in rows_of(whole)
    ]
    assert any("eval_acc 0.7500 in epoch 2/5" in line for line in lines_of(resumed))


def test_the_rates_shown_are_those_that_the_steps_were_made_with(tmp_path: Path) -> None:
    model = Net()
    first, *others = list(model.parameters())
    optimizer = SGD([{"params": [first], "lr": 0.4}, {"params": others, "lr": 0.04}])
    schedule = ExponentialLR(optimizer, 0.5)
    trainer = make_trainer(tmp_path, model, optimizer, schedule, max_epochs=3, hooks=[LoggerHook(progress_bar=False)])
    trainer.train(5, 2)
    assert [row["lr"] for row in rows_of(trainer)] == [pytest.approx([0.4 * f, 0.04 * f]) for f in (1, 0.5, 0.25)]
    assert "0.4/0.04" in epochs_in(lines_of(trainer))[0]


RATES = {
    "lists of optimizers, the first with a schedule": lambda one, two: ([one, two], [StepLR(one, 1, 0.5), None]),
    "lists of optimizers, the second with a schedule": lambda one, two: ([one, two], [None, StepLR(two, 1, 0.5)]),
    "groups, each with a function": lambda one, two: _groups(one, two, [lambda e: 0.5**e, lambda e: 1.0]),
    "groups, only the second moves": lambda one, two: _groups(one, two, [lambda e: 1.0, lambda e: 0.5**e]),
}


def _groups(one: SGD, two: SGD, functions: list[Any]) -> tuple[SGD, LambdaLR]:
    groups = [{"params": each.param_groups[0]["params"], "lr": each.param_groups[0]["lr"]} for each in (one, two)]
    optimizer = SGD(groups)
    return optimizer, LambdaLR(optimizer, functions)


@pytest.mark.parametrize("warmup", [None, "linear"])
@pytest.mark.parametrize("kind", RATES)
def test_groups_and_optimizers_that_move_apart_are_shown_with_their_own_rates(
    kind: str, warmup: Any, tmp_path: Path
) -> None:
    used: list[float] = []
    at_end: list[list[float]] = []
    hooks = [
        On(
            before_iter=lambda trainer: used.__setitem__(slice(None), rates_of(trainer)),
            after_epoch=lambda t: at_end.append([*used]),
        ),
        LoggerHook(progress_bar=False),
    ]
    model = Net()
    first, *others = list(model.parameters())
    optimizer, schedule = RATES[kind](SGD([first], lr=0.4), SGD(others, lr=0.04))
    trainer = make_trainer(
        tmp_path, model, optimizer, schedule, max_epochs=3, hooks=hooks, warmup_method=warmup, warmup_iters=7
    )
    trainer.train(5, 2)
    assert [row["lr"] for row in rows_of(trainer)] == [pytest.approx(rates) for rates in at_end]


def rates_of(trainer: Trainer) -> list[float]:
    several = trainer.optimizer if isinstance(trainer.optimizer, tuple) else [trainer.optimizer]
    return [group["lr"] for one in several for group in one.param_groups]


def test_a_run_resumed_into_an_epochs_end_shows_the_rates_of_its_steps(tmp_path: Path) -> None:
    def made(*hooks: HookBase, resume: str | None = None) -> Trainer:
        model = Net()
        first, *others = list(model.parameters())
        optimizer, schedule = _groups(SGD([first], lr=0.4), SGD(others, lr=0.04), [lambda e: 0.5**e, lambda e: 1.0])
        all_hooks = [*hooks, CheckpointerHook(), LoggerHook(progress_bar=False)]
        settings: dict[str, Any] = {"create_new_dir": None, "resume": resume}
        return make_trainer(tmp_path / "run", model, optimizer, schedule, max_epochs=2, hooks=all_hooks, **settings)

    def stop(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer.check_stop()

    stopped = made(On(after_epoch=stop))
    with pytest.raises(SystemExit):
        stopped.train(5, 2)
    resumed = made(resume="auto")
    resumed.train(5, 2)
    assert [row["lr"] for row in rows_of(resumed)] == [pytest.approx([0.4, 0.04]), pytest.approx([0.2, 0.04])]


def test_after_an_error_the_block_says_what_is_there_to_continue_from(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        raise InterruptedError

    hooks = [CheckpointerHook(), LoggerHook(progress_bar=False), On(after_iter=at_iter(7, fail))]
    trainer = make_trainer(tmp_path, max_epochs=3, hooks=hooks)
    raised_by(lambda: trainer.train(5, 2), InterruptedError)
    lines = lines_of(trainer)
    assert any(line.startswith("Failed after batch 8 of the run: InterruptedError") for line in lines), lines
    assert any(line.lstrip().startswith("state") and "latest.pth" in line for line in lines)
    assert any("to continue: " in line for line in lines)
    assert f"trainer.load_checkpoint('{trainer.ckpt_dir}/latest.pth')" in lines[-1]
    assert json.loads(Path(trainer.work_dir, "run.json").read_text())["how"] == "failed"


def test_an_error_before_the_first_save_does_not_promise_a_state(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        raise InterruptedError

    trainer = make_trainer(tmp_path, hooks=[LoggerHook(progress_bar=False), On(before_iter=fail)])
    raised_by(lambda: trainer.train(5, 2), InterruptedError)
    assert any("nothing was saved yet" in line for line in lines_of(trainer))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.small_hooks import On, at_iter
from tests.small_runs import make_trainer
from torch_frame import CheckpointerHook, LoggerHook

stop = On(after_iter=at_iter(7, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)))
hooks = [CheckpointerHook(), LoggerHook(progress_bar=False), stop]
make_trainer(Path("run"), max_epochs=3, hooks=hooks).train()
"""


def test_after_a_signal_the_block_has_the_command_that_continues(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "train.py", "--size", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "Stopped after batch 8 of the run." in done.stdout
    assert re.search(r"to continue: python[\d.]* train.py --size 7\n +with Trainer\(..., resume=", done.stdout)


def test_the_block_has_scores_that_nobody_follows(tmp_path: Path) -> None:
    hooks = [EvalHook([0], lambda model, batch: {"acc": [0.5]}, progress_bar=False), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=hooks, clip_grad_norm=1.0)
    trainer.train(5, 2)
    (last,) = [line for line in lines_of(trainer) if line.startswith("  last")]
    assert re.fullmatch(r"  last +total_loss 1\.\d{4}, eval_acc 0\.5000", last), last


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_signal_before_the_first_step_ends_no_run_as_finished(is_resumed: bool, tmp_path: Path) -> None:
    def made(**stages: Any) -> Trainer:
        hooks = [On(**stages), CheckpointerHook(), LoggerHook(progress_bar=False)]
        settings: dict[str, Any] = {"create_new_dir": None, "resume": "auto"}
        return make_trainer(tmp_path / "run", max_epochs=2, hooks=hooks, **settings)

    def stop(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if is_resumed:
        with pytest.raises(SystemExit):
            made(after_iter=at_iter(6, stop)).train(5, 2)
    trainer = made(before_train=stop)
    with pytest.raises(SystemExit):
        trainer.train(5, 2)
    assert [line for line in lines_of(trainer) if re.match("Finished|Stopped", line)][-1].startswith("Stopped after")
    assert json.loads(Path(trainer.work_dir, "run.json").read_text(encoding="utf-8"))["how"] == "stopped"
    where = "epoch 2, iteration 6 of the run" if is_resumed else "epoch 1, iteration 0 of the run"
    assert any("SIGTERM came" in line and where in line for line in lines_of(trainer)[-20:])


def test_another_train_continues_the_table(tmp_path: Path) -> None:
    hooks = [evaluation([0.5, 0.75, 0.0, 0.25, 0.25]), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=hooks)
    trainer.train(5, 2)
    trainer.max_epochs = 4
    trainer.train(5, 2)
    assert [row["label"] for row in rows_of(trainer)] == ["Epoch 1/2", "Epoch 2/2", "Epoch 3/4", "Epoch 4/4"]
    best = [line for line in lines_of(trainer) if "best   eval_acc 0.7500 in epoch 2/2" in line]
    assert len(best) == 2
    assert json.loads(Path(trainer.work_dir, "run.json").read_text(encoding="utf-8"))["seconds_before"] > 0


def test_a_run_with_nothing_to_train_ends_in_a_block(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[LoggerHook(progress_bar=False)])
    trainer.train(5, 2)
    trainer.train(5, 2)
    assert any("nothing was left to train" in line for line in lines_of(trainer))


def test_the_speed_is_of_the_steps_and_not_of_evaluations(tmp_path: Path) -> None:
    def slow(model: Any, batch: Any) -> dict[str, list[float]]:
        time.sleep(0.3)
        return {"acc": [1.0]}

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(40, 3), torch.ones(40, 1)), 4)
    hooks = [EvalHook(make_batches(1), slow, progress_bar=False), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, data=data, max_epochs=2, hooks=hooks)
    trainer.train(5, 2)
    for row in rows_of(trainer):
        assert row["time_s"] > 0.3
        assert row["per_s"] > 40 / 0.3  # samples


def test_the_speed_is_of_the_batches_of_the_epoch_whichever_loader_it_has(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))

    def change(trainer: Trainer) -> None:
        if trainer.epoch == 0:
            trainer.data_loader = DataLoader(data, 4)  # counts from the next epoch on

    hooks = [On(after_epoch=change), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=2, data=DataLoader(data, 20), hooks=hooks)
    steps_s: list[float] = []
    trainer.register_hooks([On(after_epoch=lambda t: steps_s.append(t.metric_storage["iter_time"].global_sum))])
    trainer.train(5, 2)
    assert [row["per_s"] for row in rows_of(trainer)] == [
        pytest.approx(40 / steps_s[0]),
        pytest.approx(40 / (steps_s[1] - steps_s[0])),
    ]


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"])
def test_what_a_launcher_has_started_is_not_continued_by_pythons_command_alone(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["python3", "-u", "train.py"]
    assert command_line(words) == "python3 -u train.py"
    monkeypatch.setenv(launcher, "none")
    assert command_line(words) is None


def test_eighty_values_in_eighty_columns_are_told_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Many(HookBase):
        def after_epoch(self) -> None:
            self.log(self.trainer.epoch, **{f"average_precision_of_category_{index}": 0.1 for index in range(80)})

    monkeypatch.setenv("COLUMNS", "80")
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=[Many(), LoggerHook(progress_bar=False)])
    trainer.train(2, 2)
    lines = capsys.readouterr().out.splitlines()
    first = next(
        number for number, line in enumerate(lines) if line.startswith("The screen is too narrow for average_")
    )
    last = next(number for number, line in enumerate(lines) if line.endswith("see log.txt and metrics.jsonl."))
    assert last - first < 5
    assert "and 74 more" in " ".join(lines[first : last + 1])
    assert max(len(line) for line in lines if line.startswith("Epoch")) < 80
    assert epochs_in(lines_of(trainer))[0].count("0.1000") == 80


def test_a_full_width_of_odd_names_and_values_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(HookBase):
        def after_epoch(self) -> None:
            self.log(self.trainer.epoch, **{"准确率": float("nan"), "x" * 300: float("inf"), "\n": -1e300})

    for columns in ("1", "7", "80", "100000"):
        monkeypatch.setenv("COLUMNS", columns)
        make_trainer(tmp_path / columns, max_epochs=2, hooks=[Odd(), LoggerHook(progress_bar=False)]).train()


def test_a_hook_so_odd_that_nothing_can_be_shown_costs_the_lines_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(CheckpointerHook):
        def save_model(self) -> None:
            pass

        @property
        def cur_best(self) -> float:  # type: ignore[override]
            if self.trainer.progress.iter:
                raise RuntimeError("not now")
            return 0.0

        @cur_best.setter
        def cur_best(self, value: float) -> None:
            pass

    trainer = make_trainer(
        tmp_path, hooks=[Odd(save_metric="total_loss", max_first=False), LoggerHook(progress_bar=False)]
    )
    trainer.train(5, 2)
    assert trainer.progress.epoch == 2
    assert caplog.text.count("The run's lines are not shown any more: RuntimeError: not now") == 1


@pytest.mark.parametrize("make", [torch.tensor, lambda epoch: None if epoch else 0.5])
def test_a_best_value_of_a_hooks_own_making_is_shown_as_a_number(make: Any, tmp_path: Path) -> None:
    class Own(CheckpointerHook):
        def after_epoch(self) -> None:
            super().after_epoch()
            self.cur_best = make(0.5 * self.trainer.epoch)

    hooks = [Own(save_metric="total_loss", max_first=False), LoggerHook(progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=hooks)
    trainer.train(5, 2)
    best = json.loads(Path(trainer.work_dir, "run.json").read_text(encoding="utf-8"))["best"]
    assert best["total_loss"]["value"] == 0.5
    assert len(rows_of(trainer)) == 2


def test_the_lines_of_a_run_counted_in_steps_are_those_of_its_periods(tmp_path: Path) -> None:
    hooks = [evaluation(), LoggerHook(2, progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=None, max_iters=15, hooks=hooks)
    trainer.train(5, 2)
    lines = [line for line in lines_of(trainer) if line.startswith("Iter ")]
    assert lines[0].split()[:3] == ["Iter", "total_loss", "eval_acc"]
    assert [line.split()[1] for line in lines[1:]] == [f"{done}/15" for done in (2, 4, 5, 7, 9, 10, 12, 14, 15)]
    assert [row["per_s"] > 0 for row in rows_of(trainer)] == [True] * 9
    assert not epochs_in(lines_of(trainer))


def test_the_files_of_another_run_in_the_folder_are_put_aside(tmp_path: Path) -> None:
    for epochs in (2, 3):
        hooks = [LoggerHook(progress_bar=False)]
        make_trainer(tmp_path / "run", max_epochs=epochs, hooks=hooks, create_new_dir=None).train(5, 2)
    assert len((tmp_path / "run" / "table.1.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "run" / "table.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "run" / "run.1.json").read_text())["max_epochs"] == 2
