"""One batch is evaluated before the first step if the names of the scores are wanted: cheap, and without a trace."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import outcomes
from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, EvalHook, EvalTotalHook, HookBase, LoggerHook, SettingError, Trainer
from torch_frame.hooks.evaluate import EvaluationHook
from torch_frame.metrics import BaseMetric, MeanAveragePrecision, ObjDetMAPMetric

QUIET = {"progress_bar": False}


def logger() -> LoggerHook:
    return LoggerHook(progress_bar=False)


class Counted:
    """An eval_func that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Any) -> dict[str, list[float]]:
        self.calls += 1
        return {"zoom": [1.0], "acc": [0.5]}


class Mean(BaseMetric):
    """1.7's kind of metric: never forgets, for it has no reset."""

    def __init__(self) -> None:
        self.values: list[list[float]] = [[]]

    def update(self, model: Any, batch: Any) -> None:
        self.values[0].append(1.0)

    def evaluate(self) -> dict[str, float]:
        return {"count": len(self.values[0])}


class LateScore(HookBase):
    """Logs a score now and then, and says so."""

    def __init__(self, *, says: bool) -> None:
        self.says = says

    def logged_metrics(self) -> set[str] | None:
        return {"score"} if self.says else None

    def after_epoch(self) -> None:
        if self.every_n_epochs(3):
            self.log(self.trainer.epoch, score=0.5, smooth=False)


METRIC = MeanAveragePrecision(["cat"], max_dets=(100,), area_ranges={"all": (0.0, 1e10)})


