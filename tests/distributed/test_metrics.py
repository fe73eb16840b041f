"""Metrics over several ranks: what is computed is that of all data, or an error says why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes
from tests.small_runs import make_trainer
from torch_frame import EvalTotalHook, SettingError

NUM = 10


class ModuleSum(nn.Module):
    """Not torchmetrics', though it has all its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.total += labels.sum()

    def compute(self) -> dict[str, Any]:
        return {"total": self.total}

    def reset(self) -> None:
        self.total.zero_()


class MergedModuleSum(ModuleSum):
    def merge(self, other: ModuleSum) -> None:
        self.total += other.total


class PlainModuleSum(MergedModuleSum):
    """Its number is no buffer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.total = torch.zeros(())


class NumpySum:
    """A state of NumPy arrays, as many metrics have it."""

    def __init__(self) -> None:
        self.reset()

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.matrix[0, 1] += int(labels.sum())

    def merge(self, other: NumpySum) -> None:
        self.matrix = self.matrix + other.matrix

    def compute(self) -> dict[str, Any]:
        return {"total": self.matrix.sum()}

    def reset(self) -> None:
        self.matrix = np.zeros((2, 2))

    def state_dict(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "kinds": {np.int64(1)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["kinds"] == {1}
        self.matrix = state["matrix"]


class Parts(torchmetrics.Metric):  # type: ignore[misc]
    """Entries that no function reduces, as torchmetrics' MeanAveragePrecision keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("parts", default=[], dist_reduce_fx=None)
        self.add_state("largest", default=torch.tensor(0), dist_reduce_fx="max")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.parts.append(labels)
        self.largest = torch.maximum(self.largest, labels.max())

    def compute(self) -> dict[str, Any]:
        return {"total": torch.cat(self.parts).sum(), "largest": self.largest}


def curves() -> torchmetrics.MetricCollection:
    """Labels are integers and scores of two dimensions: a rank without a batch has neither."""
    return torchmetrics.MetricCollection(
        {
            "auroc": torchmetrics.AUROC("multiclass", num_classes=3),
            "ap": torchmetrics.AveragePrecision("multiclass", num_classes=3),
            "acc": torchmetrics.Accuracy("multiclass", num_classes=3),
        }
    )


def data() -> tuple[Tensor, Tensor]:
    scores = torch.rand(NUM, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    return scores, torch.arange(NUM) % 3


def evaluated(folder: Path, metric: Any, batch_size: int, *, second_only: bool = False) -> Any:
    loader = DataLoader(TensorDataset(*data()), batch_size)
    inputs: Any = (lambda model, batch: batch[1]) if second_only else (lambda model, batch: tuple(batch))
    hook = EvalTotalHook(loader, metric, inputs=inputs, progress_bar=False)
    training = DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), 2)
    trainer = make_trainer(folder, data=training, hooks=[hook])
    try:
        return trainer.evaluate()
    except SettingError as error:
        return str(error)


def evaluate_all(folder: Path) -> dict[str, Any]:
    found = {
        "module": evaluated(folder, ModuleSum(), 2),
        "merged module": evaluated(folder, MergedModuleSum(), 2),
        "plain module": evaluated(folder, PlainModuleSum(), 2),
        "arrays": evaluated(folder, NumpySum(), 2),
        "no sync": evaluated(folder, torchmetrics.SumMetric(sync_on_compute=False), 2, second_only=True),
    }
    for batch_size in (4, 5, 20):  # 3 batches, 2, and 1, which only rank 0 has
        found[f"parts {batch_size}"] = evaluated(folder, Parts(), batch_size)
        found[f"curves {batch_size}"] = evaluated(folder, curves(), batch_size)
    return found


@pytest.mark.slow
def test_what_each_kind_of_metric_sees_on_two_ranks_is_all_of_the_data(tmp_path: Path) -> None:
    reference = curves()
    reference.update(*data())
    expected = {f"eval_{name}": pytest.approx(float(value), abs=1e-7) for name, value in reference.compute().items()}
    total = float(data()[1].sum())
    for found in on_processes(evaluate_all, tmp_path, 2, tmp_path):
        assert "ModuleSum would see one of 2 parts of the data" in found["module"]
        assert "its state_dict() is empty" in found["plain module"]
        assert found["no sync"] == {"eval_SumMetric": total}
        assert found["merged module"] == found["arrays"] == {"eval_total": total}
        for batch_size in (4, 5, 20):
            assert found[f"parts {batch_size}"] == {"eval_total": total, "eval_largest": 2.0}
            assert found[f"curves {batch_size}"] == expected
