"""The seam to hotcoco: COCO's evaluation of flat arrays, one function.

This file imports nothing of the package, so that a fresh interpreter can run it: hotcoco's threads don't live on in a forked
process, which would wait for them forever.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
MaskArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]

_threads_of_process: int | None = None
"""The process that hotcoco's threads were started in."""


def coco_arrays(
    num_images: int,
    num_classes: int,
    detections: Array,
    truth: Array,
    iou_thresholds: Array,
    rec_thresholds: Array,
    max_dets: Array,
    area_ranges: Array,
    masks: tuple[MaskArrays, MaskArrays] | None = None,
) -> tuple[Array, Array, Array]:
    """Precision, recall and scores as pycocotools' `COCOeval.accumulate` gives them, to the last bit.

    That holds for what `MeanAveragePrecision` lets through. hotcoco 1.3 differs from pycocotools 2.0.11 where `rec_thresholds` or
    `max_dets` don't grow, where `max_dets` has a zero or a number twice, and where the sides of a box are so small, or so small
    beside its coordinates, that the denominator of an IoU is not positive.

    Args:
        num_images: images are 0 to `num_images - 1`, in the order in which ties of scores are resolved.
        num_classes: classes are 0 to `num_classes - 1`.
        detections: (N, 7) image, x, y, w, h, score, class; an image's in input order.
        truth: (M, 8) image, x, y, w, h, area, crowd, class.
        iou_thresholds: (T,). rec_thresholds: (R,), growing. max_dets: (M,), growing, at least 1. area_ranges: (A, 2).
        masks: of the detections and of the truth: sizes (height, width) of each row's mask (N, 2), lengths of their codes (N,),
            the codes (COCO's compressed run-length codes) one after the other (B,). They are compared, and give detections
            their area. None: the boxes are.

    Returns:
        Precision (T, R, K, A, M), recall (T, K, A, M) and scores (T, R, K, A, M); -1 for a class without truth.
    """
    global _threads_of_process
    arguments: list[Any] = [detections, truth, iou_thresholds, rec_thresholds, max_dets, area_ranges]
    for of_side in masks or ():
        arguments += of_side
    if _threads_of_process not in (None, os.getpid()):
        return _in_fresh_interpreter(num_images, num_classes, *arguments)
    _threads_of_process = os.getpid()
    return _evaluate(num_images, num_classes, *arguments)


def _evaluate(
    num_images: int,
    num_classes: int,
    detections: Array,
    truth: Array,
    iou_thresholds: Array,
    rec_thresholds: Array,
    max_dets: Array,
    area_ranges: Array,
    *masks: Any,
) -> tuple[Array, Array, Array]:
    """`masks`: the arrays of the detections' masks and those of the truth's, or nothing."""
    import hotcoco

    if num_images == 0:
        shape = (len(iou_thresholds), len(rec_thresholds), num_classes, len(area_ranges), len(max_dets))
        return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0), np.full(shape, -1.0)
    of_detections: Any
    of_truth: Any
    of_detections, of_truth = (_rles(*masks[:3]), _rles(*masks[3:])) if masks else (None, None)
    coco_truth = hotcoco.COCO.from_arrays(
        [{"id": i} for i in range(num_images)],
        [{"id": k, "name": str(k)} for k in range(num_classes)],
        truth[:, 0].astype(np.int64),
        truth[:, 7].astype(np.int64),
        np.ascontiguousarray(truth[:, 1:5]),
        area=np.ascontiguousarray(truth[:, 5]),
        iscrowd=truth[:, 6].astype(np.int64),
        segmentation=of_truth,
    )
    coco_detections = coco_truth.load_res(detections, segmentation=of_detections)
    if of_detections:  # so far their area is the box's
        areas = np.asarray(hotcoco.mask.area(of_detections), np.float64)
        coco_detections.update_anns(ids=np.arange(1, len(detections) + 1), area=areas)
    evaluation = hotcoco.COCOeval(coco_truth, coco_detections, "segm" if masks else "bbox")
    params = evaluation.params
    params.iou_thrs = iou_thresholds.tolist()
    params.rec_thrs = rec_thresholds.tolist()
    params.max_dets = [int(n) for n in max_dets]
    params.area_rng = area_ranges.tolist()
    params.area_rng_lbl = [str(i) for i in range(len(area_ranges))]
    evaluation.evaluate()
    evaluation.accumulate()
    arrays: Any = evaluation.eval
    return arrays["precision"], arrays["recall"], arrays["scores"]


def _rles(
    sizes: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]
) -> list[dict[str, Any]]:
    codes, ends = data.tobytes(), np.cumsum(lengths).tolist()
    starts = [0, *ends]
    return [
        {"size": size, "counts": codes[start:end]}
        for size, start, end in zip(sizes.tolist(), starts, ends, strict=False)
    ]


def _in_fresh_interpreter(*arguments: Any) -> tuple[Array, Array, Array]:
    asked = io.BytesIO()
    np.savez(asked, *arguments)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        input=asked.getvalue(),
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as answer:
        return answer["arr_0"], answer["arr_1"], answer["arr_2"]


def _answer() -> None:
    """Evaluate what standard input holds and write the arrays to standard output."""
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as asked:
        arguments = [asked[f"arr_{i}"] for i in range(len(asked.files))]
    result = io.BytesIO()
    np.savez(result, *_evaluate(int(arguments[0]), int(arguments[1]), *arguments[2:]))
    sys.stdout.buffer.write(result.getvalue())


if __name__ == "__main__":
    _answer()