def mean_average_precision() -> EvalTotalHook:
    truth = [{"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([0])}]
    found = [truth[0] | {"scores": torch.tensor([0.5])}]
    return EvalTotalHook([0], copy.deepcopy(METRIC), period=3, inputs=lambda model, batch: ([0], found, truth), **QUIET)


LATE: dict[str, Callable[[], list[HookBase]]] = {
    "an evaluation": lambda: [EvalHook(make_batches(1), Counted(), period=3, **QUIET)],
    "only at the end": lambda: [EvalHook(make_batches(1), Counted(), period=0, **QUIET)],
    "two, of two periods": lambda: [
        EvalHook(make_batches(1), Counted(), period=2, prefix="val", **QUIET),
        EvalHook(make_batches(1), Counted(), period=3, prefix="ood", **QUIET),
    ],
    "one of each epoch and one of each third": lambda: [
        EvalHook(make_batches(1), Counted(), prefix="a", **QUIET),
        EvalHook(make_batches(1), Counted(), period=3, prefix="bb", **QUIET),
    ],
    "of the best": lambda: [EvalHook(make_batches(1), Counted(), period=3, save_metric="zoom", **QUIET)],
    "a metric of 1.7": lambda: [EvalTotalHook(make_batches(1), Mean(), period=3, **QUIET)],
    "two loaders": lambda: [EvalTotalHook({"x": make_batches(1), "y": make_batches(1)}, Mean(), period=3, **QUIET)],
    "of a detector": lambda: [mean_average_precision()],
    "counted in batches": lambda: [EvalHook(make_batches(1), Counted(), 13, period_unit="iter", **QUIET)],
    "a hook that says what it logs": lambda: [LateScore(says=True)],
    "a hook whose score is followed": lambda: [LateScore(says=False), CheckpointerHook(save_metric="score")],
}


def is_of_each_epoch(name: str) -> bool:
    return name == "total_loss" or name.startswith("a_")


def lines_of(trainer: Trainer, *words: str) -> list[str]:
    lines = [line.partition("]: ")[2] for line in Path(trainer.log_file).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.startswith(words)]


@pytest.mark.parametrize("kind", LATE)
def test_a_late_score_has_its_column_from_the_first_line_on(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=7, hooks=[*LATE[kind](), logger()])
    trainer.train(5, 2)
    header, *lines = lines_of(trainer, "Epoch ")
    values = {name for name in trainer.metric_storage if name not in ("lr", "iter_time", "data_time")}
    assert set(header.split()) == {"Epoch", *values, "lr", "batches/s", "time", "ETA"}
    assert len(lines) == 7, "no further header"
    late = [name for name in values if not is_of_each_epoch(name)]
    ends = {name: header.index(name) + len(name) for name in late}
    assert late
    assert [line[ends[late[0]] - 6 : ends[late[0]]].strip() for line in lines[:1]] == [""], "blank"


def test_columns_keep_their_order_when_the_values_come(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=7, hooks=[*LATE["two, of two periods"](), logger()])
    trainer.train(5, 2)
    header = lines_of(trainer, "Epoch ")[0].split()
    assert header[1:6] == ["total_loss", "ood_zoom", "ood_acc", "val_zoom", "val_acc"]


def test_an_evaluation_of_each_epoch_is_not_tried(tmp_path: Path) -> None:
    counted = Counted()
    make_trainer(tmp_path, max_epochs=3, hooks=[EvalHook([0, 0], counted, **QUIET), logger()]).train(5, 2)
    assert counted.calls == 6


def test_without_a_table_a_late_evaluation_is_not_tried(tmp_path: Path) -> None:
    counted = Counted()
    make_trainer(tmp_path, max_epochs=3, hooks=[EvalHook([0, 0], counted, 3, **QUIET)]).train(5, 2)
    assert counted.calls == 2


def test_a_late_evaluation_is_tried_on_one_batch(tmp_path: Path) -> None:
    counted = Counted()
    make_trainer(tmp_path, max_epochs=3, hooks=[EvalHook([0, 0], counted, 3, **QUIET), logger()]).train(5, 2)
    assert counted.calls == 3


def test_metrics_that_know_their_names_need_no_batch(tmp_path: Path) -> None:
    class Old(ObjDetMAPMetric):
        def update(self, model: Any, inputs: Any) -> None:
            raise AssertionError

    def inputs(model: Any, batch: Any) -> Any:
        raise AssertionError

    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    hooks = [mean_average_precision(), EvalTotalHook([0], Old({"cat": 0, "dog": 1}), 3, prefix="old", **QUIET)]
    hooks[0]._inputs = inputs
    trainer = make_trainer(tmp_path, max_epochs=3, hooks=[*hooks, logger(), On(before_iter=at_iter(7, stop))])
    raised_by(lambda: trainer.train(5, 2), InterruptedError)
    header = lines_of(trainer, "Epoch ")[0].split()
    assert header[2:11] == [f"eval_{name}" for name in METRIC.result_names()] + ["old_ap_cat", "old_ap_dog", "old_map"]


def test_the_names_that_a_metric_says_are_those_of_its_results(tmp_path: Path) -> None:
    hooks = [mean_average_precision(), EvalTotalHook([0], ObjDetMAPMetric({"cat": 0, "dog": 1}), prefix="old", **QUIET)]
    for hook in hooks:
        hook._update = lambda batch: None  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=hooks)
    trainer.train(5, 2)
    said = [name for hook in hooks for name in hook.names_known() or ()]
    assert said == [name for name in trainer.metric_storage if name.startswith(("eval_", "old_"))]


class Counting(Net):
    """Counts its passes in a buffer, in evaluations too, and the count is part of the loss."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def predict(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().predict(x) * (1 + 0.01 * self.count)


def error(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"error": (model.predict(batch[0]) - batch[1]).square().flatten()}


@pytest.mark.parametrize("save_metric", [None, "error"])
def test_a_model_that_an_evaluation_changes_resumes_bitwise(save_metric: str | None, tmp_path: Path) -> None:
    def trainer_of(folder: str, *hooks: HookBase) -> Trainer:
        evaluation = EvalHook(make_batches(2), error, 2, save_metric=save_metric, max_first=False, **QUIET)
        savers = [CheckpointerHook(every_n_iters=4), logger()]
        return make_trainer(tmp_path / folder, Counting(), max_epochs=4, hooks=[evaluation, *savers, *hooks])

    def stop(trainer: Trainer) -> None:
        raise InterruptedError

    whole = trainer_of("whole")
    whole.train(5, 2)
    raised_by(lambda: trainer_of("run", On(after_iter=at_iter(5, stop))).train(5, 2), InterruptedError)
    resumed = trainer_of("run")
    resumed.load_checkpoint("latest.pth")
    resumed.train(5, 2)
    assert whole.model.count == 4 * 5 + 2 * 2
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []


def test_training_is_the_same_with_a_trial_and_without(tmp_path: Path) -> None:
    """Both loaders draw from one generator, as torch's notes on reproducibility have it."""
    weights = []
    for folder, hooks in {"without": [], "with": [logger()]}.items():
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(*map(torch.cat, zip(*make_batches(6), strict=True)))
        train, held_out = (DataLoader(data, 4, shuffle=True, generator=generator) for _ in range(2))
        torch.manual_seed(1)
        evaluation = EvalHook(held_out, error, 2, **QUIET)
        trainer = make_trainer(
            tmp_path / folder,
            Net(dropout=True, norm=True),
            data=train,
            max_epochs=1,
            hooks=[evaluation, *hooks],
            take_over=False,
        )
        trainer.max_epochs = 3
        trainer.train(5, 2)
        weights.append(weights_of(trainer.model) | {"drawn": torch.rand(3), "next": generator.get_state()})
    assert differences(*weights) == []


def test_a_metric_that_cannot_forget_has_not_seen_the_trial(tmp_path: Path) -> None:
    for save_metric in (None, "count"):
        hook = EvalTotalHook(make_batches(4), Mean(), 2, save_metric=save_metric, **QUIET)
        trainer = make_trainer(tmp_path / str(save_metric), max_epochs=2, hooks=[hook, logger()])
        trainer.train(5, 2)
        assert trainer.metric_storage["eval_count"].latest == 4


class Remembers(BaseMetric):
    """Keeps a best value, a history and a counter over evaluations, which `reset` does not touch."""

    def __init__(self) -> None:
        self.best, self.history, self.by_name = 0.0, torch.zeros(()), {"evaluations": [defaultdict(int)]}
        self.scores: list[float] = []

    def reset(self) -> None:
        self.scores.clear()

    def update(self, model: Any, batch: Any) -> None:
        self.scores.append(float(batch))

    def evaluate(self) -> dict[str, float]:
        score = sum(self.scores) / len(self.scores)
        self.best = max(self.best, score)
        self.history += score
        self.by_name["evaluations"][0]["all"] += 1
        return {
            "score": score,
            "best": self.best,
            "sum": float(self.history),
            "num": self.by_name["evaluations"][0]["all"],
        }


class RemembersInAModule(nn.Module):
    """The same, in a buffer and in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Identity()
        self.inside.num, self.scores = 0, []
        self.register_buffer("best", torch.zeros(()))

    def reset(self) -> None:
        self.scores = []

    def update(self, batch: float) -> None:
        self.scores.append(batch)

    def compute(self) -> dict[str, Any]:
        score = sum(self.scores) / len(self.scores)
        self.best = torch.maximum(self.best, torch.tensor(score))
        self.inside.num += 1
        return {"score": score, "best": self.best, "num": self.inside.num}


@pytest.mark.parametrize("kind", [Remembers, RemembersInAModule])
def test_what_a_metric_keeps_over_evaluations_does_not_know_the_trial(kind: Any, tmp_path: Path) -> None:
    """The trial's batch has the best score: 9, where all data have 5."""
    metric = kind()
    scores = metric.scores
    inputs = None if kind is Remembers else lambda model, batch: batch
    hook = EvalTotalHook([9.0, 1.0], metric, save_metric="score", inputs=inputs, **QUIET)
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[hook])
    trainer.train(5, 2)
    found = {name: value.latest for name, value in trainer.metric_storage.items() if name.startswith("eval_")}
    assert found == {
        "eval_score": 5.0,
        "eval_best": 5.0,
        "eval_num": 1.0,
        **({"eval_sum": 5.0} if kind is Remembers else {}),
    }
    assert kind is not Remembers or metric.scores is scores


