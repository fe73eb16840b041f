"""Random images for detection metrics, and pycocotools' results for them."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ARRAYS = ("precision", "recall", "scores")


@dataclass
class Case:
    """Images in the order of their ids. Boxes are xywh; `area` and `iscrowd` always stand in `targets`."""

    num_classes: int
    ids: list[Any]
    preds: list[dict[str, np.ndarray]]
    targets: list[dict[str, np.ndarray]]
    settings: dict[str, Any] = field(default_factory=dict)  # of MeanAveragePrecision


def pycocotools_evaluation(case: Case, iou_type: str = "bbox") -> COCOeval:
    """Evaluated, accumulated and, where there are three limits, summarised."""
    with contextlib.redirect_stdout(io.StringIO()):
        if iou_type == "bbox":
            sides = [_coco(case, case.targets), _coco(case, case.preds)]
        else:
            sides = _coco_of_masks(case)
        evaluation = COCOeval(*sides, iou_type)
        params, settings = evaluation.params, case.settings
        params.iouThrs = np.array(settings.get("iou_thresholds", params.iouThrs), float)
        params.recThrs = np.array(settings.get("rec_thresholds", params.recThrs), float)
        params.maxDets = list(settings.get("max_dets", params.maxDets))
        if "area_ranges" in settings:
            params.areaRng = [list(ends) for ends in settings["area_ranges"].values()]
            params.areaRngLbl = list(settings["area_ranges"])
        evaluation.evaluate()
        evaluation.accumulate()
        if len(params.maxDets) >= 3:
            evaluation.summarize()
    return evaluation


def _coco(case: Case, of_images: list[dict[str, np.ndarray]]) -> COCO:
    annotations = []
    for image, rows in enumerate(of_images):
        for k, (box, label) in enumerate(zip(rows["boxes"].tolist(), rows["labels"].tolist(), strict=True)):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box}
            if "scores" in rows:
                annotation |= {"score": float(rows["scores"][k]), "area": box[2] * box[3], "iscrowd": 0}
            else:
                annotation |= {"area": float(rows["area"][k]), "iscrowd": int(rows["iscrowd"][k])}
            annotations.append(annotation)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(case.ids))],
        "categories": [{"id": k, "name": str(k)} for k in range(case.num_classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _coco_of_masks(case: Case) -> list[COCO]:
    """As COCO's own files are read: truth with `area`, results of nothing but codes and scores through `loadRes`."""
    truth, results = [], []
    for image, (target, pred) in enumerate(zip(case.targets, case.preds, strict=True)):
        for k, label in enumerate(target["labels"].tolist()):
            of_one = {
                "id": len(truth) + 1,
                "image_id": image,
                "category_id": label,
                "iscrowd": int(target["iscrowd"][k]),
            }
            code = pycocotools_code(target["masks"][k])
            area = float(target["area"][k]) if "area" in target else float(mask_tools.area(code))
            truth.append(of_one | {"segmentation": code, "area": area})
        for k, label in enumerate(pred["labels"].tolist()):
            of_one = {"image_id": image, "category_id": label, "score": float(pred["scores"][k])}
            results.append(of_one | {"segmentation": pycocotools_code(pred["masks"][k])})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "height": 1, "width": 1} for image in range(len(case.ids))],
        "categories": [{"id": k, "name": str(k)} for k in range(case.num_classes)],
        "annotations": truth,
    }
    coco.createIndex()
    if results:
        return [coco, coco.loadRes(results)]
    nothing = COCO()
    nothing.dataset = coco.dataset | {"annotations": []}
    nothing.createIndex()
    return [coco, nothing]


