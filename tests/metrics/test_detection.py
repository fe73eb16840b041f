"""MeanAveragePrecision against pycocotools, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.metrics.coco_reference import ARRAYS, Case, pycocotools_evaluation, random_case
from torch_frame.errors import SettingError
from torch_frame.metrics import MeanAveragePrecision, Metric

COCO100 = Path(__file__).parents[2].parent / "shared" / "data" / "coco100"
TO_FORMAT = {
    "xywh": lambda boxes: boxes,
    "xyxy": lambda boxes: np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]],
    "cxcywh": lambda boxes: np.c_[boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]],
}
FROM_FORMAT = {
    "xywh": lambda boxes: boxes,
    "xyxy": lambda boxes: np.c_[boxes[:, :2], boxes[:, 2:] - boxes[:, :2]],
    "cxcywh": lambda boxes: np.c_[boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]],
}


def tensors(rows: dict[str, np.ndarray], box_format: str = "xywh") -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.array(v))
        for name, v in {**rows, "boxes": TO_FORMAT[box_format](rows["boxes"])}.items()
    }


def metric_of(
    case: Case, indices: Any = None, *, num_batches: int = 1, box_format: str = "xywh"
) -> MeanAveragePrecision:
    """A metric that has seen the images of these indices (None: all), in that order."""
    metric = MeanAveragePrecision([f"class {k}" for k in range(case.num_classes)], box_format, **case.settings)
    for batch in np.array_split(np.arange(len(case.ids)) if indices is None else indices, num_batches):
        metric.update(
            [case.ids[i] for i in batch],
            [tensors(case.preds[i], box_format) for i in batch],
            [tensors(case.targets[i], box_format) for i in batch],
        )
    return metric


def assert_equal_to_pycocotools(metric: MeanAveragePrecision, case: Case) -> None:
    reference = pycocotools_evaluation(case)
    arrays = metric.compute_arrays()
    for name in ARRAYS:
        ours, theirs = getattr(arrays, name), reference.eval[name]
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes(), f"{name}: {np.abs(ours - theirs).max()}"
    results, limits = metric.compute(), metric.max_dets
    assert all(type(value) is float for name, value in results.items() if not name.endswith("per_class"))
    if len(limits) >= 3:
        names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
        names += [*(f"mar_{limit}" for limit in limits[:3]), "mar_small", "mar_medium", "mar_large"]
        for name, value in zip(names, reference.stats.tolist(), strict=True):
            assert results.get(name, -1.0) == value, name
    for k, name in enumerate(metric.classes):
        precision, recall = reference.eval["precision"][:, :, k, 0], reference.eval["recall"][:, k, 0]
        last = min(2, len(limits) - 1)
        assert results[f"mar_{limits[last]}_per_class"][name] == (recall[:, last].mean() if recall.max() > -1 else -1)
        has_map = 100 in limits and precision.max() > -1
        assert results["map_per_class"][name] == (precision[..., limits.index(100)].mean() if has_map else -1)


@pytest.mark.parametrize("block", range(20))
def test_random_cases_equal_pycocotools_to_the_last_bit(block):
    for seed in range(50 * block, 50 * block + 50):
        case = random_case(seed)
        rng = np.random.default_rng(seed)
        box_format = ["xywh", "xyxy", "cxcywh"][seed % 3]
        order = rng.permutation(len(case.ids))
        metric = metric_of(case, order, num_batches=int(rng.integers(1, 4)), box_format=box_format)
        given = [dict(rows, boxes=FROM_FORMAT[box_format](TO_FORMAT[box_format](rows["boxes"]))) for rows in case.preds]
        truth = [
            dict(rows, boxes=FROM_FORMAT[box_format](TO_FORMAT[box_format](rows["boxes"]))) for rows in case.targets
        ]
        assert_equal_to_pycocotools(metric, Case(case.num_classes, case.ids, given, truth, case.settings))


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_shards_merged_in_any_order_equal_one_process(seed):
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    shards = [metric_of(case, part) for part in np.array_split(rng.permutation(len(case.ids)), rng.integers(1, 5))]
    whole = metric_of(case)
    merged = MeanAveragePrecision(whole.classes, **case.settings)
    for k, shard in enumerate(shards):
        if k % 2:
            merged.merge(shard)
        else:
            merged.merge_bytes(shard.to_bytes())
    assert merged.to_bytes() == whole.to_bytes()
    assert merged.compute() == whole.compute()
    assert_equal_to_pycocotools(merged, case)


def test_results_are_pycocotools_on_a_hundred_real_images():
    if not COCO100.is_dir():
        pytest.skip(f"the COCO images' truth and detections are not there: {COCO100}")
    case = coco100()
    results = metric_of(case, np.arange(100)[::-1], num_batches=7).compute()
    assert results["map"] == 0.5045806987249628
    assert results["map_50"] == 0.6969727247299577
    assert_equal_to_pycocotools(metric_of(case), case)


def coco100() -> Case:
    truth = json.loads((COCO100 / "gt100.json").read_text())
    detections = json.loads((COCO100 / "dt100.json").read_text())
    ids = sorted(image["id"] for image in truth["images"])
    classes = sorted(category["id"] for category in truth["categories"])

    def columns(rows: list[dict[str, Any]], *more: str) -> dict[str, np.ndarray]:
        labels = np.array([classes.index(row["category_id"]) for row in rows], int)
        boxes = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
        return {"boxes": boxes, "labels": labels, **{name: np.array([row[name] for row in rows]) for name in more}}

    preds = [columns([row for row in detections if row["image_id"] == i], "score") for i in ids]
    preds = [{**rows, "scores": rows.pop("score").astype(float)} for rows in preds]
    targets = [columns([row for row in truth["annotations"] if row["image_id"] == i], "area", "iscrowd") for i in ids]
    targets = [rows | {"area": rows["area"].astype(float), "iscrowd": rows["iscrowd"].astype(int)} for rows in targets]
    return Case(len(classes), ids, preds, targets)


# Edge cases

BOX = [10.0, 10.0, 50.0, 50.0]  # xyxy


def pred(boxes: Any = (BOX,), scores: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
    n = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        "scores": torch.tensor([0.5] * n if scores is None else scores, dtype=torch.float64),
        "labels": torch.tensor([0] * n if labels is None else labels, dtype=torch.int64),
    }


def target(boxes: Any = (BOX,), labels: Any = None, **more: Any) -> dict[str, torch.Tensor]:
    rows = pred(boxes, labels=labels)
    return {"boxes": rows["boxes"], "labels": rows["labels"], **{name: torch.tensor(v) for name, v in more.items()}}


def results_for(preds: list[Any], targets: list[Any], classes: Any = ("a", "b"), **settings: Any) -> dict[str, Any]:
    metric = MeanAveragePrecision(classes, **settings)
    metric.update(range(len(preds)), preds, targets)
    return metric.compute()


def test_no_detections_are_zero():
    results = results_for([pred([])], [target()])
    assert results["map"] == results["mar_100"] == results["map_per_class"]["a"] == results["voc_map"] == 0.0


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_no_truth_at_all_is_minus_one(num_images):
    results = results_for([pred()] * num_images, [target([])] * num_images)
    per_class = {name: values for name, values in results.items() if name.endswith("per_class")}
    assert all(value == -1.0 for name, value in results.items() if name not in per_class)
    assert all(values == {"a": -1.0, "b": -1.0} for values in per_class.values())
    assert len(results) == 12 + 2 + 4


def test_neither_detections_nor_truth():
    assert results_for([pred([])], [target([])])["map"] == -1.0


def test_a_class_without_truth_is_minus_one_and_left_out_of_the_mean():
    one = results_for([pred([BOX, BOX], labels=[0, 1])], [target()])
    assert one["map_per_class"] == {"a": one["map"], "b": -1.0}
    assert one["voc_map_per_class"] == one["voc07_map_per_class"] == {"a": 1.0, "b": -1.0}
    assert one["map"] == results_for([pred()], [target()], ["a"])["map"]


def test_crowd_takes_any_number_of_detections_and_counts_as_no_truth():
    inside = [[0, 0, 40, 100], [60, 0, 100, 100], [0, 0, 10, 10]]
    results = results_for(
        [pred([BOX, *inside], scores=[0.9, 0.8, 0.7, 0.6])],
        [target([[0.0, 0.0, 100.0, 100.0], BOX], iscrowd=[1, 0])],
    )
    assert results["map"] == pytest.approx(1.0)
    assert results["mar_1"] == results["mar_100"] == 1.0
    only_crowd = results_for([pred()], [target(iscrowd=[True])])
    assert only_crowd["map"] == only_crowd["voc_map"] == -1.0


def test_ties_of_scores_go_by_input_order_and_images_by_id():
    wrong = [200.0, 200.0, 220.0, 220.0]
    right_first = results_for([pred([BOX, wrong])], [target()])
    wrong_first = results_for([pred([wrong, BOX])], [target()])
    assert right_first["map"] == pytest.approx(1.0)
    assert wrong_first["map"] == pytest.approx(0.5)
    for ids, expected in (([1, 2], 1.0), ([2, 1], 0.5), (["b", 1], 0.5), ([(0,), "z"], 0.5)):
        metric = MeanAveragePrecision(["a"])
        metric.update(ids, [pred(), pred([wrong])], [target(), target([])])
        assert metric.compute()["map"] == pytest.approx(expected), ids


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_iou_exactly_at_the_threshold_matches(threshold):
    part = [0.0, 0.0, 100.0, 100.0 * threshold]
    settings = {"iou_thresholds": [threshold, np.nextafter(threshold, 1)]}
    metric = MeanAveragePrecision(["a"], **settings)
    metric.update([0], [pred([part])], [target([[0.0, 0.0, 100.0, 100.0]])])
    assert metric.compute_arrays().recall[:, 0, 0, 2].tolist() == [1.0, 0.0]
    assert metric.compute()["voc_map"] == float(threshold >= 0.5)


def test_boxes_without_area_and_with_negative_sides_are_as_in_coco():
    boxes = np.array([[10, 10, 0, 20], [10, 10, -5, -5], [5, 5, 30, 30], [10, 10, -5, 20]], float)  # xywh
    rows = {"boxes": boxes, "labels": np.zeros(4, int)}
    truth = rows | {"area": boxes[:, 2] * boxes[:, 3], "iscrowd": np.array([0, 0, 0, 1])}
    case = Case(1, [0], [rows | {"scores": np.array([0.9, 0.8, 0.7, 0.6])}], [truth])
    assert_equal_to_pycocotools(metric_of(case), case)


def test_area_is_the_given_one_also_zero_and_else_the_box():
    settings = {"area_ranges": {"all": (0, 1e10), "zero": (0, 0), "box": (1600, 1600)}}
    given = results_for([pred()], [target(area=[0.0])], **settings)
    own = results_for([pred()], [target()], **settings)
    assert (given["mar_zero"], given["mar_box"]) == (1.0, -1.0)
    assert (own["mar_zero"], own["mar_box"]) == (-1.0, 1.0)


def test_area_and_crowd_may_be_given_for_some_images_of_a_batch():
    metric = MeanAveragePrecision(["a"])
    targets = [target(), target(area=[5.0]), target(iscrowd=[1]), target([])]
    metric.update(range(4), [pred()] * 4, targets)
    one_by_one = MeanAveragePrecision(["a"])
    for i, one in enumerate(targets):
        one_by_one.update([i], [pred()], [one])
    assert metric.to_bytes() == one_by_one.to_bytes()
    assert metric.compute()["mar_small"] == metric.compute()["mar_medium"] == 1.0


def test_more_than_max_dets_are_cut_by_score():
    wrong = [[200.0 + i, 0.0, 210.0 + i, 10.0] for i in range(120)]
    cut = results_for([pred([BOX, *wrong], scores=[0.1, *[0.9] * 120])], [target()])
    kept = results_for([pred([BOX, *wrong], scores=[0.95, *[0.9] * 120])], [target()])
    assert (cut["mar_100"], kept["mar_1"], kept["mar_100"]) == (0.0, 1.0, 1.0)


def test_limits_without_a_hundred_are_as_in_pycocotools():
    case = random_case(4)
    case.settings = {"max_dets": (1, 10, 300)}
    metric = metric_of(case)
    assert metric.compute()["map"] == -1.0
    assert_equal_to_pycocotools(metric, case)
    there = metric.compute_arrays().precision[..., 0, 2]
    assert metric.compute_arrays().average_precision(max_dets=300) == there[there > -1].mean() > -1


class OwnId:
    """Hashable, without a repr of its own."""


IMAGE_IDS = {
    "zero": 0,
    "negative": -3,
    "large": 2**70,
    "text": "a.jpg",
    "tuple": ("a", 1),
    "none": None,
    "path": Path("a/b.jpg"),
    "frozenset": frozenset("ab"),
    "bytes": b"x",
    "float": 1.5,
    "own_class": OwnId(),
}


@pytest.mark.parametrize("image_id", IMAGE_IDS.values(), ids=IMAGE_IDS)
def test_any_hashable_is_an_image_id(image_id):
    metric = MeanAveragePrecision(["a"])
    metric.update([image_id], [pred()], [target()])
    metric.update([image_id], [pred()], [target()])
    assert metric.num_images == 1
    assert metric.compute()["mar_1"] == 1.0


def test_ids_of_mixed_types_have_one_order_and_survive_bytes():
    ids = [
        3,
        "3",
        3.5,
        ("a", 2),
        None,
        b"3",
        Path("x"),
        frozenset("abc"),
        -1,
        ("a", "b"),
        np.int64(9),
        torch.tensor(8),
        True,
    ]
    forward, backward = MeanAveragePrecision(["a"]), MeanAveragePrecision(["a"])
    for metric, order in ((forward, ids), (backward, ids[::-1])):
        for image_id in order:
            k = ids.index(image_id) if isinstance(image_id, str) else [str(i) for i in ids].index(str(image_id))
            metric.update([image_id], [pred(scores=[k / 100])], [target()])
    assert forward.to_bytes() == backward.to_bytes()
    again = MeanAveragePrecision(["a"])
    again.load_state_dict(forward.state_dict())
    again.merge(backward)
    assert again.num_images == len(ids)
    assert again.to_bytes() == forward.to_bytes()


def test_an_id_that_another_process_cannot_know_is_told():
    metric = MeanAveragePrecision(["a"])
    metric.update([OwnId()], [pred()], [target()])
    with pytest.raises(TypeError, match="can't be sent to another process"):
        metric.to_bytes()


@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        (pred([[0.0, 0.0, float("nan"), 1.0]]), target(), "prediction of image img7 has a number that is NaN"),
        (
            pred([[0.0, 0.0, float("inf"), 1.0]]),
            target(),
            "prediction of image img7 has a number that is NaN or infinite",
        ),
        (pred(scores=[float("nan")]), target(), "prediction of image img7 has a number that is NaN"),
        (pred(), target([[0.0, float("-inf"), 1.0, 1.0]]), "target of image img7 has a number that is NaN"),
        (pred(), target(area=[float("nan")]), "target of image img7 has a number that is NaN"),
        (pred(), target() | {"iscrowd": torch.tensor([float("nan")])}, "target of image img7 has a number that is NaN"),
        (pred(labels=[2]), target(), "prediction of image img7 has a label that is not listed"),
        (pred(), target(labels=[-1]), "target of image img7 has a label that is not listed"),
        (pred() | {"boxes": torch.zeros(1, 5)}, target(), r"prediction of image img7 have shape \(1, 5\)"),
        (pred() | {"boxes": torch.zeros(4)}, target(), r"prediction of image img7 have shape \(4,\)"),
        (pred() | {"scores": torch.zeros(3)}, target(), r"scores of the prediction of image img7 have shape \(3,\)"),
        (pred([]) | {"labels": torch.zeros(3)}, target(), r"labels of the prediction of image img7 have shape \(3,\)"),
        (pred() | {"labels": torch.zeros(1)}, target(), "labels of the prediction of image img7 are torch.float32"),
        (pred(), target(iscrowd=[0, 1]), r"iscrowd of the target of image img7 have shape \(2,\)"),
        ({"boxes": torch.zeros(0, 4)}, target(), "prediction of image img7 has no"),
        (pred([[0.0, 0.0, 1e200, 1e200]]), target(), "prediction of image img7 has a box that is too large"),
        (
            pred([[0.0, 0.0, 1e-200, 1e-200]]),
            target(),
            "prediction of image img7 has a box that is too small",
        ),
    ],
)
def test_what_cannot_be_counted_is_an_error_that_names_the_image(preds, targets, message):
    metric = MeanAveragePrecision(["a", "b"])
    with pytest.raises(ValueError, match=message):
        metric.update(["img6", "img7"], [pred(), preds], [target(), targets])
    assert metric.num_images == 0


def test_things_that_are_no_dicts_or_ids_are_type_errors():
    metric = MeanAveragePrecision(["a"])
    with pytest.raises(TypeError, match=r"prediction of image 0 is Tensor.*has to be a dict"):
        metric.update([0], [torch.zeros(1, 6)], [target()])
    with pytest.raises(TypeError, match="not hashable"):
        metric.update([["list"]], [pred()], [target()])
    with pytest.raises(ValueError, match="1 image_ids, 1 preds and 2 targets"):
        metric.update([0], [pred()], [target(), target()])


NO_NUMBERS = {
    "texts_as_labels": ("labels", ["cat"]),
    "none_as_label": ("labels", [None]),
    "an_array_of_texts": ("labels", np.array(["cat"])),
    "ragged_boxes": ("boxes", [[0, 0, 1, 1], [0, 0, 1]]),
    "ragged_tensors": ("boxes", [torch.ones(4), torch.ones(3)]),
    "texts_as_scores": ("scores", ["0.5"]),
    "objects_as_boxes": ("boxes", object()),
    "a_text": ("boxes", "none"),
}


@pytest.mark.parametrize(("name", "values"), NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("side", ["preds", "targets"])
def test_what_is_no_tensor_of_numbers_is_told_with_its_image(side, name, values):
    entries = {"preds": pred(), "targets": target()}
    entries[side] = {**entries[side], name: values}
    if side == "targets" and name == "scores":
        return  # truth has none
    metric = MeanAveragePrecision(["cat", "dog"])
    with pytest.raises(ValueError, match="img_7"):
        metric.update(["img_7"], [entries["preds"]], [entries["targets"]])


def test_lists_of_tensors_with_gradients_are_taken():
    boxes = [torch.tensor([0.0, 0.0, 40.0, 40.0], requires_grad=True)]
    metric = MeanAveragePrecision(["cat"])
    metric.update(
        ["a"], [{"boxes": boxes, "scores": [torch.tensor(0.5)], "labels": [0]}], [{"boxes": boxes, "labels": [0]}]
    )
    assert metric.compute()["map"] == pytest.approx(1.0)


def test_one_image_twice_counts_once_where_it_is_the_same_and_is_an_error_where_not():
    metric = MeanAveragePrecision(["a"])
    metric.update([5, 5], [pred(), pred()], [target(), target()])
    other = MeanAveragePrecision(["a"])
    other.update([5, 6], [pred(), pred()], [target(), target()])
    metric.merge(other)
    assert metric.num_images == 2
    with pytest.raises(ValueError, match="Image 5 came twice, with other detections"):
        metric.update([7, 5], [pred(), pred(scores=[0.4])], [target(), target()])
    other.reset()
    other.update([6], [pred()], [target([])])
    with pytest.raises(ValueError, match="Image 6 came twice, with other truth"):
        metric.merge(other)
    assert metric.num_images == 2


def test_empty_tensors_of_any_type_and_shape_are_no_boxes():
    nothing = {"boxes": torch.tensor([]), "scores": torch.tensor([]), "labels": torch.tensor([])}
    assert results_for([nothing], [target()])["map"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_counts_in_float64(dtype):
    rows = pred([[0.1, 0.2, 10.3, 10.4]], scores=[0.3])
    given = rows | {"boxes": rows["boxes"].to(dtype).requires_grad_(), "scores": rows["scores"].to(dtype)}
    same = rows | {"boxes": rows["boxes"].to(dtype).double(), "scores": rows["scores"].to(dtype).double()}
    first, second = MeanAveragePrecision(["a"]), MeanAveragePrecision(["a"])
    first.update([0], [given], [target()])
    second.update([0], [same], [target()])
    assert first.to_bytes() == second.to_bytes()


def test_arrays_and_lists_are_taken_as_tensors_are():
    rows = {name: value.numpy() for name, value in pred().items()}
    first, second = MeanAveragePrecision(["a"]), MeanAveragePrecision(["a"])
    first.update(np.array([3]), [rows], [{"boxes": [BOX], "labels": [0]}])
    second.update(torch.tensor([3]), [pred()], [target()])
    assert first.to_bytes() == second.to_bytes()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.bfloat16, torch.int64),
        (torch.float16, torch.int32),
        (torch.float32, torch.int64),
        (torch.int64, torch.float16),
        (torch.uint16, torch.int64),
        (torch.bfloat16, torch.float16),
    ],
)
def test_images_of_a_batch_may_be_of_several_types_and_none_is_rounded(first, second):
    of_types = {
        dtype: [
            pred() | {"boxes": torch.tensor([[257, 1023, 2049, 2051]]).to(dtype), "scores": torch.ones(1).to(dtype)},
            target() | {"area": torch.tensor([16_777_217])},
        ]
        for dtype in (first, second)
    }
    both, one_by_one = MeanAveragePrecision(["a"]), MeanAveragePrecision(["a"])
    both.update([0, 1, 2], *zip(of_types[first], of_types[second], [pred(), target()], strict=True))
    one_by_one.update([0], *([entry] for entry in of_types[first]))
    one_by_one.update([1], *([entry] for entry in of_types[second]))
    one_by_one.update([2], [pred()], [target()])
    assert both.to_bytes() == one_by_one.to_bytes()


def test_arrays_may_be_reversed_read_only_and_of_another_byte_order():
    boxes = np.array([[30.0, 30.0, 40.0, 40.0], BOX], np.float32)
    frozen = np.frombuffer(np.array([0.5, 0.9]).tobytes())
    given = {"boxes": boxes[::-1], "scores": frozen[::-1], "labels": np.array([0, 0], ">i4")}
    same = {"boxes": torch.tensor([BOX, [30.0, 30.0, 40.0, 40.0]]), "labels": torch.zeros(2).long()}
    first, second = MeanAveragePrecision(["a"]), MeanAveragePrecision(["a"])
    first.update([0], [given], [target()])
    second.update([0], [same | {"scores": torch.tensor([0.9, 0.5], dtype=torch.float64)}], [target()])
    assert first.to_bytes() == second.to_bytes()


def test_a_batch_is_kept_as_it_was_though_its_tensors_change():
    rows = pred()
    metric = MeanAveragePrecision(["a"], box_format="xywh")
    metric.update([0], [rows], [target()])
    before = metric.to_bytes()
    rows["boxes"].zero_()
    assert metric.to_bytes() == before


def test_reset_forgets_and_the_results_follow_new_data():
    metric = MeanAveragePrecision(["a"])
    metric.update([0], [pred()], [target()])
    assert metric.compute()["mar_1"] == 1.0
    metric.update([1], [pred([])], [target()])
    assert metric.compute()["mar_1"] == 0.5
    metric.reset()
    assert metric.compute()["mar_1"] == -1.0
    assert isinstance(metric, Metric)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": []}, "list of the names"),
        ({"classes": "ab"}, "list of the names"),
        ({"classes": ["a", "a"]}, "'a' twice"),
        ({"classes": {"a"}}, "a set, .*list of the names, the one of label 0 first"),
        ({"classes": {"b": 1, "a": 0}}, "a dict, .*list of the names, the one of label 0 first"),
        ({"classes": {0: "a", 1: "b"}}, "a dict, .*list of the names"),
        ({"box_format": "yxyx"}, "box_format is 'yxyx'"),
        ({"iou_thresholds": []}, "iou_thresholds"),
        ({"iou_thresholds": [0.5, 1.5]}, "numbers from 0 to 1"),
        ({"iou_thresholds": [0.5, 0.5]}, "none twice"),
        ({"rec_thresholds": [0.5, 0.1]}, "have to grow"),
        ({"rec_thresholds": [float("nan")]}, "numbers from 0 to 1"),
        ({"max_dets": ()}, "max_dets"),
        ({"max_dets": (0, 1)}, "whole numbers from 1"),
        ({"max_dets": (1, 1)}, "none twice"),
        ({"max_dets": (1.5,)}, "whole numbers"),
        ({"area_ranges": {"small": (0, 1)}}, "'all'"),
        ({"area_ranges": {"all": (1, 0)}}, "from 1.0 to 0.0"),
        ({"area_ranges": {"all": (0, 9), "50": (0, 1)}}, "'50', but map_50 or mar_50 is the name of another result"),
        ({"area_ranges": {"all": (0, 9), 75: (0, 1)}}, "map_75 or mar_75"),
        ({"area_ranges": {"all": (0, 9), "7": (0, 1)}, "max_dets": (1, 7)}, "map_7 or mar_7"),
        ({"area_ranges": {"all": (0, 9), "per_class": (0, 1)}}, "map_per_class"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(settings, message):
    with pytest.raises(SettingError, match=message):
        MeanAveragePrecision(**{"classes": ["a"], **settings})


def test_states_of_other_classes_and_damaged_ones_are_errors():
    metric, other = MeanAveragePrecision(["a"]), MeanAveragePrecision(["b"])
    metric.update([0], [pred()], [target()])
    with pytest.raises(SettingError, match="other classes"):
        metric.merge(other)
    with pytest.raises(SettingError, match="not the 1 of this one"):
        other.load_state_dict(metric.state_dict())
    with pytest.raises(ValueError, match="a part is missing"):
        metric.merge_bytes(metric.to_bytes()[:-8])
    with pytest.raises(ValueError, match="not the state"):
        metric.merge_bytes(b"something else, long enough to be a state")


def test_the_state_loads_without_running_code(tmp_path):
    metric = metric_of(random_case(11))
    torch.save(metric.state_dict(), tmp_path / "state.pth")
    again = MeanAveragePrecision(metric.classes, **random_case(11).settings)
    again.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert again.compute() == metric.compute()


def _compute_and_send(metric: MeanAveragePrecision, connection: Any) -> None:
    metric.merge(metric)  # what has been computed is kept until images come
    connection.send(metric.compute())
    connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_after_its_parent_did():
    metric = metric_of(random_case(5))
    expected = metric.compute()  # from now on hotcoco's threads live in this process, and in no child of it
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compute_and_send, args=(metric, sender))
    process.start()
    try:
        assert receiver.poll(60), "the child does not answer"
        assert receiver.recv() == expected
    finally:
        process.kill()
        process.join()
