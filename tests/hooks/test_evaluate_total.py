"""Metrics over all data: what the hook logs is what torchmetrics gives by hand, and training does not notice."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.threads import ThreadStrategy, on_ranks
from tests.small_runs import differences, make_batches, make_trainer, raised_by, seed_everything, weights_of
from torch_frame import CheckpointerHook, EvalHook, EvalTotalHook, LoggerHook, SettingError, Trainer
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.hooks.evaluate_total import check_can_merge, merge_over_ranks
from torch_frame.metrics import BaseMetric, MeanAveragePrecision, results_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, on import
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix

NUM_CLASSES = 4


class Classifier(nn.Module):
    """In training its loss; in evaluation (B, 4) scores. With dropout, so that random numbers and modes show."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, NUM_CLASSES)
            )

    def forward(self, batch: Any) -> Tensor:
        scores: Tensor = self.layers(batch[0])
        return nn.functional.cross_entropy(scores, batch[1]) if self.training else scores


def labelled(num: int = 5, size: int = 12, last: int = 7, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (num - 1) + [last]
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(0, NUM_CLASSES, (n,), generator=generator))
        for n in sizes
    ]


def predictions(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch).softmax(1), batch[1]


def trainer_of(work_dir: Path, *hooks: Any, epochs: int = 2, **settings: Any) -> Trainer:
    return make_trainer(work_dir, Classifier(), data=labelled(seed=0), max_epochs=epochs, hooks=list(hooks), **settings)


def by_hand(metric: Any, model: nn.Module, data: Any) -> Any:
    model.eval()
    with torch.no_grad():
        for batch in data:
            metric.update(*predictions(model, batch))
    return metric.compute()


# ---------------------------------------------------------------- torchmetrics


def test_every_kind_of_torchmetrics_metric_gives_what_it_gives_by_hand(tmp_path: Path) -> None:
    data = labelled()
    collection = torchmetrics.MetricCollection(
        {"acc": MulticlassAccuracy(NUM_CLASSES), "macro": MulticlassAccuracy(NUM_CLASSES, average="macro")}
    )
    metrics = {
        "top1": MulticlassAccuracy(NUM_CLASSES, average="micro"),
        "many": collection,
        "confusion": MulticlassConfusionMatrix(NUM_CLASSES),
        "auroc": MulticlassAUROC(NUM_CLASSES),
    }
    hook = EvalTotalHook(data, metrics, inputs=predictions)
    trainer = trainer_of(tmp_path, hook)
    trainer.train()
    model = trainer.model
    expected = {
        "top1": by_hand(MulticlassAccuracy(NUM_CLASSES, average="micro"), model, data),
        "many_acc": by_hand(MulticlassAccuracy(NUM_CLASSES), model, data),
        "many_macro": by_hand(MulticlassAccuracy(NUM_CLASSES, average="macro"), model, data),
        "auroc": by_hand(MulticlassAUROC(NUM_CLASSES), model, data),
    }
    for name, value in expected.items():
        assert trainer.metric_storage[f"eval_{name}"].latest == value.item(), name
    confusion = by_hand(MulticlassConfusionMatrix(NUM_CLASSES), model, data)
    assert torch.equal(hook.results["eval"]["confusion"], confusion)
    assert "eval_confusion" not in trainer.metric_storage, "a matrix is no number to log"
    assert confusion.sum() == sum(len(labels) for _, labels in data), "each sample once"


def test_a_single_metric_goes_by_its_class(tmp_path: Path) -> None:
    hook = EvalTotalHook(
        labelled(), MulticlassAccuracy(NUM_CLASSES), save_metric="MulticlassAccuracy", inputs=predictions
    )
    trainer = trainer_of(tmp_path, hook)
    trainer.train()
    assert hook.cur_best == max(hook.cur_best, trainer.metric_storage["eval_MulticlassAccuracy"].latest)
    assert (Path(trainer.ckpt_dir) / "best.pth").exists()


