"""Curves of precision over recall: what is drawn is what the metric says."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from tests.metrics.coco_reference import Case, random_case
from tests.metrics.test_detection import metric_of
from torch_frame.metrics import MeanAveragePrecision
from torch_frame.report.precision_recall import plot_precision_recall

pytest.importorskip("matplotlib")


def case_with_truth(**settings: Any) -> Case:
    for seed in range(100):
        case = random_case(seed)
        case.settings = settings
        if metric_of(case).compute()["map"] > 0.1 and case.num_classes >= 3:
            return case
    raise AssertionError("no such case")


def test_the_curves_are_the_metrics_and_their_names_have_their_means():
    metric = metric_of(case_with_truth())
    results, arrays = metric.compute(), metric.compute_arrays()
    left, right = plot_precision_recall(metric).axes
    with_truth = [k for k, name in enumerate(metric.classes) if results["map_per_class"][name] > -1]
    assert len(left.lines) == 10
    for t, line in enumerate(left.lines):
        expected = arrays.precision[t][:, with_truth, 0, -1].mean(axis=1)
        assert np.allclose(line.get_ydata(), expected, atol=1e-12)
        assert np.array_equal(line.get_xdata(), arrays.rec_thresholds)
        assert (
            line.get_label()
            == f"IoU {arrays.iou_thresholds[t]:.2f}: {arrays.average_precision(arrays.iou_thresholds[t]):.3f}"
        )
    assert left.get_legend().get_title().get_text() == f"AP, mean {results['map']:.3f}"
    assert [line.get_label().split(":")[0] for line in right.lines] == [metric.classes[k] for k in with_truth]
    for k, line in zip(with_truth, right.lines, strict=True):
        assert np.array_equal(line.get_ydata(), arrays.precision[0, :, k, 0, -1])


def test_computed_arrays_another_iou_and_a_range_of_areas_are_taken():
    metric = metric_of(case_with_truth())
    arrays = metric.compute_arrays()
    right = plot_precision_recall(arrays, iou=0.74, area="small", max_dets=10).axes[1]
    assert right.get_title() == "classes at IoU 0.75"
    small = arrays.precision[5, :, :, arrays.area_ranges.index("small"), arrays.max_dets.index(10)]
    drawn = [line.get_ydata() for line in right.lines]
    assert np.array_equal(drawn, small[:, (small > -1).all(axis=0)].T)
    with pytest.raises(ValueError, match="area is 'tiny', but the metric has 'all', 'small'"):
        plot_precision_recall(metric, area="tiny")
    with pytest.raises(ValueError, match="max_dets is 7, but the metric has 1, 10, 100"):
        plot_precision_recall(metric, max_dets=7)


def test_of_many_classes_the_lowest_are_named():
    metric = MeanAveragePrecision([f"_class $ {k}" for k in range(40)])
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    for k in range(40):
        near = box + np.array([0, 0, k % 8, 0])
        metric.update([k], [{"boxes": near, "scores": [0.5], "labels": [k]}], [{"boxes": box, "labels": [k]}])
    right = plot_precision_recall(metric, iou=0.75).axes[1]
    named = right.get_legend().get_texts()
    assert len(right.lines) == 40
    assert len(named) == 12
    assert all(text.get_text().endswith(": 0.000") for text in named)
    plot_precision_recall(metric).savefig(io.BytesIO())  # a dollar sign is text


@pytest.mark.parametrize("num_images", [0, 1])
def test_without_truth_the_figure_says_so(num_images):
    metric = MeanAveragePrecision(["a"])
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    metric.update(range(num_images), [nothing] * num_images, [nothing] * num_images)
    figure = plot_precision_recall(metric)
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["no truth", "no truth"]
