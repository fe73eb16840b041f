"""Which files a run keeps, what is in them, and that they follow the right value."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_data import wait_until
from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, CheckpointError, EvalHook, HistoryBuffer, HookBase, SettingError, Trainer


class Snapshots(HookBase):
    """The weights after each epoch, and a metric's values given in advance."""

    def __init__(self, scores: list[float] | None = None) -> None:
        self.scores = scores
        self.weights: list[dict[str, Any]] = []

    def after_epoch(self) -> None:
        self.weights.append(weights_of(self.trainer.model_evaluate))
        if self.scores is not None:
            self.log(self.trainer.epoch, score=self.scores[self.trainer.epoch], smooth=False, window_size=1)


def files_of(trainer: Trainer) -> set[str]:
    return set(os.listdir(trainer.ckpt_dir))


def load(trainer: Trainer, name: str) -> Any:
    return torch.load(os.path.join(trainer.ckpt_dir, name), weights_only=True)


def train(work_dir: Path, *hooks: HookBase, epochs: int = 4, **kwargs: Any) -> Trainer:
    trainer = make_trainer(work_dir, max_epochs=epochs, hooks=hooks, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_files_hold_what_is_documented(use_ema: bool, tmp_path: Path) -> None:
    snapshots = Snapshots()
    trainer = train(tmp_path, snapshots, CheckpointerHook(max_to_keep=2), use_ema=use_ema)
    assert files_of(trainer) == {"latest.pth", "previous.pth", "best.pth", "epoch_2.pth", "epoch_3.pth"}
    for name, epoch in {"best.pth": 3, "epoch_2.pth": 2, "epoch_3.pth": 3}.items():
        assert differences(snapshots.weights[epoch], dict(load(trainer, name))) == []
    assert load(trainer, "latest.pth")["progress"]["epoch"] == 4
    assert load(trainer, "previous.pth")["progress"]["epoch"] == 3


def test_weights_load_into_the_bare_model(tmp_path: Path) -> None:
    trainer = train(tmp_path, CheckpointerHook())
    Net(seed=1).load_state_dict(load(trainer, "best.pth"), strict=True)


@pytest.mark.parametrize(
    ("epochs", "period", "saved"), [(1, 1, [0]), (4, 1, [0, 1, 2, 3]), (5, 2, [1, 3, 4]), (2, 5, [1]), (3, 3, [2])]
)
def test_saves_every_period_and_after_the_last_epoch(
    epochs: int, period: int, saved: list[int], tmp_path: Path
) -> None:
    trainer = train(tmp_path, CheckpointerHook(period, max_to_keep=9), epochs=epochs)
    assert files_of(trainer) - {"latest.pth", "previous.pth", "best.pth"} == {f"epoch_{n}.pth" for n in saved}
    assert load(trainer, "latest.pth")["progress"]["epoch"] == epochs
    if len(saved) > 1:
        assert load(trainer, "previous.pth")["progress"]["epoch"] == saved[-2] + 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_epochs_are_kept(keep: int, tmp_path: Path) -> None:
    trainer = train(tmp_path, CheckpointerHook(max_to_keep=keep))
    kept = {name for name in files_of(trainer) if name.startswith("epoch_")}
    assert kept == {f"epoch_{n}.pth" for n in range(4 - keep, 4)}


def test_save_last_false_writes_no_state(tmp_path: Path) -> None:
    assert files_of(train(tmp_path, CheckpointerHook(save_last=False))) == {"best.pth"}


@pytest.mark.parametrize(
    ("scores", "max_first", "best"),
    [
        ([0.1, 0.9, 0.5, 0.2], True, 1),
        ([0.1, 0.9, 0.5, 0.05], False, 3),
        ([0.5, 0.5, 0.5, 0.5], True, 0),
        ([math.nan, 0.3, math.nan, 0.2], True, 1),
        ([math.nan, 0.3, math.nan, 0.2], False, 3),
        ([-3.0, -1.0, -2.0, -5.0], True, 1),
        ([math.inf, 0.3, 2.0, 0.2], True, 0),
    ],
)
def test_best_follows_a_metric(scores: list[float], max_first: bool, best: int, tmp_path: Path) -> None:
    snapshots = Snapshots(scores)
    trainer = train(tmp_path, snapshots, CheckpointerHook(save_metric="score", max_first=max_first))
    assert differences(snapshots.weights[best], dict(load(trainer, "best.pth"))) == []
    assert load(trainer, "latest.pth")["progress"]["epoch"] == 4


def test_no_best_is_written_where_the_metric_was_never_a_number(tmp_path: Path) -> None:
    trainer = train(tmp_path, Snapshots([math.nan] * 4), CheckpointerHook(save_metric="score"))
    assert files_of(trainer) == {"latest.pth", "previous.pth"}


def test_a_metric_that_is_nan_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, scoring("acc", [math.nan, 0.5, math.nan]), epochs=3)
    told = [line for line in caplog.messages if "is NaN, which is never the best" in line]
    assert len(told) == 1
    assert "acc" in told[0]