def test_keyword_arguments_and_single_ones_reach_update(tmp_path: Path) -> None:
    def keywords(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        scores, labels = predictions(model, batch)
        return {"preds": scores, "target": labels}

    mean = EvalTotalHook(labelled(), {"m": torchmetrics.MeanMetric()}, inputs=lambda model, batch: model(batch).mean())
    named = EvalTotalHook(labelled(), {"acc": MulticlassAccuracy(NUM_CLASSES)}, prefix="kw", inputs=keywords)
    trainer = trainer_of(tmp_path, mean, named)
    scores = trainer.evaluate()
    assert scores.keys() == {"eval_m", "kw_acc"}
    assert scores["kw_acc"] == by_hand(MulticlassAccuracy(NUM_CLASSES), trainer.model, labelled()).item()


def test_several_loaders_have_their_prefixes(tmp_path: Path) -> None:
    val, test = labelled(seed=2), labelled(3, seed=3)
    hook = EvalTotalHook(
        {"val": val, "test": test}, {"acc": MulticlassAccuracy(NUM_CLASSES)}, save_metric="val_acc", inputs=predictions
    )
    trainer = trainer_of(tmp_path, hook)
    trainer.train()
    for prefix, data in {"val": val, "test": test}.items():
        expected = by_hand(MulticlassAccuracy(NUM_CLASSES), trainer.model, data).item()
        assert trainer.metric_storage[f"{prefix}_acc"].latest == expected


# ---------------------------------------------------------------- metrics of 1.7


class OfOld:
    """As 1.7's EvalTotalHook wants it: update(model, batch), evaluate(), reset()."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right: list[float] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        self.right += (model(batch).argmax(1) == batch[1]).float().tolist()

    def evaluate(self) -> dict[str, Any]:
        return {"acc": sum(self.right) / len(self.right), "each": self.right}


def test_a_metric_of_1_7_works_as_it_did(tmp_path: Path) -> None:
    hook = EvalTotalHook(labelled(), OfOld(), 1, None, "acc", True, True, "eval")
    trainer = trainer_of(tmp_path, hook, LoggerHook())
    trainer.train()
    expected = by_hand(MulticlassAccuracy(NUM_CLASSES, average="micro"), trainer.model, labelled()).item()
    assert trainer.metric_storage["eval_acc"].latest == pytest.approx(expected, rel=1e-6)
    assert trainer.metric_storage["eval_each"].latest == pytest.approx(expected, rel=1e-6)
    rows = [json.loads(line) for line in (Path(trainer.work_dir) / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_acc" in row for row in rows) == 2


# ---------------------------------------------------------------- when, and with which weights


def test_a_period_in_iterations_evaluates_inside_epochs(tmp_path: Path) -> None:
    class Counting(OfOld):
        evaluated_at: list[int] = []  # noqa: RUF012  # of the class: the hook may copy the metric

        def evaluate(self) -> dict[str, Any]:
            self.evaluated_at.append(trainer.cur_iter)
            return super().evaluate()

    trainer = trainer_of(tmp_path, EvalTotalHook(labelled(), Counting(), period=3, period_unit="iter"))
    trainer.train()
    assert Counting.evaluated_at == [2, 5, 8, 9], "every third of 10 batches, and the last one"
    assert trainer.metric_storage.latest_iters()["eval_acc"] == 9


def test_ema_weights_are_evaluated_where_ema_is_on(tmp_path: Path) -> None:
    hook = EvalTotalHook(labelled(), {"m": torchmetrics.MeanMetric()}, inputs=lambda model, batch: model(batch).mean())
    trainer = trainer_of(tmp_path, hook, use_ema=True, ema_decay=0.5)
    trainer.train()
    ema, plain = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
    with torch.no_grad():
        for batch in labelled():
            ema.update(trainer.model_evaluate.eval()(batch).mean())
            plain.update(trainer.model.eval()(batch).mean())
    assert trainer.metric_storage["eval_m"].latest == ema.compute().item() != plain.compute().item()


@pytest.mark.parametrize("inference_mode", [False, True])
def test_gradients_are_off_and_inference_mode_is_on_request(inference_mode: bool, tmp_path: Path) -> None:
    seen: set[tuple[bool, bool]] = set()

    def looking(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        seen.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return predictions(model, batch)

    hook = EvalTotalHook(labelled(), MulticlassAccuracy(NUM_CLASSES), inputs=looking, inference_mode=inference_mode)
    trainer_of(tmp_path, hook).train()
    assert seen == {(False, inference_mode)}


@pytest.mark.parametrize("unit", ["epoch", "iter"])
def test_training_does_not_notice_an_evaluation(unit: Any, tmp_path: Path) -> None:
    def trained(hooks: list[Any]) -> Trainer:
        seed_everything(3)
        trainer = make_trainer(
            tmp_path / f"run_{len(hooks)}", Classifier(), data=labelled(seed=0), max_epochs=3, hooks=hooks, seed=1
        )
        trainer.train()
        return trainer

    def drawing(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        torch.rand(5)
        return predictions(model, batch)

    alone = trained([])
    evaluated = trained(
        [
            EvalTotalHook(labelled(), MulticlassAUROC(NUM_CLASSES), inputs=drawing, period_unit=unit, period=2),
            EvalHook(labelled(), lambda model, batch: {"acc": [1.0] * len(batch[1])}, prefix="other"),
        ]
    )
    assert differences(weights_of(alone.model), weights_of(evaluated.model)) == []
    assert differences(alone.optimizer.state_dict(), evaluated.optimizer.state_dict()) == []
    assert all(module.training for module in evaluated.model.modules())


def test_evaluate_by_hand_logs_and_saves_nothing(tmp_path: Path) -> None:
    hook = EvalTotalHook(labelled(), OfOld(), save_metric="acc")
    trainer = trainer_of(tmp_path, hook)
    scores = trainer.evaluate()
    assert scores["eval_acc"] == pytest.approx(
        by_hand(MulticlassAccuracy(NUM_CLASSES, average="micro"), trainer.model, labelled()).item(), rel=1e-6
    )
    assert not trainer.metric_storage
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(SettingError, match="No hook evaluates"):
        trainer_of(tmp_path, CheckpointerHook()).evaluate()


def test_nothing_is_read_between_the_batches(tmp_path: Path) -> None:
    """A metric that keeps tensors is updated without a read of their values; on a device each would be a wait."""

    class Reads(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.num = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return function(*args, **(kwargs or {}))

    class OnDevice:
        """Counts in tensors. `reads` are those that have been made when a batch arrives."""

        def reset(self) -> None:
            self.right, self.total, self.reads = torch.zeros(()), 0, []

        def update(self, scores: Tensor, labels: Tensor) -> None:
            self.reads.append(reads.num)
            self.right = self.right + (scores.argmax(1) == labels).sum()
            self.total += len(labels)

        def compute(self) -> dict[str, float]:
            seen.extend(self.reads)
            return {"acc": (self.right / self.total).item()}

    reads, seen = Reads(), []
    trainer = trainer_of(
        tmp_path, EvalTotalHook(labelled(), OnDevice(), inputs=lambda model, batch: (model(batch), batch[1]))
    )
    with reads:
        scores = trainer.evaluate()
    assert len(seen) == len(labelled())
    assert seen[0] == seen[-1]
    assert reads.num > seen[-1], "the result is read, so a read would have been counted"
    assert (
        scores["eval_acc"]
        == by_hand(MulticlassAccuracy(NUM_CLASSES, average="micro"), trainer.model, labelled()).item()
    )


# ---------------------------------------------------------------- detection


def test_a_detection_hook_takes_three_lines(tmp_path: Path) -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    truth = [{"boxes": box, "labels": torch.tensor([0])}]
    found = [{"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([0])}]
    hook = EvalTotalHook(
        [(["a"], truth), (["b"], truth)],
        MeanAveragePrecision(["cat", "dog"]),
        save_metric="map",
        inputs=lambda model, batch: (batch[0], found, batch[1]),
    )
    trainer = trainer_of(tmp_path, hook)
    trainer.train()
    assert trainer.metric_storage["eval_map"].latest == 1.0
    assert hook.results["eval"]["map_per_class"] == {"cat": 1.0, "dog": -1.0}


# ---------------------------------------------------------------- mistakes

ACC = MulticlassAccuracy(NUM_CLASSES)
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "a class": (lambda: EvalTotalHook([], MulticlassAccuracy), TypeError, "make an object"),
    "no metric": (lambda: EvalTotalHook([], object()), TypeError, "has to have update"),
    "torchmetrics without inputs": (lambda: EvalTotalHook([], ACC), TypeError, "inputs=lambda model, batch"),
    "inputs that is no function": (lambda: EvalTotalHook([], ACC, inputs=3), TypeError, "inputs is 3"),
    "an iterator": (lambda: EvalTotalHook(iter([]), ACC, inputs=predictions), SettingError, "used up"),
    "one object twice": (
        lambda: EvalTotalHook([], {"a": ACC, "b": ACC}, inputs=predictions),
        SettingError,
        "would see each batch twice",
    ),
    "no metric at all": (lambda: EvalTotalHook([], [], inputs=predictions), SettingError, "empty"),
    "which loader": (
        lambda: EvalTotalHook({"val": [], "test": []}, ACC, save_metric="acc", inputs=predictions),
        SettingError,
        "'val_acc', 'test_acc'",
    ),
    "an unknown unit": (lambda: EvalTotalHook([], OfOld(), period_unit="step"), SettingError, "'epoch' or 'iter'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_is_told_when_the_hook_is_made(name: str) -> None:
    make, error, words = MISTAKES[name]
    assert words in str(raised_by(make, error))


class TwoNames(OfOld):
    def evaluate(self) -> dict[str, Any]:
        return {"acc": 0.5, "ood_acc": 0.25}


BEFORE_THE_FIRST_STEP: dict[str, tuple[Any, str]] = {
    "a wrong name": (
        lambda: EvalTotalHook(labelled(), {"acc": ACC}, save_metric="accuracy", inputs=predictions),
        "'acc'",
    ),
    "the wrong direction": (
        lambda: EvalTotalHook(labelled(), {"acc": ACC}, save_metric="acc", max_first=False, inputs=predictions),
        "higher is better",
    ),
    "the wrong direction in a collection": (
        lambda: EvalTotalHook(
            labelled(),
            torchmetrics.MetricCollection({"acc": ACC, "mse": torchmetrics.MeanSquaredError()}),
            save_metric="mse",
            inputs=lambda model, batch: (batch[1], batch[1]),
        ),
        "lower is better",
    ),
    "two of one name": (
        lambda: EvalTotalHook(labelled(), [OfOld(), OfOld()]),
        "Two metrics",
    ),
    "two of one name that one of them follows": (
        lambda: EvalTotalHook(labelled(), [OfOld(), OfOld()], save_metric="acc"),
        "Two metrics",
    ),
    "two loaders whose values have one name": (
        lambda: EvalTotalHook({"val": labelled(), "val_ood": labelled()}, TwoNames(), save_metric="val_acc"),
        "Two dataloaders of one evaluation yield 'val_ood_acc'",
    ),
    "an empty loader": (lambda: EvalTotalHook([], OfOld(), save_metric="acc"), "empty"),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_STEP)
def test_a_mistake_is_told_before_or_at_the_first_evaluation(name: str, tmp_path: Path) -> None:
    make, words = BEFORE_THE_FIRST_STEP[name]
    trainer = trainer_of(tmp_path, make())
    error = raised_by(trainer.train, SettingError)
    assert words in str(error)
    if name != "two of one name":
        assert trainer.progress.iter == 0


class OwnModule(nn.Module):
    """Looks like a torchmetrics metric, but does not know of other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def reset(self) -> None:
        self.count.zero_()

    def update(self, num: int) -> None:
        self.count += num

    def compute(self) -> dict[str, Any]:
        return {"count": self.count}


class OwnModuleThatMerges(OwnModule):
    def merge(self, other: OwnModule) -> None:
        self.count += other.count


class WithoutState(OwnModuleThatMerges):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.count = torch.zeros(())


def test_a_module_of_ones_own_counts_on_all_ranks_or_is_refused() -> None:
    def count(strategy: ThreadStrategy) -> float:
        metric = OwnModuleThatMerges()
        check_can_merge([metric], strategy)
        metric.update(10**strategy.rank)
        merge_over_ranks([metric], strategy)
        return float(metric.count)

    assert on_ranks(count, 3)[0] == 111
    refused = {"has no merge()": OwnModule(), "state_dict() is empty": WithoutState()}
    for words, metric in refused.items():
        check_can_merge([metric], SingleProcess())
        for error in on_ranks(lambda strategy, metric=metric: check_can_merge([metric], strategy)):
            assert isinstance(error, SettingError)
            assert words in str(error)


class Lengths(torchmetrics.Metric):
    """Keeps a list of tensors of any form, as torchmetrics' mAP and ROUGE do: `dist_reduce_fx=None`."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx=None)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.rows.extend(scores[: 1 + label] for label in labels.tolist())

    def compute(self) -> dict[str, Tensor]:
        return {
            "num": torch.tensor(len(self.rows)),
            "sum": torch.stack([rows.double().sum() for rows in self.rows]).sum(),
        }


OF_TORCHMETRICS: dict[str, Any] = {
    "counts": lambda: MulticlassAccuracy(NUM_CLASSES),
    "lists": lambda: MulticlassAUROC(NUM_CLASSES),
    "lists without a reduction": Lengths,
    "a metric inside": lambda: torchmetrics.MinMaxMetric(MulticlassAccuracy(NUM_CLASSES)),
    "not synchronised by itself": lambda: MulticlassAccuracy(NUM_CLASSES, sync_on_compute=False),
    "a collection whose metrics share states": lambda: torchmetrics.MetricCollection(
        {"f1": torchmetrics.F1Score("multiclass", num_classes=NUM_CLASSES), "recall": MulticlassAccuracy(NUM_CLASSES)}
    ),
}


@pytest.mark.parametrize("num_batches", [1, 2, 5], ids=lambda num: f"{num} batches")
@pytest.mark.parametrize("kind", OF_TORCHMETRICS)
def test_torchmetrics_on_ranks_with_other_numbers_of_batches_are_those_of_one_process(
    kind: str, num_batches: int
) -> None:
    """One batch: the others have none. torchmetrics' own exchange waits for ever, or fails."""
    data = [(scores[:, :NUM_CLASSES].softmax(1), labels) for scores, labels in labelled(num_batches)]
    whole = OF_TORCHMETRICS[kind]()
    for batch in data:
        whole.update(*batch)

    def merged(strategy: ThreadStrategy) -> Any:
        metric = OF_TORCHMETRICS[kind]()
        for _ in range(2):  # it can be used again
            metric.reset()
            for batch in data[strategy.rank :: 3]:
                metric.update(*batch)
            merge_over_ranks([metric], strategy)
        return numbers_of(metric) if strategy.rank == 0 else None

    def numbers_of(metric: Any) -> dict[str, float]:
        return {name: float(value) for name, value in results_of(metric).items()}

    assert on_ranks(merged, 3)[0] == pytest.approx(numbers_of(whole), abs=1e-7)


def test_two_loaders_whose_values_have_one_name_are_told_without_a_save_metric_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, EvalTotalHook({"val": labelled(), "val_ood": labelled()}, TwoNames()))
    assert "yield 'val_ood_acc'" in str(raised_by(trainer.train, SettingError))


