"""EarlyStoppingHook ends a run that no longer gets better, as a run ends that has trained all its epochs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_hooks import Stages
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import (
    CheckpointerHook,
    EarlyStoppingHook,
    EvalHook,
    HookBase,
    LoggerHook,
    NonFiniteError,
    SettingError,
    Trainer,
)


class Log(HookBase):
    """Logs one value an epoch; None logs nothing."""

    def __init__(self, values: list[float | None], name: str = "score") -> None:
        self.values = values
        self.name = name

    def after_epoch(self) -> None:
        value = self.values[self.trainer.epoch]
        if value is not None:
            self.log(self.trainer.epoch, **{self.name: value}, smooth=False, window_size=1)


def run(
    tmp_path: Path, values: list[float | None], *hooks: HookBase, epochs: int | None = None, **kwargs: Any
) -> Trainer:
    """A run of one epoch for each value."""
    trainer = make_trainer(
        tmp_path / "run",
        data=make_batches(1),
        max_epochs=len(values) if epochs is None else epochs,
        create_new_dir=None,
        hooks=[Log(values), *hooks, EarlyStoppingHook("score", **kwargs)],
    )
    trainer.train()
    return trainer


def epochs_by_hand(values: list[float], patience: int, max_first: bool, min_delta: float) -> int:
    best, bad = None, 0
    for n, value in enumerate(values, start=1):
        gain = math.inf if best is None else (value - best if max_first else best - value)
        if gain > min_delta:
            best, bad = value, 0
        else:
            bad += 1
        if bad == patience:
            return n
    return len(values)


@pytest.mark.parametrize(
    ("values", "arguments", "epochs"),
    [
        ([1, 2, 3, 4, 5], {"patience": 1}, 5),
        ([1, 2, 2, 3, 4], {"patience": 1}, 3),
        ([1, 1, 1, 1, 1], {"patience": 2}, 3),
        ([3, 1, 2, 2.5, 9], {"patience": 3}, 4),
        ([3, 1, 4, 1, 1, 9], {"patience": 2}, 5),
        ([5, 4, 3, 2, 1], {"patience": 1, "max_first": False}, 5),
        ([1, 2, 3], {"patience": 1, "max_first": False}, 2),
        ([1, 1.25, 1.5, 2], {"patience": 1, "min_delta": 0.25}, 2),
        ([1, 1.5, 1.75, 2.5, 3], {"patience": 1, "min_delta": 0.25}, 3),
        ([-math.inf, -1, 0], {"patience": 1}, 1),
        ([-5, -4, -3, -3.5], {"patience": 2}, 4),
    ],
)
def test_a_run_ends_after_patience_epochs_without_an_improvement(
    values: list[Any], arguments: dict[str, Any], epochs: int, tmp_path: Path
) -> None:
    trainer = run(tmp_path, values, **arguments)
    assert trainer.progress.epoch == epochs
    assert trainer.should_stop == (epochs < len(values) or trainer.should_stop)


@given(
    values=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12),
    patience=st.integers(1, 4),
    max_first=st.booleans(),
    min_delta=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_it_stops_where_a_plain_loop_would(
    tmp_path_factory: Any, values: list[Any], patience: int, max_first: bool, min_delta: float
) -> None:
    trainer = run(tmp_path_factory.mktemp("run"), values, patience=patience, max_first=max_first, min_delta=min_delta)
    assert trainer.progress.epoch == epochs_by_hand(values, patience, max_first, min_delta)


def test_the_run_ends_as_after_its_last_epoch(tmp_path: Path) -> None:
    stages = Stages("after_epoch", "after_train", "on_exception", "close")
    trainer = run(tmp_path, [1, 1, 1, 1], stages, LoggerHook(), patience=1)
    assert stages.calls == ["after_epoch", "after_epoch", "after_train", "close"]
    assert trainer.epoch == 1
    assert "ends early" in Path(trainer.log_file).read_text(encoding="utf-8")


@pytest.mark.parametrize("period", [1, 5])
def test_latest_is_written_when_a_run_ends_early(period: int, tmp_path: Path) -> None:
    """Also where it was not due in that epoch, and before the stop had been decided."""
    trainer = run(tmp_path, [1, 1, 1, 1], CheckpointerHook(period), patience=2)
    resumed = make_trainer(trainer.work_dir, Net(seed=1), data=make_batches(1), max_epochs=9, create_new_dir=None)
    resumed.load_checkpoint("latest.pth")
    assert resumed.progress.epoch == 3
    assert differences(weights_of(trainer.model), weights_of(resumed.model)) == []


def test_nothing_is_written_where_no_hook_writes_it(tmp_path: Path) -> None:
    trainer = run(tmp_path, [1, 1, 1], CheckpointerHook(5, save_last=False), patience=1)
    assert not os.path.exists(os.path.join(trainer.ckpt_dir, "latest.pth"))


def test_epochs_without_a_value_do_not_count(tmp_path: Path) -> None:
    trainer = run(tmp_path, [1, None, None, None, 1, None, 1, 9], patience=2)
    assert trainer.progress.epoch == 7


def test_it_follows_an_evaluation_done_now_and_then(tmp_path: Path) -> None:
    values = iter([1.0, 2.0, 2.0, 2.0])
    evaluation = EvalHook([0], lambda model, batch: {"acc": [next(values)]}, period=2)
    trainer = make_trainer(
        tmp_path, data=make_batches(1), max_epochs=20, hooks=[evaluation, EarlyStoppingHook("eval_acc", patience=2)]
    )
    trainer.train()
    assert trainer.progress.epoch == 8


def test_it_follows_a_loss_of_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_epochs=9,
        step_fn=lambda model, batch: model(batch) * 0 + 1,
        hooks=[EarlyStoppingHook("total_loss", patience=2, max_first=False)],
    )
    trainer.train()
    assert trainer.progress.epoch == 3


def test_nan_is_an_error_that_names_the_metric_and_the_epoch(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"'score'.*epoch 2"):
        run(tmp_path, [1, math.nan, 1], patience=1)


@pytest.mark.parametrize(
    "arguments", [{"patience": 0}, {"patience": 1.5}, {"patience": -1}, {"min_delta": -0.1}, {"min_delta": math.nan}]
)
def test_a_bad_setting_is_told_when_it_is_made(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(SettingError, match=name):
        EarlyStoppingHook("score", **arguments)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_where_the_whole_one_does(stop: int, tmp_path: Path) -> None:
    values: list[float | None] = [5, 6, 6, 5, 5, 9, 9, 9]
    assert run(tmp_path / "whole", values, patience=3).progress.epoch == 5
    run(tmp_path, values, CheckpointerHook(), epochs=stop, patience=3)
    resumed = make_trainer(
        tmp_path / "run",
        data=make_batches(1),
        max_epochs=8,
        create_new_dir=None,
        hooks=[Log(values), CheckpointerHook(), EarlyStoppingHook("score", patience=3)],
    )
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert resumed.progress.epoch == 5


def test_a_run_that_had_ended_early_trains_no_further_when_resumed(tmp_path: Path) -> None:
    values: list[float | None] = [1, 1, 1, 1, 1, 1]
    ended = run(tmp_path, values, CheckpointerHook(), patience=2)
    resumed = make_trainer(
        tmp_path / "run",
        data=make_batches(1),
        max_epochs=6,
        create_new_dir=None,
        hooks=[Log(values), CheckpointerHook(), EarlyStoppingHook("score", patience=2)],
    )
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert resumed.progress.epoch == 3
    assert differences(weights_of(ended.model), weights_of(resumed.model)) == []


def test_two_of_them_both_survive_a_resume(tmp_path: Path) -> None:
    def hooks() -> list[HookBase]:
        return [
            Log([1, 1, 1, 1, 1, 1], "a"),
            Log([1, 2, 3, 4, 5, 6], "b"),
            CheckpointerHook(),
            EarlyStoppingHook("b", patience=1),
            EarlyStoppingHook("a", patience=4),
        ]

    make = {"data": make_batches(1), "create_new_dir": None}
    make_trainer(tmp_path / "run", max_epochs=3, hooks=hooks(), **make).train()
    resumed = make_trainer(tmp_path / "run", max_epochs=6, hooks=hooks(), **make)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert resumed.progress.epoch == 5


class Scores:
    """An eval_func whose values are the given ones, one after the other; the first is of the trial too."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.num_seen = 0

    def __call__(self, model: Any, batch: Any) -> dict[str, list[float]]:
        self.num_seen += 1
        return {"acc": [self.values[self.num_seen - 1]]}