@pytest.mark.parametrize("own", [False, True])
def test_a_best_value_whose_file_is_gone_begins_anew(
    own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only latest.pth was copied to another machine, say. A hook that saves under names of its own is left alone."""

    class Own(CheckpointerHook):
        def save_model(self) -> None:
            if self._is_new_best():
                self.trainer.save_at_safe_point("mine.pth")

    def run(epochs: int, scores: list[float]) -> CheckpointerHook:
        hook = Own(save_metric="score") if own else CheckpointerHook(save_metric="score")
        state = CheckpointerHook()
        train(tmp_path, Snapshots(scores), hook, state, epochs=epochs, create_new_dir=None, resume="auto")
        return hook

    run(1, [0.9])
    assert run(2, [0.9, 0.5]).cur_best == 0.9
    (tmp_path / "checkpoints" / ("mine.pth" if own else "best.pth")).unlink()
    assert run(3, [0.9, 0.5, 0.7]).cur_best == (0.9 if own else 0.7)
    told = [line for line in caplog.messages if "the best value begins anew" in line]
    assert len(told) == (0 if own else 1)
    assert own or (tmp_path / "checkpoints" / "best.pth").exists()


def test_best_follows_a_training_loss(tmp_path: Path) -> None:
    rows: list[float] = []
    look = On(after_epoch=lambda trainer: rows.append(trainer.value("total_loss")))
    snapshots = Snapshots()
    hook = CheckpointerHook(save_metric="total_loss", max_first=False)
    trainer = train(tmp_path, look, snapshots, hook)
    best = rows.index(min(rows))
    assert differences(snapshots.weights[best], dict(load(trainer, "best.pth"))) == []
    assert hook.cur_best == pytest.approx(min(rows))


def test_with_a_metric_only_the_best_epochs_are_kept(tmp_path: Path) -> None:
    snapshots = Snapshots([0.1, 0.2, 0.15, 0.3])
    trainer = train(tmp_path, snapshots, CheckpointerHook(max_to_keep=2, save_metric="score"))
    assert {name for name in files_of(trainer) if name.startswith("epoch_")} == {"epoch_1.pth", "epoch_3.pth"}


@pytest.mark.parametrize("checkpointer_first", [False, True])
def test_a_plain_checkpointer_leaves_best_to_the_hook_with_a_metric(checkpointer_first: bool, tmp_path: Path) -> None:
    snapshots = Snapshots()
    scores = [0.1, 0.9, 0.5, 0.2]
    evaluation = EvalHook([0], lambda model, batch: {"acc": [scores[evaluation.trainer.epoch]]}, save_metric="acc")
    hooks = [CheckpointerHook(), evaluation] if checkpointer_first else [evaluation, CheckpointerHook()]
    trainer = train(tmp_path, snapshots, *hooks)
    assert differences(snapshots.weights[1], dict(load(trainer, "best.pth"))) == []
    assert isinstance(evaluation, CheckpointerHook)
    assert evaluation.save_metric == "eval_acc"


def test_a_state_is_complete_whatever_the_order_of_hooks(tmp_path: Path) -> None:
    evaluation = EvalHook([0], lambda model, batch: {"acc": [0.5]}, save_metric="acc", save_last=False)
    trainer = train(tmp_path, CheckpointerHook(), evaluation)
    state = load(trainer, "latest.pth")
    assert state["metric_storage"]["eval_acc"]["latest_iter"] == 3
    assert any(hook.get("cur_best") == 0.5 for hook in state["hooks"].values())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_the_best_so_far_and_the_kept_files_resume(stop: int, tmp_path: Path) -> None:
    scores = [0.5, 0.9, 0.1, 0.6, 0.8]
    snapshots = [Snapshots(scores), Snapshots(scores)]
    train(tmp_path / "run", snapshots[0], CheckpointerHook(max_to_keep=2, save_metric="score"), epochs=stop)
    hook = CheckpointerHook(max_to_keep=2, save_metric="score")
    trainer = make_trainer(tmp_path / "run", Net(seed=3), max_epochs=5, hooks=[snapshots[1], hook])
    trainer.load_checkpoint("latest.pth")
    trainer.train()
    weights = snapshots[0].weights + snapshots[1].weights
    assert differences(weights[1], dict(load(trainer, "best.pth"))) == []
    assert hook.cur_best == 0.9
    assert files_of(trainer) == {"latest.pth", "previous.pth", "best.pth", "epoch_0.pth", "epoch_1.pth"}


def test_rotation_goes_on_after_a_resume_in_a_moved_folder(tmp_path: Path) -> None:
    train(tmp_path / "run", CheckpointerHook(max_to_keep=2), epochs=2)
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = make_trainer(tmp_path / "run", max_epochs=4, hooks=[CheckpointerHook(max_to_keep=2)])
    trainer.load_checkpoint(tmp_path / "moved" / "checkpoints" / "latest.pth")
    trainer.train()
    assert {name for name in files_of(trainer) if name.startswith("epoch_")} == {"epoch_2.pth", "epoch_3.pth"}


def test_a_metric_that_nobody_logs_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"eval_acc.*total_loss"):
        train(tmp_path, CheckpointerHook(save_metric="eval_acc"))


# ---------------------------------------------------------------- several hooks that follow a metric


def scoring(name: str, scores: list[float], **settings: Any) -> EvalHook:
    hook = EvalHook(
        [0], lambda model, batch: {name: [scores[hook.trainer.epoch]]}, save_metric=name, save_last=False, **settings
    )
    return hook


SCORES = {"acc": [0.1, 0.9, 0.5, 0.6], "nll": [3.0, 2.5, 1.0, 2.0], "score": [0.9, 0.1, 0.1, 0.1]}  # best in 1, 2, 0
ACC = lambda: scoring("acc", SCORES["acc"])  # noqa: E731
NLL = lambda: scoring("nll", SCORES["nll"], max_first=False, prefix="test")  # noqa: E731
SCORE = lambda: CheckpointerHook(save_metric="score", save_last=False)  # noqa: E731


class Extends(EvalHook):
    """Does more when it saves, as 1.7's scripts do."""

    def save_model(self) -> None:
        super().save_model()


class Decorated(EvalHook):
    """The same under a decorator, as 1.7's own methods have one."""

    @torch.no_grad()
    def save_model(self) -> None:
        super().save_model()


class Replaces(EvalHook):
    """Saves in its own way."""

    def save_model(self) -> None:
        self.saved = True


def extending(kind: type[EvalHook]) -> EvalHook:
    hook = kind([0], lambda m, b: {"acc": [SCORES["acc"][hook.trainer.epoch]]}, save_metric="acc", save_last=False)
    return hook


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ([ACC, NLL], {"best.pth": 1, "best_test_nll.pth": 2}),
        ([NLL, ACC], {"best.pth": 2, "best_eval_acc.pth": 1}),
        ([SCORE, ACC], {"best.pth": 1, "best_score.pth": 0}),
        ([SCORE, lambda: Snapshots()], {"best.pth": 0}),
        ([CheckpointerHook, NLL, SCORE], {"best.pth": 2, "best_score.pth": 0}),
        ([lambda: extending(Extends), SCORE], {"best.pth": 1, "best_score.pth": 0}),
        ([lambda: extending(Extends), CheckpointerHook], {"best.pth": 1}),
        ([lambda: extending(Decorated), CheckpointerHook], {"best.pth": 1}),
        ([lambda: extending(Replaces), SCORE], {"best.pth": 0}),
        ([lambda: extending(Replaces), CheckpointerHook], {"best.pth": 3}),
        ([lambda: extending(Replaces)], {}),
        ([SCORE] * 3, {"best.pth": 0, "best_score.pth": 0, "best_score_2.pth": 0}),
    ],
)
def test_each_hook_that_follows_a_metric_has_a_file_of_its_own(
    make: list[Any], expected: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = Snapshots(SCORES["score"])
    trainer = train(tmp_path, snapshots, *(one() for one in make))
    assert {name for name in files_of(trainer) if name.startswith("best")} == set(expected)
    for name, epoch in expected.items():
        assert differences(snapshots.weights[epoch], dict(load(trainer, name))) == []
    told = [line for line in caplog.messages if "Several hooks follow" in line]
    assert len(told) == (len(expected) > 1)
    assert all(name in line for line in told for name in expected)


def test_best_stays_the_file_of_its_hook_when_the_run_is_resumed(tmp_path: Path) -> None:
    train(tmp_path / "run", CheckpointerHook(), ACC(), NLL(), epochs=2)
    hooks = [NLL(), ACC(), CheckpointerHook()]  # a script that was put in another order
    snapshots = Snapshots()
    trainer = train(tmp_path / "run", snapshots, *hooks, epochs=4, resume="auto")
    assert [hook.best_file for hook in hooks[:2]] == ["best_test_nll.pth", "best.pth"]  # type: ignore[attr-defined]
    assert differences(snapshots.weights[0], dict(load(trainer, "best_test_nll.pth"))) == []
    assert {name for name in files_of(trainer) if name.startswith("best")} == {"best.pth", "best_test_nll.pth"}


def test_a_metrics_name_that_is_no_file_name_is_made_one(tmp_path: Path) -> None:
    class Logs(HookBase):
        def after_epoch(self) -> None:
            self.log(self.trainer.epoch, **{"acc/top 1": 1.0}, smooth=False)

    trainer = train(tmp_path, Logs(), Snapshots([1.0] * 4), SCORE(), CheckpointerHook(save_metric="acc/top 1"))
    assert {name for name in files_of(trainer) if name.startswith("best")} == {"best.pth", "best_acc_top_1.pth"}


def test_a_file_that_two_hooks_keep_goes_when_neither_keeps_it(tmp_path: Path) -> None:
    hooks = [CheckpointerHook(max_to_keep=1), CheckpointerHook(period=2, max_to_keep=2, save_last=False)]
    kept: list[set[str]] = []
    look = On(before_epoch=lambda trainer: kept.append({n for n in os.listdir(trainer.ckpt_dir) if "epoch" in n}))
    wait = On(before_epoch=lambda trainer: trainer.wait_for_saves())
    trainer = train(tmp_path, wait, look, *hooks, epochs=7)
    of = lambda *epochs: {f"epoch_{n}.pth" for n in epochs}  # noqa: E731
    assert kept == [of(), of(0), of(1), of(1, 2), of(1, 3), of(1, 3, 4), of(3, 5)]
    assert {name for name in files_of(trainer) if "epoch" in name} == of(5, 6)


def test_the_default_hook_saves_every_30_minutes_too(tmp_path: Path) -> None:
    hook = make_trainer(tmp_path, hooks=None).hooks[0]
    assert isinstance(hook, CheckpointerHook)
    assert hook._every_n_seconds == 1800
    assert not hook.idle_stages


@pytest.mark.parametrize(
    "bad", [{"period": None}, {"period": True}, {"period": 1.5}, {"max_to_keep": 0}, {"max_to_keep": -2}]
)
def test_a_bad_setting_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        CheckpointerHook(**bad)


@pytest.mark.parametrize("max_first", [True, False])
def test_is_better_takes_a_number_or_a_history(max_first: bool) -> None:
    hook = CheckpointerHook(save_metric="a", max_first=max_first)
    hook.cur_best = 1.0
    history = HistoryBuffer()
    history.update(2.0)
    history.update(4.0)
    assert hook.is_better(history) is max_first
    assert hook.is_better(0.5) is not max_first
    assert not hook.is_better(1.0)
    assert not hook.is_better(math.nan)


def test_the_positional_arguments_are_those_of_1_7() -> None:
    hook = CheckpointerHook(2, 3, "acc", False, False)
    assert (hook._period, hook._max_to_keep, hook.save_metric, hook.max_first, hook.save_last) == (
        2,
        3,
        "acc",
        False,
        False,
    )
    assert hook._recent_checkpoints == []
    assert hook.cur_best == math.inf


def test_a_subclass_may_override_save_model(tmp_path: Path) -> None:
    class Own(CheckpointerHook):
        def save_model(self) -> None:
            if self.is_better(self.metric_storage["total_loss"]):
                self.trainer.save_checkpoint(f"mine_{self.trainer.epoch}.pth")

    trainer = train(tmp_path, Own(), epochs=2)
    assert files_of(trainer) == {"mine_0.pth", "mine_1.pth"}


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    train(tmp_path / "run", CheckpointerHook(max_to_keep=1))
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


def test_a_loader_without_length_is_saved_each_epoch(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(make_batches(2))

    trainer = train(tmp_path, CheckpointerHook(), data=Stream(), epochs=2)
    assert load(trainer, "latest.pth")["progress"]["epoch"] == 2


# ---------------------------------------------------------------- inside epochs


class SavedAt(HookBase):
    """The iterations at which latest.pth has become a new file, as seen by the next batch."""

    def __init__(self) -> None:
        self.iters: list[int] = []

    def before_iter(self) -> None:
        self.trainer.wait_for_saves()
        path = os.path.join(self.trainer.ckpt_dir, "latest.pth")
        if os.path.exists(path):
            done = load(self.trainer, "latest.pth")["progress"]["iter"]
            if done not in self.iters:
                self.iters.append(done)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [3, 5, 6, 9]), (2, [4, 5, 7, 9])])