def test_a_metric_that_one_batch_is_too_little_for_is_tried_in_earnest(tmp_path: Path) -> None:
    class Picky(OfOld):
        def evaluate(self) -> dict[str, Any]:
            if len(self.right) < 20:
                raise ValueError("too few")
            return super().evaluate()

    trainer = trainer_of(tmp_path, EvalTotalHook(labelled(), Picky(), save_metric="acc"))
    trainer.train()
    assert "eval_acc" in trainer.metric_storage


def test_a_loss_that_is_to_be_highest_is_asked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, data=make_batches(), hooks=[CheckpointerHook(save_metric="total_loss")])
    trainer.train()
    assert "max_first=False" in caplog.text


@pytest.mark.parametrize(
    ("result", "mean"),
    [((1.0, 2.0), 1.5), (np.array([1.0, 2.0]), 1.5), (np.array([[1.0, 2.0], [3.0, 4.0]]), 2.5), (np.float32(0.5), 0.5)],
    ids=["tuple", "array", "matrix", "numpy_number"],
)
def test_of_what_a_metric_of_1_7_returns_the_mean_is_logged(result: Any, mean: float, tmp_path: Path) -> None:
    class Old(BaseMetric):  # without a reset, as 1.7 allowed
        def evaluate(self) -> Any:
            return {"x": result}

    hook = EvalTotalHook([0], Old(), save_metric="x")
    trainer = make_trainer(tmp_path, hooks=[hook], max_epochs=1)
    trainer.train()
    assert trainer.value("eval_x") == mean
    assert isinstance(hook._eval_metric, Old)


def test_a_metric_of_1_7_that_has_nothing_to_say_logs_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[EvalTotalHook([0], BaseMetric())], max_epochs=1)
    trainer.train()
    assert not [name for name in trainer.metric_storage if name.startswith("eval")]


class Single:
    def __init__(self, result: Any) -> None:
        self.result = result

    def update(self, model: nn.Module, batch: Any) -> None: ...

    def reset(self) -> None: ...

    def compute(self) -> Any:
        return self.result


@pytest.mark.parametrize("result", [np.float32(0.5), np.float64(0.5), np.array(0.5), 0.5, torch.tensor(0.5)], ids=repr)
def test_a_single_result_may_be_any_number(result: Any, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, EvalTotalHook(labelled(), Single(result)))
    trainer.train()
    assert trainer.metric_storage["eval_Single"].latest == 0.5
