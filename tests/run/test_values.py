"""One meaning of a value: best, early stopping and the plateau go by it, and so does a resumed run."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, make_trainer, raised_by
from torch_frame import (
    CheckpointerHook,
    EarlyStoppingHook,
    EvalHook,
    EvalTotalHook,
    HistoryBuffer,
    HookBase,
    LoggerHook,
    MetricStorage,
    SettingError,
    Trainer,
)

SCORES = [0.10, 0.50, 0.45, 0.44, 0.43]
NUMBERS = [float(n * n % 17) for n in range(30)]


class Numbers(nn.Module):
    """Its loss in the n-th step is NUMBERS[n]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Any) -> Any:
        value = NUMBERS[int(self.n)]
        self.n += 1
        return self.weight * 0 + value, {"twice": 2 * value}


def numbers_trainer(work_dir: Path, *hooks: HookBase, epochs: int = 3, batches: int = 10) -> Trainer:
    return make_trainer(work_dir, Numbers(), data=[0] * batches, max_epochs=epochs, hooks=hooks)


def log_score(smooth: bool, window: int | None) -> HookBase:
    return On(
        after_epoch=lambda trainer: trainer.log(
            trainer.epoch, score=SCORES[trainer.epoch], smooth=smooth, window_size=window
        )
    )


@pytest.mark.parametrize(
    ("smooth", "window", "expected"),
    [(False, None, 1), (False, 20, 1), (True, None, 1), (True, 1, 1), (True, 2, 2)],
    ids=["latest", "latest_in_a_window", "epoch", "window_of_1", "window_of_2"],
)
def test_all_that_decides_reads_the_same_value(smooth: bool, window: int | None, expected: int, tmp_path: Path) -> None:
    worth: list[float] = []
    decided: list[float] = []

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            decided.append(float(metrics))
            super().step(metrics, epoch)

    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    best, stop = CheckpointerHook(save_metric="score"), EarlyStoppingHook("score", patience=10)
    look = On(after_epoch=lambda trainer: worth.append(trainer.value("score")))
    trainer = make_trainer(
        tmp_path, model, optimizer, Plateau(optimizer, "max"), max_epochs=5, lr_scheduler_metric="score",
        hooks=[log_score(smooth, window), look, best, stop],
    )  # fmt: skip
    trainer.train()
    assert decided == worth
    assert best.cur_best == stop.best == max(worth)
    assert worth.index(max(worth)) == expected == stop.best_epoch


def test_a_steps_values_are_worth_their_epochs_mean(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    def look(trainer: Trainer) -> None:
        seen.append((trainer.value("total_loss"), trainer.value("twice")))

    numbers_trainer(tmp_path, On(before_epoch=lambda t: look(t) if t.epoch else None, after_epoch=look)).train()
    means = [sum(NUMBERS[i : i + 10]) / 10 for i in (0, 10, 20)]
    expected = [means[0], means[0], means[1], means[1], means[2]]  # before an epoch's first value the last one's counts
    assert [loss for loss, _ in seen] == pytest.approx(expected)
    assert [twice for _, twice in seen] == pytest.approx([2 * mean for mean in expected])


def test_inside_an_epoch_a_steps_value_is_the_mean_so_far(tmp_path: Path) -> None:
    seen: list[float] = []
    numbers_trainer(tmp_path, On(after_iter=lambda trainer: seen.append(trainer.value("total_loss"))), epochs=2).train()
    assert seen[:3] == pytest.approx([0.0, 0.5, 5 / 3])
    assert seen[10] == NUMBERS[10]


@pytest.mark.parametrize("at", [3, 9, 13])
def test_a_resumed_run_decides_by_the_same_values(at: int, tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.save_checkpoint("state.pth", save_single_model=False)
        raise InterruptedError

    def values_of(*hooks: HookBase, path: str | None = None) -> list[float]:
        seen: list[float] = []
        look = On(after_epoch=lambda trainer: seen.append(trainer.value("total_loss")))
        trainer = numbers_trainer(tmp_path / "run", look, *hooks)
        if path is not None:
            trainer.load_checkpoint(path)
        try:
            trainer.train()
        except InterruptedError:
            pass
        return seen

    first = numbers_trainer(tmp_path / "run", On(after_iter=at_iter(at, stop)))
    raised_by(first.train, InterruptedError)
    whole = values_of()
    assert values_of(path=str(Path(first.ckpt_dir, "state.pth"))) == whole[at // 10 :]


def test_a_name_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    trainer = numbers_trainer(tmp_path)
    trainer.train()
    with pytest.raises(SettingError, match=r"'nothing'.*total_loss, twice"):
        trainer.value("nothing")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.inf, -math.inf, 0.5], math.nan),
        ([1.5e308, 1.5e308, 1.5e308], 1.5e308),
        ([math.inf, 1.0], math.inf),
        ([], math.nan),
    ],
    ids=["both_infinities", "near_the_limit", "one_infinity", "none"],
)
def test_a_mean_never_raises(values: list[float], expected: float) -> None:
    buffer = HistoryBuffer(3)
    for value in values:
        buffer.update(value)
    assert buffer.avg == pytest.approx(expected, nan_ok=True)
    assert isinstance(buffer.global_avg, float)


