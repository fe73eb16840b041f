"""What counts as a metric, ours, torchmetrics' and 1.7's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchmetrics

import torch_frame
from torch_frame.metrics import (
    BaseMetric,
    MeanAveragePrecision,
    Metric,
    ModelMetric,
    ObjDetMAPMetric,
    is_torchmetrics,
    results_of,
)


@pytest.mark.parametrize(
    "metric", [MeanAveragePrecision(["a"]), ObjDetMAPMetric({"a": 0})], ids=lambda metric: type(metric).__name__
)
def test_ours_follow_the_protocol(metric):
    assert isinstance(metric, Metric)
    assert not is_torchmetrics(metric)


def test_torchmetrics_metrics_and_collections_are_recognised_and_read():
    accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    collection = torchmetrics.MetricCollection([accuracy.clone()])
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 1])
    for metric in (accuracy, collection):
        assert is_torchmetrics(metric)
        metric.update(logits, labels)
        assert results_of(metric) == {"MulticlassAccuracy": torch.tensor(0.75)}


def test_a_metric_of_1_7_is_read_by_evaluate():
    class Count(ModelMetric):
        def __init__(self):
            self.seen = []

        def inference(self, model, inputs):
            return model(inputs)

        def collection(self, item):
            self.seen.append(item)

        def evaluate(self):
            return {"sum": sum(self.seen)}

        def reset(self):
            self.seen = []

    metric = Count()
    metric.update(lambda inputs: 2 * inputs, 3)
    metric.update(lambda inputs: 2 * inputs, 4)
    assert results_of(metric) == {"sum": 14}
    assert not is_torchmetrics(metric)


def test_what_is_no_metric_is_told():
    class Odd:
        def compute(self):
            return "good"

    with pytest.raises(TypeError, match="neither compute"):
        results_of(object())
    with pytest.raises(TypeError, match=r"Odd\.compute\(\) returned str"):
        results_of(Odd())


def test_the_base_classes_of_1_7_do_nothing():
    assert results_of(BaseMetric()) == {}
    assert ModelMetric().update(None, None) is BaseMetric().reset() is None


def test_importing_metrics_is_light():
    source = str(next(iter(torch_frame.__path__)) + "/..")
    code = (
        f"import sys; sys.path.insert(0, {source!r}); import torch_frame.metrics\n"
        "print([name for name in ('hotcoco', 'pycocotools', 'torchmetrics', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
