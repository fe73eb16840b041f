"""ObjDetMAPMetric: the surface of 1.7 with VOC's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.metrics.coco_reference import Case, random_case
from tests.metrics.test_voc import devkit
from torch_frame.errors import SettingError
from torch_frame.metrics import ObjDetMAPMetric, results_of
from torch_frame.vision import det_postprocess


def batch_of(case: Case, indices: list[int], *, is_xyxy: bool) -> tuple[list, torch.Tensor]:
    """(rows x1, y1, x2, y2, score, class for each image; truth padded to one tensor)."""
    outputs, truth = [], torch.zeros(len(indices), 30, 5, dtype=torch.float64)
    for place, i in enumerate(indices):
        rows, boxes = case.preds[i], case.preds[i]["boxes"]
        corners = np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]
        outputs.append(np.c_[corners, rows["scores"], rows["labels"]] if len(boxes) else None)
        given = case.targets[i]["boxes"]
        ends = given[:, :2] + (given[:, 2:] if is_xyxy else given[:, 2:] / 2)
        given = np.c_[given[:, :2], ends] if is_xyxy else np.c_[ends, given[:, 2:]]
        truth[place, : len(given)] = torch.from_numpy(np.c_[case.targets[i]["labels"], given])
    return outputs, truth


def usable_case(seed: int) -> Case:
    """Without crowd, which 1.7's rows can't say, without ties, whose order they leave open, and on whole pixels."""
    case, rng = random_case(seed), np.random.default_rng(seed)
    for rows in (*case.preds, *case.targets):
        rows["boxes"] = np.round(rows["boxes"]) + np.array([0, 0, 0.5, 0.5])
    for rows in case.preds:
        rows["scores"] = rng.random(len(rows["scores"]))
    for rows in case.targets:
        rows["iscrowd"] = np.zeros_like(rows["iscrowd"])
    return case


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("is_xyxy", [False, True])
def test_values_are_vocs_and_no_matter_how_they_were_gathered(seed, is_xyxy):
    case = usable_case(seed)
    names = {f"class{k}": k for k in range(case.num_classes)}
    whole, first, second = (ObjDetMAPMetric(names, is_xyxy, postprocess=lambda outputs: outputs) for _ in range(3))
    images = list(range(len(case.ids)))
    whole.update(lambda outputs: outputs, batch_of(case, images, is_xyxy=is_xyxy))
    for metric, part in ((first, images[1::2]), (second, images[::2])):
        metric.update(lambda outputs: outputs, batch_of(case, part, is_xyxy=is_xyxy))
    _, expected = devkit(case, 0.5)
    results = whole.evaluate()
    assert list(results) == [*(f"ap_{name}" for name in names), "map"]
    assert list(results.values())[:-1] == pytest.approx(expected, abs=1e-14)
    with_truth = [value for value in expected if value >= 0]
    assert results["map"] == pytest.approx(np.mean(with_truth) if with_truth else -1.0)
    assert all(type(value) is float for value in results.values())
    first.merge_bytes(second.to_bytes())
    assert first.evaluate() == results_of(whole) == results
    second.load_state_dict(whole.state_dict())
    assert second.compute() == results


def test_ties_of_scores_do_not_depend_on_the_order_of_images():
    right = (torch.tensor([[0.0, 0.0, 10.0, 10.0, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 10.0, 10.0]]))
    wrong = (torch.tensor([[0.0, 0.0, 10.0, 10.0, 0.5, 0.0]]), torch.zeros(0, 5))
    values = []
    for order in ((right, wrong, right), (wrong, right, right), (right, right, wrong)):
        metric = ObjDetMAPMetric({"a": 0}, is_xyxy=True, postprocess=lambda outputs: outputs)
        for output, truth in order:
            metric.update(lambda outputs: outputs, ([output], [truth]))
        values.append(metric.evaluate())
    assert values[0] == values[1] == values[2]


def test_the_threshold_itself_is_right_and_other_classes_and_padding_are_left_out():
    outputs = [torch.tensor([[0.0, 0.0, 10.0, 6.0, 0.9, 7.0], [0.0, 0.0, 10.0, 10.0, 0.95, 3.0]]), None]
    truth = torch.tensor(
        [[[7.0, 0, 0, 10, 10], [3.0, 0, 0, 10, 10], [0.0, 0, 0, 0, 0]], [[-1.0] * 5, [0.0] * 5, [0.0] * 5]]
    )
    metric = ObjDetMAPMetric({"seven": 7}, is_xyxy=True, ovthresh=0.6, postprocess=lambda outputs: outputs)
    metric.update(lambda outputs: outputs, (outputs, truth))
    assert metric.evaluate() == {"ap_seven": 1.0, "map": 1.0}
    metric.reset()
    assert metric.evaluate() == {"ap_seven": -1.0, "map": -1.0}


def test_the_yolo_head_is_the_default():
    head = torch.tensor(
        [
            [10.0, 10.0, 10.0, 10.0, 0.9, 0.1, 1.0],  # 0.9, class 1
            [
                11.0,
                10.0,
                10.0,
                10.0,
                1.0,
                0.8,
                0.1,
            ],  # 0.8, class 0, on top of the first: suppressed, whatever its class
            [50.0, 50.0, 20.0, 20.0, 1.0, 0.7, 0.1],  # 0.7, class 0: the threshold itself is kept
            [90.0, 90.0, 20.0, 20.0, 0.6, 1.0, 1.0],  # 0.6: too low
        ]
    )
    prediction = torch.stack([head, head * torch.tensor([1, 1, 1, 1, 0.1, 1, 1])])
    before = prediction.clone()
    kept, nothing = det_postprocess(prediction, 2, class_agnostic=True, merge_score=True)
    assert torch.equal(prediction, before)
    assert nothing is None
    torch.testing.assert_close(kept, torch.tensor([[5.0, 5, 15, 15, 0.9, 1], [40, 40, 60, 60, 0.7, 0]]))
    metric = ObjDetMAPMetric({"a": 0, "b": 1})
    truth = torch.tensor([[[1.0, 10, 10, 10, 10], [0.0, 50, 50, 20, 20]], [[0.0] * 5] * 2])
    metric.update(lambda images: images, (prediction, truth))
    assert metric.evaluate() == {"ap_a": 1.0, "ap_b": 1.0, "map": 1.0}


def test_the_head_has_a_score_for_each_index_though_classes_have_gaps():
    rows = torch.tensor([[10.0, 10, 10, 10, 1.0, 0.1, 0.1, 0.9], [50.0, 50, 20, 20, 1.0, 0.1, 0.9, 0.1]])
    truth = torch.tensor([[[2.0, 10, 10, 10, 10], [1.0, 50, 50, 20, 20]]])
    metric = ObjDetMAPMetric({"bird": 2})
    metric.update(lambda images: images, (rows[None], truth))
    assert metric.evaluate() == {"ap_bird": 1.0, "map": 1.0}
    from_one = ObjDetMAPMetric({"dog": 1, "bird": 2})
    from_one.update(lambda images: images, (rows[None], truth))
    assert from_one.evaluate() == {"ap_dog": 1.0, "ap_bird": 1.0, "map": 1.0}
    with pytest.raises(ValueError, match="for 3 classes"):
        from_one.update(lambda images: images, (rows[None, :, :7], truth))


def test_what_cannot_be_counted_is_told():
    metric = ObjDetMAPMetric({"a": 0}, postprocess=lambda outputs: outputs)
    for class2idx in ({}, {"a": 0, "b": 0}):
        with pytest.raises(SettingError, match="an index of its own"):
            ObjDetMAPMetric(class2idx)
    with pytest.raises(SettingError, match="ovthresh is 0"):
        ObjDetMAPMetric({"a": 0}, ovthresh=0)
    with pytest.raises(SettingError, match="another class2idx"):
        metric.merge(ObjDetMAPMetric({"b": 0}))
    with pytest.raises(ValueError, match=r"\(n, 6\): x1"):
        metric.update(lambda outputs: outputs, ([torch.zeros(1, 7)], torch.zeros(1, 1, 5)))
    with pytest.raises(ValueError, match="predictions for 1 images and truth for 2"):
        metric.update(lambda outputs: outputs, ([None], torch.zeros(2, 1, 5)))
    metric.update(lambda outputs: outputs, ([None], torch.zeros(1, 1, 5)))
    with pytest.raises(ValueError, match="prediction of image 1 has a number that is NaN"):
        metric.update(lambda outputs: outputs, ([torch.full((1, 6), torch.nan)], torch.zeros(1, 1, 5)))