def test_a_run_with_infinite_metrics_ends_well(tmp_path: Path) -> None:
    odd = iter([math.inf, -math.inf, 0.5] * 10)
    step = lambda model, batch: (model(batch), {"ratio": next(odd), "huge": 1.5e308})  # noqa: E731
    trainer = make_trainer(tmp_path, hooks=[LoggerHook(2)], step_fn=step)
    trainer.train()
    assert math.isnan(trainer.value("ratio"))


def test_an_epoch_after_infinite_values_has_its_own_mean() -> None:
    storage = MetricStorage()
    storage.record(0, {"loss": math.inf})
    storage.begin_epoch()
    storage.record(1, {"loss": 2.0})
    assert storage.value("loss") == 2.0


def test_a_state_without_epoch_sums_is_read() -> None:
    storage = MetricStorage()
    storage.update(0, loss=1.0)
    storage.update(1, loss=3.0)
    old = {"loss": {"window": [1.0, 3.0], "window_size": 20, "count": 2, "sum": 4.0, "smooth": True, "latest_iter": 1}}
    storage.load_state_dict(old)
    assert storage.value("loss") == 2.0
    storage.update(2, loss=5.0)
    assert storage.value("loss") == 5.0


class Direction(HookBase):
    """Logs scores of which it knows that lower is better."""

    def higher_is_better(self, name: str) -> bool | None:
        return False if name == "distance" else None

    def after_epoch(self) -> None:
        self.log(self.trainer.epoch, distance=1.0, smooth=False)


@pytest.mark.parametrize(
    "follower",
    [
        lambda: CheckpointerHook(save_metric="distance"),
        lambda: EarlyStoppingHook("distance"),
    ],
    ids=["best", "early_stopping"],
)
def test_a_direction_that_contradicts_the_metrics_own_is_refused(follower: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[Direction(), follower()])
    with pytest.raises(SettingError, match=r"'distance'.*max_first=False"):
        trainer.train()
    assert trainer.progress.iter == 0


def test_a_plateaus_direction_is_checked_too(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, "max")
    trainer = make_trainer(tmp_path, model, optimizer, plateau, lr_scheduler_metric="distance", hooks=[Direction()])
    with pytest.raises(SettingError, match=r"'distance'.*mode='min'"):
        trainer.train()
    assert trainer.progress.iter == 0