def pycocotools_code(mask: Any) -> dict[str, Any]:
    """A mask or a code as pycocotools' compressed code."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        if isinstance(counts, list):
            return mask_tools.frPyObjects(mask, *mask["size"])
        return {"size": list(mask["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}
    return mask_tools.encode(np.asfortranarray(np.asarray(mask) != 0).astype(np.uint8))


def random_case_of_masks(seed: int) -> Case:
    """As `random_case`, of masks: overlapping, equal, empty, full, ragged, of borderline areas; as arrays and codes."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    kind, some = int(rng.integers(5)), int(rng.choice([0, 2, 6, 10]))
    preds, targets = [], []
    for _ in range(num_images):
        height, width = rng.integers(1, 24, 2) if kind < 4 else rng.integers(60, 130, 2)
        num_truth, num_preds = int(rng.integers(0, some + 1)), int(rng.integers(0, 14))
        truth = _random_masks(rng, kind, num_truth, int(height), int(width))
        masks = _random_masks(rng, kind, num_preds, int(height), int(width))
        labels, pred_labels = rng.integers(0, num_classes, num_truth), rng.integers(0, num_classes, num_preds)
        if num_truth:  # most of them are some truth, moved, cut or as it is
            source = rng.integers(0, num_truth, num_preds)
            for k in np.flatnonzero(rng.random(num_preds) < 0.7):
                masks[k] = np.roll(truth[source[k]], rng.choice([0, 0, 1, -2], 2), (0, 1))
                masks[k] &= rng.random(masks[k].shape) >= rng.choice([0, 0, 0.2])
                pred_labels[k] = labels[source[k]]
        crowd = (rng.random(num_truth) < rng.choice([0, 0, 0.2, 0.8])).astype(np.int64)
        target = {"masks": _in_some_form(rng, truth), "labels": labels, "iscrowd": crowd}
        if rng.random() < 0.4:
            target["area"] = rng.choice([0, -1, 100.0, 1024.0, 9216.0, 1e10], num_truth)
        scores = [rng.random(num_preds), rng.integers(0, 4, num_preds) / 4, np.ones(num_preds), -rng.random(num_preds)]
        preds.append({"masks": _in_some_form(rng, masks), "labels": pred_labels, "scores": scores[rng.integers(4)]})
        targets.append(target)
    return Case(num_classes, _random_ids(rng, num_images), preds, targets, _random_settings(rng))


def _random_masks(rng: np.random.Generator, kind: int, n: int, height: int, width: int) -> np.ndarray:
    """(n, height, width) bool."""
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        if kind == 0:
            mask[:] = rng.random((height, width)) < rng.choice([0.05, 0.5, 0.95])
        elif kind == 1:
            mask[:] = rng.choice([0, 0, 1])  # nothing, or all of it
        elif kind == 4:  # sides at the borders of COCO's area ranges
            top, left = rng.integers(0, 4, 2) * 10
            mask[top : top + rng.choice([10, 32, 96]), left : left + rng.choice([10, 32, 96])] = True
        else:
            (top, bottom), (left, right) = (
                np.sort(rng.integers(0, height + 1, 2)),
                np.sort(rng.integers(0, width + 1, 2)),
            )
            mask[top:bottom, left:right] = True if kind == 2 else rng.random((bottom - top, right - left)) < 0.7
    return masks


def _in_some_form(rng: np.random.Generator, masks: np.ndarray) -> Any:
    """bool or uint8 tensors of 0 and 1 or of 0 and 255, or pycocotools' codes: bytes, text, or runs."""
    form = int(rng.integers(6))
    if form < 3:
        return torch.from_numpy([masks, masks.astype(np.uint8), masks.astype(np.uint8) * 255][form])
    codes = [mask_tools.encode(np.asfortranarray(mask).astype(np.uint8)) for mask in masks]
    if form == 4:
        return [{**code, "counts": code["counts"].decode()} for code in codes]
    return codes if form == 3 else [{"size": list(mask.shape), "counts": _runs(mask)} for mask in masks]


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs down the columns, the first one of pixels outside."""
    pixels = np.r_[False, mask.ravel(order="F")]
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(np.r_[0, changes, mask.size]).tolist()


def random_case(seed: int) -> Case:
    """Small images with many ties: scores, IoUs at thresholds, boxes twice, crowd, empty images, no area, custom settings."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    kind, some = int(rng.integers(5)), int(rng.choice([0, 2, 6, 12]))
    targets = [_random_target(rng, kind, int(rng.integers(0, some + 1)), num_classes) for _ in range(num_images)]
    preds = [_random_pred(rng, kind, target, num_classes) for target in targets]
    return Case(num_classes, _random_ids(rng, num_images), preds, targets, _random_settings(rng))


