"""Non-maximum suppression of 10,000 boxes: torch_frame.vision beside OpenCV and torchvision, where these are installed.

    python benchmarks/nms.py [--boxes 10000] [--rounds 7] [--output benchmarks/results/nms.json]

Four scenes: `crowded`, boxes of up to 60 pixels on 640 x 640; `scattered`, of up to 20 on 5000 x 5000, of which hardly any
overlap; `large`, of up to 600 on 640 x 640, of which few stay; `all stay`, these with an IoU threshold of 0.95, so that all pairs
count. CPU time of one call, median. torchvision's figures are of its own call; OpenCV takes lists and is given them ready made.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import write

from torch_frame.vision import batched_nms, nms
from torch_frame.vision._optional import opencv, torchvision_ops

SCENES = {
    "crowded": (640, 60, 0.5),
    "scattered": (5000, 20, 0.5),
    "large": (640, 600, 0.5),
    "all stay": (640, 600, 0.95),
}


def scene(count: int, span: float, size: float) -> tuple[Any, Any, Any]:
    """(count, 4) xyxy and (count,) scores and classes of 80, float32 and int64."""
    rng = np.random.default_rng(0)
    corner, sides = rng.uniform(0, span, (count, 2)), rng.uniform(1, size, (count, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    return boxes, rng.random(count, dtype=np.float32), rng.integers(0, 80, count)


def calls(count: int, span: float, size: float, threshold: float) -> dict[str, Callable[[], Any]]:
    """Name of a row -> what is timed."""
    boxes, scores, classes = scene(count, span, size)
    doubles, tensors = boxes.astype(np.float64), (torch.from_numpy(boxes), torch.from_numpy(scores))
    rows: dict[str, Callable[[], Any]] = {
        "nms, float32": lambda: nms(boxes, scores, threshold),
        "nms, float64": lambda: nms(doubles, scores, threshold),
        "batched_nms, 80 classes": lambda: batched_nms(boxes, scores, classes, threshold),
    }
    theirs, cv2 = torchvision_ops(), opencv()
    if theirs is not None:
        rows["torchvision"] = lambda: theirs.nms(*tensors, threshold)
    if cv2 is not None and count <= 10_000:
        listed = np.c_[boxes[:, :2], boxes[:, 2:] - boxes[:, :2]].tolist(), scores.tolist()
        rows["OpenCV"] = lambda: cv2.dnn.NMSBoxes(*listed, 0.0, threshold)
    return rows


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, Any]] = {}
    for name, (span, size, threshold) in SCENES.items():
        boxes, scores, _ = scene(options.boxes, span, size)
        kept = len(nms(boxes, scores, threshold))
        print(f"{name}: {options.boxes} boxes, {kept} stay")
        figures[name] = {"kept": kept}
        for row, call in calls(options.boxes, span, size, threshold).items():
            figures[name][row] = round(median_ms(call, 1 if row == "OpenCV" else options.rounds), 1)
            print(f"  {row:<24} {figures[name][row]:9.1f} ms")
    theirs = opencv()
    versions = {"numpy": np.__version__, "opencv": theirs.__version__ if theirs is not None else None}
    write(options.output, figures, boxes=options.boxes, unit="ms of CPU time", **versions)


if __name__ == "__main__":
    main()