def test_every_n_iters_saves_at_the_next_safe_point(accumulate: int, expected: list[int], tmp_path: Path) -> None:
    saved = SavedAt()
    train(
        tmp_path,
        CheckpointerHook(every_n_iters=3),
        saved,
        epochs=2,
        gradient_accumulation_steps=accumulate,
    )
    assert saved.iters == expected, "after 3, 6 and 9 batches or where that window ends, and at the epoch's end (5)"


def test_every_n_minutes_saves_when_the_time_has_come(tmp_path: Path) -> None:
    def step(model: Any, batch: Any) -> Any:
        time.sleep(0.02)
        return model(batch)

    saved, started = SavedAt(), time.monotonic()
    train(
        tmp_path,
        CheckpointerHook(period=9, every_n_minutes=0.05 / 60),
        saved,
        epochs=2,
        data=make_batches(10),
        step_fn=step,
    )
    assert 3 <= len(saved.iters) <= (time.monotonic() - started) / 0.05, "at most one in each interval that has passed"


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_iters": 0},
        {"every_n_iters": 2.5},
        {"every_n_minutes": -1},
        {"every_n_iters": 5, "save_last": False},
    ],
)
def test_wrong_intervals_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="every_n_"):
        CheckpointerHook(**settings)


def test_policies_of_several_hooks_stand_beside_each_other(tmp_path: Path) -> None:
    """The best by one metric, the last two, every third epoch for ever: none of them knows of the others."""

    class Every(CheckpointerHook):
        def save_model(self) -> None:
            self.trainer.save_at_safe_point(f"kept_{self.trainer.epoch}.pth")

    trainer = train(
        tmp_path,
        Snapshots([0.1, 0.9, 0.3, 0.4, 0.5, 0.2]),
        CheckpointerHook(save_metric="score"),
        CheckpointerHook(max_to_keep=2, every_n_iters=2),
        Every(period=3),
        epochs=6,
    )
    assert files_of(trainer) == {
        *("latest.pth", "previous.pth", "best.pth"),
        *("epoch_4.pth", "epoch_5.pth"),
        *("kept_2.pth", "kept_5.pth"),
    }