def _random_boxes(rng: np.random.Generator, kind: int, n: int) -> np.ndarray:
    """(n, 4) xywh."""
    if kind == 0:
        return np.c_[rng.integers(0, 20, (n, 2)), rng.integers(1, 20, (n, 2))].astype(float)
    if kind == 1:
        return np.c_[rng.random((n, 2)) * 200, rng.random((n, 2)) * 150]
    if kind == 2:  # sides at the borders of COCO's area ranges
        return np.c_[rng.integers(0, 4, (n, 2)) * 10, rng.choice([10, 20, 32, 96, 100], (n, 2))].astype(float)
    if kind == 3:
        return (rng.random((n, 4)) * 100).astype(np.float32).astype(float)
    return np.c_[rng.integers(0, 3, (n, 2)), rng.integers(-2, 5, (n, 2))].astype(float)  # no area, negative sides


def _random_target(rng: np.random.Generator, kind: int, n: int, num_classes: int) -> dict[str, np.ndarray]:
    boxes = _random_boxes(rng, kind, n)
    area = boxes[:, 2] * boxes[:, 3]
    if rng.random() < 0.5:
        area = np.where(rng.random(n) < 0.5, area * rng.random(n), area)
    if rng.random() < 0.2:
        area = np.where(rng.random(n) < 0.5, rng.choice([0, -1, 1024.0, 9216.0, 1e10, 2e10], n), area)
    crowd = (rng.random(n) < rng.choice([0, 0, 0.2, 0.8])).astype(np.int64)
    return {"boxes": boxes, "labels": rng.integers(0, num_classes, n), "area": area, "iscrowd": crowd}


def _random_pred(
    rng: np.random.Generator, kind: int, target: dict[str, Any], num_classes: int
) -> dict[str, np.ndarray]:
    n, num_truth = int(rng.integers(0, 20)), len(target["boxes"])
    boxes, labels = _random_boxes(rng, kind, n), rng.integers(0, num_classes, n)
    if num_truth:  # most of them near some truth, many right on it
        source = rng.integers(0, num_truth, n)
        moved = target["boxes"][source] + rng.choice([0, 0, 0, 1], (n, 4)) * rng.integers(-3, 4, (n, 4))
        near = rng.random(n) < 0.7
        boxes, labels = np.where(near[:, None], moved, boxes), np.where(near, target["labels"][source], labels)
    scores = [rng.random(n), rng.integers(0, 4, n) / 4, np.ones(n), -rng.random(n), rng.choice([0.0, -0.0], n)]
    return {"boxes": boxes, "labels": labels, "scores": scores[rng.integers(5)]}


def _random_ids(rng: np.random.Generator, n: int) -> list[Any]:
    """Ids of one type, in their order."""
    numbers = sorted(rng.choice(100, n, replace=False).tolist())
    return [
        numbers,
        [-1000 + number for number in numbers],
        [f"{number:03}.jpg" for number in numbers],
        [("val", number) for number in numbers],
        [number / 7 for number in numbers],
        [f"{number:03}".encode() for number in numbers],
    ][rng.integers(6)]


def _random_settings(rng: np.random.Generator) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if rng.random() < 0.4:
        thresholds = [[0.5], [0.3, 0.55, 0.9], [0.0, 0.5, 1.0], [0.75, 0.5], rng.random(4).tolist()]
        float32 = torch.linspace(0.5, 0.95, 10).tolist()
        settings["iou_thresholds"] = [*thresholds, float32][rng.integers(6)]
    if rng.random() < 0.4:
        grids = [[0.0], np.linspace(0, 1, 11), np.sort(rng.random(7)), torch.linspace(0, 1, 101).tolist()]
        settings["rec_thresholds"] = grids[rng.integers(4)]
    if rng.random() < 0.4:
        limits = set(rng.integers(1, 12, rng.integers(1, 5)).tolist())
        settings["max_dets"] = sorted(limits | ({100} if rng.random() < 0.3 else set()))
    if rng.random() < 0.4:
        ranges = {f"range{i}": sorted(rng.integers(0, 400, 2).tolist()) for i in range(rng.integers(0, 4))}
        settings["area_ranges"] = {"all": (0, 1e10), **{name: (float(a), float(b)) for name, (a, b) in ranges.items()}}
    return settings
