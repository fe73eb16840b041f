"""COCO's mean average precision by four libraries on the same boxes: CPU time, peak memory, and how far from pycocotools.

The data is generated, of the size of COCO val2017 with a hundred detections an image: 5,000 images, 80 classes, 36,000 boxes of
truth and 500,000 detections, most of them near some truth. Each library runs in a process of its own, given the same float32
tensors in batches of 16, as an evaluation loop has them; what it needs to turn them into its own form counts. The figures are of
one run, for torch-frame the median of five. torchmetrics needs torchvision, which is not among this project's development
packages; where it is missing the output says so.

    python benchmarks/detection_map.py [--small] [--only torch-frame ...] [--output benchmarks/results/detection_map.json]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

Batch = tuple[list[int], list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]
Result = tuple[list[float], np.ndarray | None]
"""The 12 numbers, and the precision array (T, R, K, A, M) where the library gives it."""

NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
NAMES += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
NUM_CLASSES = 80
BATCH_SIZE = 16


def generate(num_images: int) -> list[Batch]:
    """Batches of ids, predictions and targets; boxes xyxy in a 640 x 480 image."""
    rng = np.random.default_rng(0)
    images = [generate_image(rng) for _ in range(num_images)]
    return [
        (
            list(range(start, min(start + BATCH_SIZE, num_images))),
            *map(list, zip(*images[start : start + BATCH_SIZE], strict=True)),
        )
        for start in range(0, num_images, BATCH_SIZE)
    ]  # type: ignore[misc]  # a starred tuple


def generate_image(rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    num_truth, num_detections = int(rng.poisson(7.2)), 100
    truth, labels = random_boxes(rng, num_truth), rng.integers(0, NUM_CLASSES, num_truth)
    boxes, found = random_boxes(rng, num_detections), rng.integers(0, NUM_CLASSES, num_detections)
    if num_truth:
        source, near = rng.integers(0, num_truth, num_detections), rng.random(num_detections) < 0.6
        sides = np.tile(truth[source, 2:] - truth[source, :2], 2)
        boxes = np.where(near[:, None], truth[source] + rng.normal(0, 0.1, boxes.shape) * sides, boxes)
        found = np.where(near, labels[source], found)
    scores = np.round(rng.random(num_detections), 3)  # some ties
    pred = {"boxes": boxes, "scores": scores}
    target = {"boxes": truth, "iscrowd": (rng.random(num_truth) < 0.01).astype(np.int64)}
    return (
        {name: torch.from_numpy(values.astype(np.float32)) for name, values in pred.items()}
        | {"labels": torch.from_numpy(found)},
        {
            "boxes": torch.from_numpy(target["boxes"].astype(np.float32)),
            "labels": torch.from_numpy(labels),
            "iscrowd": torch.from_numpy(target["iscrowd"]),
        },
    )


def random_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 4) xyxy, sides from a few to a few hundred pixels."""
    corners = rng.random((n, 2)) * [540, 380]
    return np.c_[corners, corners + np.exp(rng.normal(3.8, 0.9, (n, 2))).clip(2, 400)]


def ours(batches: list[Batch]) -> Result:
    from torch_frame.metrics import MeanAveragePrecision

    metric = MeanAveragePrecision([str(k) for k in range(NUM_CLASSES)])
    for image_ids, preds, targets in batches:
        metric.update(image_ids, preds, targets)
    results = metric.compute()
    return [results[name] for name in NAMES], metric.compute_arrays().precision


def annotations(batches: list[Batch]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO's dicts of truth and of detections."""
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_ids, preds, targets in batches:
        for image_id, pred, target in zip(image_ids, preds, targets, strict=True):
            for box, label, crowd in zip(
                xywh(target), target["labels"].tolist(), target["iscrowd"].tolist(), strict=True
            ):
                row = {"id": len(truth) + 1, "image_id": image_id, "category_id": label, "bbox": box}
                truth.append(row | {"area": box[2] * box[3], "iscrowd": crowd})
            for box, label, score in zip(xywh(pred), pred["labels"].tolist(), pred["scores"].tolist(), strict=True):
                detections.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    images = [{"id": image_id} for image_ids, _, _ in batches for image_id in image_ids]
    categories = [{"id": k, "name": str(k)} for k in range(NUM_CLASSES)]
    return {"images": images, "categories": categories, "annotations": truth, "info": {}}, detections


def xywh(rows: dict[str, torch.Tensor]) -> list[list[float]]:
    boxes = rows["boxes"].double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()  # type: ignore[no-any-return]  # lists of floats


def evaluate_dicts(coco_class: Any, evaluation_class: Any, batches: list[Batch]) -> Result:
    truth, detections = annotations(batches)
    coco = coco_class()
    coco.dataset = truth
    coco.createIndex()
    evaluation = evaluation_class(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]], np.asarray(evaluation.eval["precision"])