@pytest.mark.parametrize("names", [("val", "ood"), ("val", "val_ood"), ("val_ood", "val")])
def test_the_direction_is_found_for_any_names_of_the_loaders(names: tuple[str, str], tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    data = [torch.rand(4, 2)]
    metrics = {"dist": torchmetrics.MeanSquaredError(), "r2": torchmetrics.R2Score()}
    for name in names:
        hook = EvalTotalHook(
            dict.fromkeys(names, data), metrics, save_metric=f"{name}_dist", inputs=lambda m, x: (x[:, 0], x[:, 1])
        )
        with pytest.raises(SettingError, match="lower is better"):
            make_trainer(tmp_path, hooks=[hook]).train()


class Empty:
    """Has no batch, and no length that would say so."""

    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize("loader", [[], Empty()], ids=["list", "without_length"])
@pytest.mark.parametrize("save_metric", [None, "a"])
def test_an_evaluation_without_a_batch_is_told_before_the_first_step(
    loader: Any, save_metric: str | None, tmp_path: Path
) -> None:
    hook = EvalHook(loader, lambda m, b: {"a": [1.0]}, save_metric=save_metric)
    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook(), hook])
    with pytest.raises(SettingError, match="empty"):
        trainer.train()
    assert trainer.progress.iter == 0


def test_two_evaluations_of_one_name_are_told_before_the_first_step(tmp_path: Path) -> None:
    def make(prefixes: tuple[str, str], names: tuple[str, str]) -> Trainer:
        hooks = [
            EvalHook([0], lambda m, b, name=name: {name: [1.0]}, prefix=prefix)
            for prefix, name in zip(prefixes, names, strict=True)
        ]
        return make_trainer(tmp_path / "run", hooks=hooks, create_new_dir="count")

    for prefixes, names in ((("eval", "eval"), ("a", "a")), (("val", "val_x"), ("x_a", "a"))):
        trainer = make(prefixes, names)
        with pytest.raises(SettingError, match="Two evaluations yield"):
            trainer.train()
        assert trainer.progress.iter == 0
        with pytest.raises(SettingError, match="Two evaluations yield"):
            make(prefixes, names).evaluate()
    make(("eval", "eval"), ("a", "b")).train()


def test_early_stopping_counts_evaluations_and_says_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = [EvalHook([0], lambda m, b: {"acc": [0.5]}, period=3), EarlyStoppingHook("eval_acc", patience=2)]
    trainer = make_trainer(tmp_path, max_epochs=20, hooks=hooks)
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer.train()
    assert trainer.progress.epoch == 9
    assert "eval_acc has not been better than 0.5 for 2 evaluations, 6 epochs." in caplog.text


def test_best_and_patience_continue_when_a_run_is_resumed(tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.4, 0.6, 0.7, 0.3]

    def train(epochs: int) -> tuple[CheckpointerHook, EarlyStoppingHook]:
        hooks = (CheckpointerHook(save_metric="score"), EarlyStoppingHook("score", 3))
        log = On(after_epoch=lambda trainer: trainer.log(trainer.epoch, score=scores[trainer.epoch], smooth=False))
        make_trainer(tmp_path / "run", hooks=[log, *hooks], max_epochs=epochs, resume="auto").train()
        return hooks

    train(3)
    best, stop = train(6)
    assert (best.cur_best, stop.best, stop.best_epoch, stop.num_bad_epochs) == (0.7, 0.7, 4, 1)


def test_a_skipped_nan_is_no_best_and_ends_no_run(tmp_path: Path) -> None:
    num_steps = iter(range(100))
    step = lambda model, batch: model(batch) * (math.nan if next(num_steps) == 1 else 1.0)  # noqa: E731
    best = CheckpointerHook(save_metric="total_loss", max_first=False)
    trainer = make_trainer(tmp_path, hooks=[best], step_fn=step, on_nonfinite="skip")
    trainer.train()
    assert best.cur_best == trainer.value("total_loss")


def test_a_copied_storage_has_the_epochs_means(tmp_path: Path) -> None:
    trainer = numbers_trainer(tmp_path)
    trainer.train()
    copied = pickle.loads(pickle.dumps(trainer.metric_storage))
    assert copied.value("total_loss") == trainer.value("total_loss")