def test_torchmetrics_smallest_and_largest_value_do_not_know_the_trial(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())
    hook = EvalTotalHook([9.0, 1.0], metric, save_metric="raw", inputs=lambda model, batch: batch, **QUIET)
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[hook])
    trainer.train(5, 2)
    assert [trainer.metric_storage[f"eval_{name}"].latest for name in ("raw", "min", "max")] == [5.0, 5.0, 5.0]


def test_an_evaluation_that_needs_what_training_makes_is_told_and_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank: dict[str, float] = {}
    evaluation = EvalHook([0], lambda model, batch: {"acc": [bank["x"]]}, 2, prefix="knn", **QUIET)
    fills = On(before_epoch=lambda trainer: bank.update(x=0.5))
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=[evaluation, fills, logger()])
    trainer.train(5, 2)
    assert (
        "The evaluation EvalHook (knn) was tried on one batch before the first step and failed: KeyError" in caplog.text
    )
    assert trainer.metric_storage["knn_acc"].latest == 0.5


class Empty:
    """No batch, and no length that would say so."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("period", [1, 3])
def test_a_late_evaluation_without_a_batch_is_an_error_before_the_first_step(period: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=3, hooks=[EvalHook(Empty(), Counted(), period, **QUIET), logger()])
    with pytest.raises(SettingError, match="empty"):
        trainer.train(5, 2)
    assert trainer.progress.iter == 0


def test_a_metric_whose_trial_fails_starts_clean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def reset(self) -> None:
            self.seen = 0

        def update(self, value: int) -> None:
            self.seen += value
            if not begun:
                raise LookupError

        def compute(self) -> dict[str, int]:
            return {"seen": self.seen}

    begun: list[int] = []
    hook = EvalTotalHook([1, 2], Sums(), 2, inputs=lambda model, batch: batch, **QUIET)
    trainer = make_trainer(tmp_path, max_epochs=2, hooks=[hook, On(before_epoch=lambda t: begun.append(1)), logger()])
    trainer.train(5, 2)
    assert "LookupError" in caplog.text
    assert trainer.metric_storage["eval_seen"].latest == 3


def test_a_resumed_run_knows_its_columns_without_a_trial(tmp_path: Path) -> None:
    counted = Counted()

    def trainer_of(epochs: int) -> Trainer:
        hooks = [EvalHook([0], counted, 2, prefix=prefix, **QUIET) for prefix in ("val", "ood")]
        return make_trainer(tmp_path / "run", max_epochs=epochs, hooks=[*hooks, CheckpointerHook(), logger()])

    trainer_of(3).train(5, 2)  # tried, two evaluations each
    before = counted.calls
    resumed = trainer_of(5)
    resumed.load_checkpoint("latest.pth")
    resumed.train(5, 2)
    assert counted.calls == before + 2 * 2
    headers = {line.split("lr")[0] for line in lines_of(resumed, "Epoch  ")}
    assert len(headers) == 1
    assert headers.pop().split()[2:] == ["ood_zoom", "ood_acc", "val_zoom", "val_acc"]


def test_the_lines_of_a_run_counted_in_steps_have_their_columns_too(tmp_path: Path) -> None:
    hooks = [EvalHook([0], Counted(), **QUIET), LoggerHook(2, progress_bar=False)]
    trainer = make_trainer(tmp_path, max_epochs=None, max_iters=15, hooks=hooks)
    trainer.train(5, 2)
    assert [line.split()[1:4] for line in lines_of(trainer, "Iter  ")] == [["total_loss", "eval_zoom", "eval_acc"]]


def test_a_subclass_that_says_its_names_is_not_tried(tmp_path: Path) -> None:
    class Says(EvalHook):
        def trial(self) -> set[str]:
            return {"eval_acc", "eval_zoom"}

    counted = Counted()
    trainer = make_trainer(tmp_path, max_epochs=4, hooks=[Says([0], counted, 4, **QUIET), logger()])
    trainer.train(5, 2)
    assert counted.calls == 1
    assert len(lines_of(trainer, "Epoch  ")) == 1


def test_an_evaluation_of_the_users_own_is_not_called_before_it_is_due(tmp_path: Path) -> None:
    class Own(EvalHook):
        def _do_eval(self) -> None:
            self.log(self.trainer.epoch, own=0.5, smooth=False)

    counted = Counted()
    hook: EvaluationHook = Own([0], counted, 2, **QUIET)
    trainer = make_trainer(tmp_path, max_epochs=3, hooks=[hook, logger()])
    trainer.train(5, 2)
    assert counted.calls == 0
    assert [("own" in line) for line in lines_of(trainer, "Epoch  ")] == [False, True]


def of_ranks(folder: Path) -> tuple[list[str], float]:
    hooks = [EvalHook(make_batches(4), error, 2, **QUIET), CheckpointerHook(), logger()]
    data = DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), 2)
    trainer = make_trainer(folder, Counting(), data=data, max_epochs=3, hooks=hooks)
    trainer.train(5, 2)
    lines = lines_of(trainer, "Epoch ") if trainer.check_main() else []
    return lines, trainer.metric_storage["eval_error"].latest


def test_several_ranks_try_it_too(tmp_path: Path) -> None:
    (lines, value), (_, other) = outcomes(of_ranks, tmp_path / "ranks", 2, tmp_path / "run")
    assert value == other
    assert lines[0].split()[2] == "eval_error"
    assert len(lines) == 4