def pycocotools(batches: list[Batch]) -> Result:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return evaluate_dicts(COCO, COCOeval, batches)


def faster_coco_eval(batches: list[Batch]) -> Result:
    from faster_coco_eval import COCO, COCOeval_faster

    return evaluate_dicts(COCO, COCOeval_faster, batches)


def torchmetrics(backend: str) -> Callable[[list[Batch]], Result]:
    def run(batches: list[Batch]) -> Result:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(backend=backend)
        metric.warn_on_many_detections = False
        for _, preds, targets in batches:
            metric.update(preds, targets)
        results = metric.compute()
        return [float(results[name]) for name in NAMES], None

    return run


LIBRARIES: dict[str, Callable[[list[Batch]], Result]] = {
    "torch-frame": ours,
    "pycocotools": pycocotools,
    "faster-coco-eval": faster_coco_eval,
    "torchmetrics": torchmetrics("pycocotools"),
    "torchmetrics, faster_coco_eval": torchmetrics("faster_coco_eval"),
}


def measure(name: str, num_images: int, rounds: int, connection: Any) -> None:
    """In a process of its own: run one library and send its figures and its arrays."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the libraries' own advice
    batches = generate(num_images)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            LIBRARIES[name](batches[:2])  # imports and first calls don't count
        except ImportError as error:
            connection.send({"missing": str(error).split(" (/")[0]})
            return
        before = peak_mib()
        seconds = []
        for _ in range(rounds):
            started, wall = time.process_time(), time.perf_counter()
            numbers, precision = LIBRARIES[name](batches)
            seconds.append((time.process_time() - started, time.perf_counter() - wall))
    cpu, elapsed = (statistics.median(column) for column in zip(*seconds, strict=True))
    connection.send(
        {
            "rounds": rounds,
            "cpu_s": cpu,
            "wall_s": elapsed,
            "peak_mib": peak_mib() - before,
            "numbers": numbers,
            "precision": precision,
        }
    )
    connection.close()


def peak_mib() -> float:
    """The most memory this process has held; it never falls."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measured(names: list[str], num_images: int) -> Iterator[tuple[str, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        num_rounds = 5 if name == "torch-frame" else 1
        process = context.Process(target=measure, args=(name, num_images, num_rounds, sender))
        process.start()
        sender.close()
        yield name, receiver.recv()
        process.join()


def difference(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest difference in the 12 numbers and, where both have it, in the precision array."""
    largest = float(np.abs(np.subtract(row["numbers"], reference["numbers"])).max())
    if row["precision"] is not None and reference["precision"] is not None:
        largest = max(largest, float(np.abs(row["precision"] - reference["precision"]).max()))
    return largest


def installed_versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "hotcoco", "pycocotools", "faster-coco-eval", "torchmetrics", "torchvision"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="200 images instead of 5,000")
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--output", help="write the figures here, as JSON")
    options = parser.parse_args()
    num_images = 200 if options.small else 5000
    rows = {}
    for name, row in measured(options.only, num_images):
        if "missing" in row:
            print(f"{name} can't be measured: {row['missing']}. Is torchvision installed?")
        else:
            rows[name] = row
    print(f"{num_images} images, {100 * num_images} detections, {NUM_CLASSES} classes; CPU time of update and compute")
    figures = {}
    for name, row in rows.items():
        figures[name] = {
            "cpu_s": round(row["cpu_s"], 3),
            "wall_s": round(row["wall_s"], 3),
            "peak_mib": round(row["peak_mib"]),
        }
        figures[name]["rounds"] = row["rounds"]
        figures[name]["map"] = row["numbers"][0]
        if "pycocotools" in rows:
            figures[name]["largest_difference"] = difference(row, rows["pycocotools"])
        apart = figures[name].get("largest_difference", float("nan"))
        print(
            f"  {name:<32} {row['cpu_s']:8.2f} s  {row['peak_mib']:7.0f} MiB  map {row['numbers'][0]:.10f}  off by {apart:.2g}"
        )
    if options.output:
        setting = {
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {platform.machine()}, 1 thread of torch, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "versions": installed_versions(),
            "images": num_images,
            "detections": 100 * num_images,
        }
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
