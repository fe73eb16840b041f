"""MeanAveragePrecision of masks against pycocotools, to the last bit."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_tools

from tests.metrics.coco_reference import ARRAYS, Case, pycocotools_code, pycocotools_evaluation, random_case_of_masks
from torch_frame.errors import SettingError
from torch_frame.metrics import MeanAveragePrecision, Metric


def metric_of(case: Case, indices: Any = None, *, num_batches: int = 1) -> MeanAveragePrecision:
    """A metric that has seen the images of these indices (None: all), in that order."""
    metric = MeanAveragePrecision([f"class {k}" for k in range(case.num_classes)], iou_type="segm", **case.settings)
    for batch in np.array_split(np.arange(len(case.ids)) if indices is None else indices, num_batches):
        metric.update([case.ids[i] for i in batch], [case.preds[i] for i in batch], [case.targets[i] for i in batch])
    return metric


def assert_equal_to_pycocotools(metric: MeanAveragePrecision, case: Case) -> None:
    reference = pycocotools_evaluation(case, "segm")
    arrays, results = metric.compute_arrays(), metric.compute()
    for name in ARRAYS:
        ours, theirs = getattr(arrays, name), reference.eval[name]
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes(), f"{name}: {np.abs(ours - theirs).max()}"
    if len(metric.max_dets) >= 3:
        names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
        names += [*(f"mar_{limit}" for limit in metric.max_dets[:3]), "mar_small", "mar_medium", "mar_large"]
        for name, value in zip(names, reference.stats.tolist(), strict=True):
            assert results.get(name, -1.0) == value, name


@pytest.mark.parametrize("block", range(10))
def test_random_cases_equal_pycocotools_to_the_last_bit(block):
    for seed in range(50 * block, 50 * block + 50):
        case = random_case_of_masks(seed)
        rng = np.random.default_rng(seed)
        metric = metric_of(case, rng.permutation(len(case.ids)), num_batches=int(rng.integers(1, 4)))
        assert_equal_to_pycocotools(metric, case)


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_shards_merged_in_any_order_equal_one_process(seed):
    case = random_case_of_masks(seed)
    rng = np.random.default_rng(seed)
    shards = [metric_of(case, part) for part in np.array_split(rng.permutation(len(case.ids)), rng.integers(1, 5))]
    whole = metric_of(case)
    merged = MeanAveragePrecision(whole.classes, iou_type="segm", **case.settings)
    for k, shard in enumerate(shards):
        if k % 2:
            merged.merge(shard)
        else:
            merged.merge_bytes(shard.to_bytes())
    assert merged.to_bytes() == whole.to_bytes()
    assert merged.compute() == whole.compute()
    assert_equal_to_pycocotools(merged, case)


def square(side: int = 10, size: int = 64, left: int = 0) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[:side, left : left + side] = True
    return mask


def entry(masks: Any, **more: Any) -> dict[str, Any]:
    n = len(masks)
    return {"masks": masks, "labels": torch.zeros(n, dtype=torch.int64), "scores": torch.full((n,), 0.5), **more}


def results_for(preds: list[Any], targets: list[Any], **settings: Any) -> dict[str, Any]:
    metric = MeanAveragePrecision(["a"], iou_type="segm", **settings)
    metric.update(range(len(preds)), preds, targets)
    return metric.compute()


def test_a_detections_area_is_its_masks_not_its_boxs():
    frame = np.ones((60, 60), bool)
    frame[2:-2, 2:-2] = False  # 464 pixels: small; its box of 3600 is medium
    truth = entry(np.zeros((1, 60, 60), bool), area=torch.tensor([5000.0]))
    results = results_for([entry(frame[None])], [truth])
    assert results["map_small"] == -1
    assert results["map_medium"] == 0
    # A detection that matches nothing counts only in the range of its own area:
    with_small = entry(np.stack([square(10, 60), frame]), scores=torch.tensor([0.5, 0.9]))
    assert results_for([with_small], [entry(square(10, 60)[None])])["map_small"] == pytest.approx(0.5)
    case = Case(1, [0], [with_small], [entry(square(10, 60)[None], iscrowd=np.zeros(1))])
    case.preds[0]["labels"] = case.targets[0]["labels"] = np.zeros(2, int)
    case.targets[0]["labels"] = np.zeros(1, int)
    assert_equal_to_pycocotools(metric_of(case), case)


def test_boxes_beside_the_masks_are_not_read():
    wrong = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    results = results_for([entry(square()[None], boxes=wrong)], [entry(square()[None], boxes=wrong)])
    assert results["map"] == pytest.approx(1)
    assert not any(name.startswith("voc") for name in results)


def test_equal_masks_are_one_content_in_whatever_form_they_come():
    mask = np.random.default_rng(0).random((3, 12, 17)) < 0.4
    codes = [pycocotools_code(one) for one in mask]
    runs = [[0, 0, *runs] if (runs := _runs_of(one))[0] else runs for one in mask]  # with empty runs in front
    forms = [
        mask,
        torch.from_numpy(mask),
        torch.from_numpy(mask).to(torch.uint8) * 255,
        torch.from_numpy(mask).long().unbind(),
        mask.tolist(),
        np.asfortranarray(mask),
        codes,
        tuple({**code, "counts": code["counts"].decode()} for code in codes),
        [{"size": (12, 17), "counts": counts} for counts in runs],
        [{"size": np.array([12, 17]), "counts": np.array(counts)} for counts in runs],
    ]
    states = set()
    for form in forms:
        metric = MeanAveragePrecision(["a"], iou_type="segm")
        metric.update([0], [entry(form)], [entry(form)])
        states.add(metric.to_bytes())
    assert len(states) == 1


def _runs_of(mask: np.ndarray) -> list[int]:
    pixels = np.r_[False, mask.ravel(order="F"), not mask[-1, -1]]
    return np.diff(np.r_[0, np.flatnonzero(pixels[1:] != pixels[:-1])]).tolist()


def test_empty_runs_change_nothing_though_pycocotools_stops_at_them():
    runs = [[4, 8, 4], [4, 6, 6], [4, 4, 0, 4, 4], [4, 4, 0, 2, 6]]  # the last two are the first two, with an empty run
    codes = [mask_tools.frPyObjects({"size": [4, 4], "counts": counts}, 4, 4) for counts in runs]
    assert mask_tools.iou(codes[:1], codes[1:2], [0]).item() == 0.75
    assert mask_tools.iou(codes[2:3], codes[3:], [0]).item() == 1
    for pred, target in ((0, 1), (2, 3), (0, 3), (2, 1)):
        results = results_for([entry([codes[pred]])], [entry([codes[target]])])
        assert results["map"] == pytest.approx(0.6)  # up to 0.75 of 0.5, 0.55, ..., 0.95


@pytest.mark.parametrize("empty", [torch.zeros(0, 64, 64, dtype=torch.bool), [], torch.zeros(0), np.zeros((0, 9, 9))])
def test_no_masks_of_any_form(empty):
    assert results_for([entry(empty)], [entry(square()[None])])["map"] == 0
    assert results_for([entry(square()[None])], [entry(empty)])["map"] == -1
    assert results_for([entry(empty)], [entry(empty)])["map"] == -1


FLOATS = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
GOOD = {"size": [64, 64], "counts": [4096]}


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        ({"labels": torch.zeros(1).long(), "scores": torch.ones(1)}, "has no 'masks', only 'labels', 'scores'"),
        (entry(FLOATS), r"float32; they have to be bool, .* masks > 0.5"),
        (entry(FLOATS.bfloat16()), "they have to be bool, .* masks > 0.5"),
        (entry([FLOATS[0].bfloat16()]), "they have to be bool, .* masks > 0.5"),
        (entry([[[1, 0], [1]]]), "cannot be read as an array: .*inhomogeneous"),
        (entry((FLOATS > 0.5).to_sparse()), "cannot be read as an array: .*Sparse"),
        (entry([GOOD, FLOATS[0] > 0.5]), "place 1 .* is no run-length code: TypeError: it is a Tensor"),
        (entry(FLOATS[None] > 0.5), r"shape \(1, 1, 64, 64\), with a channel, .* masks\[:, 0\] > 0.5"),
        (entry([[[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]]), "Of polygons pycocotools.mask.frPyObjects"),
        (entry([[]]), r"shape \(1, 0\); they have to be \(N, height, width\).* of polygons"),
        (entry(["mask.png"]), r"shape \(1,\); they have to be \(N, height, width\)"),
        (entry(FLOATS[0] > 0.5), r"shape \(64, 64\)"),
        (entry([square(size=64), square(size=32)]), r"several shapes: \(32, 32\), \(64, 64\)"),
        (entry(square(size=32)[None]), "are 32x32 pixels .* in the prediction and 64x64 in the target"),
        (entry([GOOD, {"size": [32, 128], "counts": [4096]}]), "several sizes: 32x128, 64x64"),
        (entry([{"size": [64, 64], "counts": [4095]}]), "cover less than 64x64 pixels"),
        (entry([{"size": [64, 64], "counts": [4097]}]), "place 0 .* is no run-length code: .*4097"),
        (entry([GOOD, {"size": [64, 64], "counts": [-1, 4097]}]), "place 1 .* is no run-length code"),
        (entry([{"size": [64, 64], "counts": b"zz"}]), "cover less than 64x64"),
        (entry([{"size": [0, 64], "counts": []}]), "the size is 0x64"),
        (entry([{"size": [64], "counts": [64]}]), "is no run-length code"),
        (entry([{"counts": [64]}]), "is no run-length code: KeyError: 'size'"),
        (entry([GOOD, [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]), "of a polygon pycocotools.mask.frPyObjects"),
        (entry(square()[None], labels=torch.zeros(2).long()), "it has 1 masks. Pass one value for each"),
        (entry(square()[None], labels=torch.ones(1).long()), "a label that is not listed"),
        (entry(square()[None], scores=torch.tensor([float("nan")])), "NaN or infinite"),
    ],
)
def test_what_cannot_be_counted_is_an_error_that_names_the_image(pred, message):
    metric = MeanAveragePrecision(["a"], iou_type="segm")
    with pytest.raises(ValueError, match=message) as error:
        metric.update(["first", "second"], [entry([]), pred], [entry([]), entry(square()[None])])
    assert "image second" in str(error.value)
    assert metric.num_images == 0


@pytest.mark.parametrize("pred", [[1], entry({"size": [64, 64], "counts": [4096]})])
def test_what_is_no_dict_or_no_list_is_a_type_error(pred):
    with pytest.raises(TypeError, match="image 0"):
        MeanAveragePrecision(["a"], iou_type="segm").update([0], [pred], [entry(square()[None])])


def test_one_image_twice_is_an_error_if_its_masks_are_others():
    two = np.zeros((2, 1, 3, 3), bool)
    two[0, 0, 0, 0] = two[0, 0, 2, 2] = two[1, 0, 0, 2] = two[1, 0, 2, 0] = True  # equal boxes and areas
    metric = MeanAveragePrecision(["a"], iou_type="segm")
    metric.update([0], [entry(two[0])], [entry(two[1])])
    metric.update([0], [entry(two[0])], [entry(two[1])])
    assert metric.num_images == 1
    with pytest.raises(ValueError, match="Image 0 came twice, with other masks"):
        metric.update([0], [entry(two[1])], [entry(two[1])])


def test_masks_of_a_batch_are_kept_as_they_were_though_its_tensors_change():
    masks = torch.from_numpy(square()[None].copy())
    metric = MeanAveragePrecision(["a"], iou_type="segm")
    metric.update([0], [entry(masks)], [entry(masks)])
    state = metric.to_bytes()
    masks.zero_()
    assert metric.to_bytes() == state
    assert metric.compute()["map"] == pytest.approx(1)


def test_states_of_boxes_and_of_masks_do_not_mix_and_damaged_ones_are_errors(tmp_path):
    case = random_case_of_masks(3)
    masks = metric_of(case)
    assert isinstance(masks, Metric)
    boxes = MeanAveragePrecision(masks.classes)
    with pytest.raises(SettingError, match="with masks, and this one is without"):
        boxes.merge_bytes(masks.to_bytes())
    with pytest.raises(SettingError, match="without masks, and this one is with"):
        masks.merge_bytes(boxes.to_bytes())
    with pytest.raises(SettingError, match="iou_type is 'segm', this one's 'bbox'"):
        boxes.merge(masks)
    for damaged in (masks.to_bytes()[:-1], masks.to_bytes() + b" ", b"", masks.to_bytes()[:20]):
        with pytest.raises(ValueError, match=r"part is missing|not the state"):
            MeanAveragePrecision(masks.classes, iou_type="segm").merge_bytes(damaged)
    torch.save(masks.state_dict(), tmp_path / "state.pt")
    loaded = MeanAveragePrecision(masks.classes, iou_type="segm", **case.settings)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.compute() == masks.compute()
    assert loaded.to_bytes() == masks.to_bytes()


def test_another_iou_type_is_an_error():
    with pytest.raises(SettingError, match="iou_type is 'keypoints'"):
        MeanAveragePrecision(["a"], iou_type="keypoints")  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_and_updates_after_its_parent_did():
    case = random_case_of_masks(5)
    metric = metric_of(case)
    expected = metric.compute()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_results, args=(case, sender))
    process.start()
    try:
        assert receiver.poll(60), "the child does not answer"
        assert receiver.recv() == expected
    finally:
        process.kill()
        process.join()


def _send_results(case: Case, connection: Any) -> None:
    connection.send(metric_of(case).compute())
    connection.close()