def test_a_failed_save_is_told_at_the_next_safe_point_and_nothing_old_is_removed(tmp_path: Path) -> None:
    class Break(HookBase):
        """From the third epoch on the folder has something in the way of epoch_N.pth."""

        def before_epoch(self) -> None:
            if self.trainer.epoch == 2:
                self.trainer.wait_for_saves()
                os.mkdir(os.path.join(self.trainer.ckpt_dir, "epoch_2.pth"))

    def step(model: Any, batch: Any) -> Any:
        assert wait_until(lambda: all(thread.name != "torch_frame.checkpoint" for thread in threading.enumerate()))
        return model(batch)

    hooks = [CheckpointerHook(max_to_keep=1), Break()]
    trainer = make_trainer(tmp_path, max_epochs=9, hooks=hooks, step_fn=step)
    with pytest.raises(CheckpointError, match=r"epoch_2\.pth could not be written"):
        trainer.train()
    assert trainer.progress.iter in (15, 16), "at the next safe point, before the next batch or after it"
    assert "epoch_1.pth" in files_of(trainer)
    assert load(trainer, "latest.pth")["progress"]["epoch"] == 2
    assert not [name for name in files_of(trainer) if name.endswith(".tmp")]


def test_a_score_of_an_earlier_epoch_makes_no_other_weights_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [0.5, 0.9, 0.2, 0.3, 0.95, 0.1]

    def best(name: str, *, is_first: bool = False, period: int = 1, evaluation: int = 1) -> int | None:
        caplog.clear()
        score = lambda model, batch: {"acc": [scores[trainer.epoch]]}  # noqa: E731
        hooks: list[Any] = [EvalHook([0], score, period=evaluation, progress_bar=False, save_last=False)]
        hooks.insert(0 if is_first else 1, CheckpointerHook(period, save_metric="eval_acc", save_last=False))
        snapshots = Snapshots()
        trainer = make_trainer(tmp_path / name, max_epochs=6, hooks=[snapshots, *hooks])
        trainer.train()
        if "best.pth" not in files_of(trainer):
            return None
        weights = load(trainer, "best.pth")
        return next(epoch for epoch in range(6) if not differences(snapshots.weights[epoch], dict(weights)))

    told = "whose value is of earlier weights"
    assert (best("behind"), told in caplog.text) == (4, False)
    assert (best("rare", evaluation=2), told in caplog.text) == (1, False)
    assert (best("before", is_first=True), caplog.text.count(told)) == (None, 1)
    assert (best("another rhythm", period=3, evaluation=2), caplog.text.count(told)) == (5, 1)


@pytest.mark.parametrize(("period", "best", "num_told"), [(2, 1, 1), (5, 0, 0)])
def test_nor_does_a_score_of_an_earlier_batch(
    period: int, best: int, num_told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Epochs of 5 batches: every second batch is evaluated (the tenth, and the last one, end an epoch), or each epoch's last."""
    scores = {2: 0.9, 4: 0.8, 6: 0.7, 8: 0.6, 5: 0.95, 10: 0.5}
    hook = EvalHook(
        [0], lambda m, b: {"acc": [scores[trainer.progress.iter]]}, period, period_unit="iter", progress_bar=False
    )
    snapshots, saver = Snapshots(), CheckpointerHook(save_metric="eval_acc", save_last=False)
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=[snapshots, hook, saver])
    trainer.train()
    assert differences(snapshots.weights[best], dict(load(trainer, "best.pth"))) == []
    assert saver.cur_best == scores[5 * (best + 1)]
    assert caplog.text.count("whose value is of earlier weights") == num_told