def by_iterations(tmp_path: Path, values: list[float], *, is_first: bool = False, **settings: Any) -> Trainer:
    evaluation = EvalHook([0], Scores(values), period=2, period_unit="iter", progress_bar=False)
    stopping = EarlyStoppingHook("eval_acc", patience=2)
    hooks = [stopping, evaluation] if is_first else [evaluation, stopping]
    trainer = make_trainer(
        tmp_path / "run", data=make_batches(8), max_epochs=4, hooks=[*hooks, CheckpointerHook()], **settings
    )
    trainer.train()
    return trainer


def test_each_evaluation_by_iterations_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="torch_frame"):
        trainer = by_iterations(tmp_path, [0.1, 0.2, 0.9, 0.3, 0.9, 1.0])  # the third is the best, inside an epoch
    assert trainer.progress.iter == 10
    assert "has not been better than 0.9 for 2 evaluations" in caplog.text
    resumed = by_iterations(tmp_path, [1.0] * 20, create_new_dir=None, resume="auto")
    assert resumed.progress.iter == 10


@pytest.mark.parametrize("unit", ["epoch", "iter"])
def test_nothing_is_called_in_steps_if_there_is_nothing_to_see(unit: Any, tmp_path: Path) -> None:
    evaluation = EvalHook([0], Scores([0.5] * 9), period_unit=unit, progress_bar=False)
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[evaluation, EarlyStoppingHook("eval_acc")])
    trainer.train()
    assert len(trainer.stages["after_iter"]) == {"epoch": 0, "iter": 2}[unit]


def test_one_that_is_registered_before_the_evaluation_sees_it_a_batch_later(tmp_path: Path) -> None:
    assert by_iterations(tmp_path, [0.1, 0.2, 0.9, 0.3, 0.9, 1.0], is_first=True).progress.iter == 11


def test_evaluations_by_iterations_count_over_epochs_and_a_resume(tmp_path: Path) -> None:
    values = [0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8, 0.8, 0.9]
    assert by_iterations(tmp_path / "whole", values).progress.iter == 18
    evaluation = EvalHook([0], Scores(values), period=2, period_unit="iter", progress_bar=False)
    hooks = [evaluation, EarlyStoppingHook("eval_acc", patience=2), CheckpointerHook()]
    make_trainer(tmp_path / "run", data=make_batches(8), max_epochs=2, hooks=hooks).train()
    resumed = by_iterations(tmp_path, values[8:], create_new_dir=None, resume="auto")
    assert resumed.progress.iter == 18
