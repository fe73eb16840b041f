"""ObjDetMAPMetric: 1.7's metric of a detection model, with VOC's values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_frame.errors import SettingError
from torch_frame.metrics._batch import DETECTION_COLUMNS, TRUTH_COLUMNS, Table, detection_tables, truth_tables
from torch_frame.metrics._images import led_by_place, pack, unpack
from torch_frame.metrics.metric import ModelMetric
from torch_frame.metrics.voc import voc_average_precision
from torch_frame.vision.postprocess import det_postprocess


class ObjDetMAPMetric(ModelMetric):
    """VOC's eleven-point average precision of a detection model: `ap_<class>` and their mean `map`.

    Runs the model on `inputs`, a pair (images, truth); override `inference` where batches look different. Truth is a tensor
    (B, M, 5), or for each image one of (M, 5), of rows (class index, box); rows of zeros, and of a negative class, are padding.
    The result depends on the images alone, not on their order; equal scores count in the order of the images' content.

    Args:
        class2idx: class name -> its index in truth and predictions. Boxes of other indices are left out.
        is_xyxy: whether truth's boxes are x1, y1, x2, y2; else centre x, centre y, w, h.
        ovthresh: the IoU from which on a detection is right.
        postprocess: what the model returned -> for each image None or (n, 6) rows x1, y1, x2, y2, score, class index.
            None: `torch_frame.vision.det_postprocess`, whatever the classes, with the two thresholds below; the head has a class
            score for each index up to the highest one in `class2idx`.
        confthre: lowest score that counts. nmsthre: highest IoU of two boxes that are both kept. For postprocess=None alone.

    >>> truth = torch.tensor([[[0.0, 5.0, 5.0, 10.0, 10.0]]])
    >>> metric = ObjDetMAPMetric({"cat": 0, "dog": 1}, postprocess=lambda outputs: outputs)
    >>> metric.update(lambda images: [torch.tensor([[0.0, 0.0, 10.0, 10.0, 0.9, 0.0]])], (None, truth))
    >>> metric.evaluate()
    {'ap_cat': 1.0, 'ap_dog': -1.0, 'map': 1.0}
    """

    higher_is_better = True

    def __init__(
        self,
        class2idx: Mapping[str, int],
        is_xyxy: bool = False,
        ovthresh: float = 0.5,
        postprocess: Callable[[Any], Iterable[Any]] | None = None,
        confthre: float = 0.7,
        nmsthre: float = 0.45,
    ) -> None:
        if not class2idx or len(set(class2idx.values())) < len(class2idx):
            raise SettingError(f"class2idx is {class2idx!r}; it has to give each class an index of its own.")
        if not 0 < ovthresh <= 1:
            raise SettingError(f"ovthresh is {ovthresh}; an IoU threshold is above 0 and at most 1.")
        self.class2idx = dict(class2idx)
        self.is_xyxy = is_xyxy
        self.ovthresh = ovthresh
        self.postprocess = postprocess or partial(
            det_postprocess,
            num_classes=int(max(class2idx.values())) + 1,  # the indices may have gaps
            conf_thre=confthre,
            nms_thre=nmsthre,
            class_agnostic=True,
            merge_score=True,
        )
        self._places = {index: place for place, index in enumerate(class2idx.values())}
        self._images: list[tuple[Table, Table]] = []

    def inference(self, model: Any, inputs: Any) -> Any:
        """(images, truth) -> (what the model returned, truth)."""
        images, truth = inputs
        return model(images), truth

    def collection(self, item: Any) -> None:
        """Take in (what the model returned, truth) of a batch.

        Raises:
            ValueError: where rows can't be counted, with the number of the image, from 0 in the order they came.
        """
        outputs, truth = item
        preds = [self._pred(rows) for rows in self.postprocess(outputs)]
        targets = [self._target(rows) for rows in truth]
        if len(preds) != len(targets):
            raise ValueError(f"The batch has predictions for {len(preds)} images and truth for {len(targets)}.")
        numbers = list(range(len(self._images), len(self._images) + len(preds)))
        detection_rows = detection_tables(numbers, preds, len(self.class2idx), "xyxy")
        truth_rows = truth_tables(numbers, targets, len(self.class2idx), "xyxy" if self.is_xyxy else "cxcywh")
        self._images += zip(detection_rows, truth_rows, strict=True)

    def evaluate(self) -> dict[str, float]:
        """`ap_<class>` for each class, -1 where it has no truth, and `map`, the mean of the others (-1 where there is none)."""
        images = sorted(self._images, key=lambda tables: (tables[0].tobytes(), tables[1].tobytes()))
        detections = led_by_place([detections for detections, _ in images], len(DETECTION_COLUMNS))
        truth = led_by_place([truth for _, truth in images], len(TRUTH_COLUMNS))
        values = voc_average_precision(detections, truth, len(self.class2idx), self.ovthresh).eleven_point
        results = {f"ap_{name}": value for name, value in zip(self.class2idx, values.tolist(), strict=True)}
        with_truth = values[values > -1]
        return {**results, "map": float(with_truth.mean()) if with_truth.size else -1.0}

    def result_names(self) -> list[str]:
        """The names of the results."""
        return [*(f"ap_{name}" for name in self.class2idx), "map"]

    def compute(self) -> dict[str, float]:
        """As `evaluate`."""
        return self.evaluate()

    def reset(self) -> None:
        """Forget all images."""
        self._images = []

    def merge(self, other: ObjDetMAPMetric) -> None:
        """Take in the images of another metric of the same classes."""
        if other.class2idx != self.class2idx:
            raise SettingError("The other metric has another class2idx. Make both with the same.")
        self._images = [*self._images, *other._images]

    def to_bytes(self) -> bytes:
        """The state as numbers and JSON in one run of bytes."""
        return pack(list(self.class2idx), range(len(self._images)), self._images)

    def merge_bytes(self, data: bytes) -> None:
        """Take in the images of what `to_bytes` of another metric, in any process, returned."""
        self._images = [*self._images, *((rows, truth) for _, rows, truth in unpack(data, list(self.class2idx)))]

    def state_dict(self) -> dict[str, Any]:
        """{"images": (B,) uint8}, the bytes of `to_bytes`."""
        return {"images": torch.frombuffer(bytearray(self.to_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a state in place of this one's."""
        self._images = []
        self.merge_bytes(state["images"].cpu().numpy().tobytes())

    def _pred(self, rows: Any) -> dict[str, Any]:
        rows = _rows(rows, 6, "postprocess returned", "x1, y1, x2, y2, score, class index")
        listed, labels = self._labels(rows, rows[:, 5])
        return {"boxes": rows[listed, :4], "scores": rows[listed, 4], "labels": labels}

    def _target(self, rows: Any) -> dict[str, Any]:
        rows = _rows(rows, 5, "Truth is", "class index, box")
        rows = rows[(rows != 0).any(axis=1) & ~(rows[:, 0] < 0)]
        listed, labels = self._labels(rows, rows[:, 0])
        return {"boxes": rows[listed, 1:], "labels": labels}

    def _labels(self, rows: Table, indices: Table) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which of the (n, ...) rows count, and the places of their class indices (n,) in `class2idx`.

        A row with NaN or infinity does, for its error to be told.
        """
        places = np.array([self._places.get(index, -1) for index in indices.tolist()], dtype=np.int64)
        counted = (places >= 0) | ~np.logical_and.reduce(np.isfinite(rows), axis=1)
        return counted, places[counted]


def _rows(rows: Any, width: int, what: str, columns: str) -> Table:
    """An image's rows as (n, width) float64 on the CPU."""
    if rows is None:
        return np.empty((0, width))
    array = rows.detach().to("cpu", torch.float64).numpy() if isinstance(rows, Tensor) else np.asarray(rows, np.float64)
    if array.size == 0:
        return np.empty((0, width))
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{what} an array of shape {array.shape} for an image; it has to be (n, {width}): {columns}.")
    return array
