"""COCO's mean average precision: equal to pycocotools to the last bit, merged exactly, under a second for COCO's size."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from torch_frame.errors import SettingError
from torch_frame.metrics._batch import TO_XYWH, Entry, detection_tables, truth_tables
from torch_frame.metrics._coco import coco_arrays
from torch_frame.metrics._ids import as_image_ids
from torch_frame.metrics._images import SeenImages
from torch_frame.metrics._masks import Masks, read_masks, with_boxes
from torch_frame.metrics.voc import VocAP, voc_average_precision

Array = npt.NDArray[np.float64]

AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's names for ranges of areas in square pixels; both ends belong to a range."""


@dataclass(frozen=True)
class PrecisionRecall:
    """What COCO's numbers are means of; -1 where a class has no truth.

    Attributes:
        precision: (T, R, K, A, M) precision at IoU threshold t and recall r of class k, area range a, best m detections an image.
        recall: (T, K, A, M) the highest recall reached.
        scores: (T, R, K, A, M) the score at which recall r is reached.
        iou_thresholds: (T,). rec_thresholds: (R,). classes: K names. area_ranges: A names. max_dets: M numbers.
    """

    precision: Array
    recall: Array
    scores: Array
    iou_thresholds: Array
    rec_thresholds: Array
    classes: tuple[Any, ...]
    area_ranges: tuple[str, ...]
    max_dets: tuple[int, ...]

    def average_precision(self, iou: float | None = None, area: str = "all", max_dets: int = 100) -> float:
        """Mean over classes with truth, recalls, and IoU thresholds (or at one); -1 where there is no such number."""
        return _mean(self._select(self.precision, iou, area, max_dets))

    def average_recall(self, iou: float | None = None, area: str = "all", max_dets: int = 100) -> float:
        """As `average_precision`, of recall."""
        return _mean(self._select(self.recall, iou, area, max_dets))

    def average_precision_of_classes(self, area: str = "all", max_dets: int = 100) -> dict[Any, float]:
        """name -> the class's average precision, -1 where it has no truth."""
        values = self._select(self.precision, None, area, max_dets)
        return {name: _mean(values[:, :, k]) for k, name in enumerate(self.classes)}

    def average_recall_of_classes(self, area: str = "all", max_dets: int = 100) -> dict[Any, float]:
        """name -> the class's average recall, -1 where it has no truth."""
        values = self._select(self.recall, None, area, max_dets)
        return {name: _mean(values[:, k]) for k, name in enumerate(self.classes)}

    def _select(self, values: Array, iou: float | None, area: str, max_dets: int) -> Array:
        """values (T, ..., A, M) -> (T or 1 or 0, ..., 1 or 0): what is not among the settings is an empty choice, as in COCO."""
        if iou is not None:
            values = values[self.iou_thresholds == iou]
        areas = [a for a, name in enumerate(self.area_ranges) if name == area]
        limits = [m for m, limit in enumerate(self.max_dets) if limit == max_dets]
        return values[..., areas, :][..., limits]


class MeanAveragePrecision:
    """COCO's mean average precision and recall of boxes or masks, and of boxes VOC's average precision.

    Every number is pycocotools' to the last bit. Images count in the order of their ids, an image's boxes in input order, so the
    result depends on nothing else: not on batches, shards or the order of merging. The backend is hotcoco (extra `detection`).

    For both, take two metrics: `EvalTotalHook(loader, {"box": ..., "mask": ...}, inputs=...)`; each reads what it compares.

    Args:
        classes: the names of the classes; labels are indices into them, from 0.
        box_format: "xyxy" (corners), "xywh" (corner and sides) or "cxcywh" (centre and sides), in pixels, for both sides.
        iou_thresholds: in [0, 1], each once. None: 0.5, 0.55, ..., 0.95.
        rec_thresholds: in [0, 1], growing. None: 0, 0.01, ..., 1.
        max_dets: how many detections of an image and class count, best scores first; whole numbers from 1, each once.
        area_ranges: name -> (lowest, highest) area in square pixels, both inside; `all` has to be among them. No name may make
            that of another result, as "50" would (`map_50`). None: COCO's.
        iou_type: what is compared: "bbox", the boxes, or "segm", the masks.

    Raises:
        SettingError: where a setting can't be what is meant.
        ImportError: where hotcoco is not installed.

    >>> metric = MeanAveragePrecision(["cat", "dog"])
    >>> boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    >>> preds = [{"boxes": boxes, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}]
    >>> metric.update([7], preds, [{"boxes": boxes, "labels": torch.tensor([1])}])
    >>> results = metric.compute()
    >>> round(results["map"], 6), results["map_small"], round(results["map_medium"], 6), results["map_per_class"]["cat"]
    (1.0, -1.0, 1.0, -1.0)
    """

    higher_is_better = True

    def __init__(
        self,
        classes: Sequence[Any],
        box_format: str = "xyxy",
        iou_thresholds: Sequence[float] | Array | None = None,
        rec_thresholds: Sequence[float] | Array | None = None,
        max_dets: Sequence[int] = (1, 10, 100),
        area_ranges: Mapping[str, tuple[float, float]] | None = None,
        iou_type: Literal["bbox", "segm"] = "bbox",
    ) -> None:
        if importlib.util.find_spec("hotcoco") is None:
            raise ImportError(
                "MeanAveragePrecision needs hotcoco. Install it with: pip install 'torch-frame[detection]'"
            )
        if box_format not in TO_XYWH:
            raise SettingError(f"box_format is {box_format!r}; it has to be one of {', '.join(map(repr, TO_XYWH))}.")
        if iou_type not in ("bbox", "segm"):
            raise SettingError(f"iou_type is {iou_type!r}; it has to be 'bbox' or 'segm'. For both, make two metrics.")
        self.iou_type = iou_type
        self.classes = _checked_classes(classes)
        self.box_format = box_format
        self.iou_thresholds = _checked_grid("iou_thresholds", iou_thresholds, np.linspace(0.5, 0.95, 10))
        self.rec_thresholds = _checked_grid("rec_thresholds", rec_thresholds, np.linspace(0.0, 1.0, 101))
        if (np.diff(self.rec_thresholds) <= 0).any():
            raise SettingError(f"rec_thresholds are {self.rec_thresholds.tolist()}; they have to grow.")
        self.max_dets = _checked_max_dets(max_dets)
        self.area_ranges = _checked_ranges(AREA_RANGES if area_ranges is None else area_ranges, self.max_dets)
        self._images = self._no_images()
        self._evaluated: tuple[PrecisionRecall, VocAP | None] | None = None

    def update(self, image_ids: Iterable[Any], preds: Sequence[Entry], targets: Sequence[Entry]) -> None:
        """Take in a batch: one id, one prediction and one target for each image.

        The tensors may be on any device and of any float type; they are read in a few transfers a batch and counted in float64.
        An image that comes again with the same content (a padded sampler) counts once.

        Args:
            image_ids: any hashables; equal ones are one image. Tensors and arrays of numbers count as the numbers.
            preds: dicts of `boxes` (N, 4), `scores` (N,) and `labels` (N,); of masks, `masks` in place of `boxes`.
            targets: dicts of `boxes` (M, 4), `labels` (M,) and, where known, `iscrowd` (M,), `area` (M,) in square pixels.
                Without `area` the box's is taken, or the mask's; a given area counts as it is, 0 too, as in COCO.

        With `iou_type="segm"` both have `masks`: (N, height, width) bool or integers (0 is outside), or a list of COCO's
        run-length codes `{"size": [height, width], "counts": ...}` (compressed, as text too, or the runs' lengths). All masks of
        an image are of one size. A detection's area is its mask's, whatever boxes there are: `boxes` are not read.

        Raises:
            ValueError: where boxes, scores or labels can't be counted, naming the image; nothing of the batch is taken in then.
        """
        ids = as_image_ids(image_ids)
        if not len(ids) == len(preds) == len(targets):
            raise ValueError(
                f"update() got {len(ids)} image_ids, {len(preds)} preds and {len(targets)} targets. "
                "Pass one of each for each image."
            )
        masks: Sequence[Masks | None] = [None] * len(ids)
        box_format, things = self.box_format, "boxes"
        if self.iou_type == "segm":
            masks = read = read_masks(ids, preds, targets)
            preds, targets = with_boxes(preds, read, 0), with_boxes(targets, read, 1)
            box_format, things = "xywh", "masks"
        detections = detection_tables(ids, preds, len(self.classes), box_format, things)
        truth = truth_tables(ids, targets, len(self.classes), box_format, things)
        self._images.add(zip(ids, detections, truth, masks, strict=True))
        self._evaluated = None

    def compute(self) -> dict[str, Any]:
        """All results, under torchmetrics' names, as floats; those of classes as dicts of floats by class name.

        - `map`, `map_50`, `map_75`, and `mar_1`, `mar_10`, `mar_100` (one for each of `max_dets`): over all areas.
        - `map_small`, ... and `mar_small`, ... (one for each range but `all`): within a range of areas.
        - `map_per_class`, `mar_100_per_class`: the classes' own.
        - `voc_map` (area under the curve), `voc07_map` (eleven points), `voc_map_per_class`, `voc07_map_per_class`: at IoU 0.5;
          `max_dets` and `area_ranges` don't apply to them. Of boxes only.

        0 where there is truth but no detection is right, -1 where there is no truth; means leave classes without truth out.
        As in pycocotools `map` and `map_per_class` are -1 where 100 is not in `max_dets`, and what has no limit in its name is at
        the third of `max_dets` (the last, where there are fewer). `compute_arrays` gives any other choice.
        """
        arrays = self.compute_arrays()
        limit = self.max_dets[min(2, len(self.max_dets) - 1)]
        ranges = [name for name in self.area_ranges if name != "all"]
        results: dict[str, Any] = {"map": arrays.average_precision()}
        for iou in (0.5, 0.75):
            results[f"map_{iou * 100:.0f}"] = arrays.average_precision(iou, max_dets=limit)
        results |= {f"map_{name}": arrays.average_precision(area=name, max_dets=limit) for name in ranges}
        results |= {f"mar_{most}": arrays.average_recall(max_dets=most) for most in self.max_dets}
        results |= {f"mar_{name}": arrays.average_recall(area=name, max_dets=limit) for name in ranges}
        results["map_per_class"] = arrays.average_precision_of_classes()
        results[f"mar_{limit}_per_class"] = arrays.average_recall_of_classes(max_dets=limit)
        return results | self._voc_results()

    def result_names(self) -> list[str]:
        """The names of the results that are one number, whatever the data.

        >>> MeanAveragePrecision(["cat"], max_dets=(100,), area_ranges={"all": (0, 1e10)}).result_names()
        ['map', 'map_50', 'map_75', 'mar_100', 'voc_map', 'voc07_map']
        """
        empty = copy.copy(self)
        empty.reset()
        return [name for name, value in empty.compute().items() if isinstance(value, float)]

    def compute_arrays(self) -> PrecisionRecall:
        """The arrays that the numbers are means of; kept until data is added."""
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[PrecisionRecall, VocAP | None]:
        if self._evaluated is None:
            detections, truth = self._images.tables()
            precision, recall, scores = coco_arrays(
                num_images=len(self._images),
                num_classes=len(self.classes),
                detections=detections,
                truth=truth,
                iou_thresholds=self.iou_thresholds,
                rec_thresholds=self.rec_thresholds,
                max_dets=np.array(self.max_dets, float),
                area_ranges=np.array(list(self.area_ranges.values())),
                masks=self._images.masks(),
            )
            arrays = PrecisionRecall(
                *(precision, recall, scores, self.iou_thresholds, self.rec_thresholds),
                *(self.classes, tuple(self.area_ranges), self.max_dets),
            )
            of_boxes = self.iou_type == "bbox"
            self._evaluated = (
                arrays,
                voc_average_precision(detections, truth, len(self.classes)) if of_boxes else None,
            )
        return self._evaluated

    def _voc_results(self) -> dict[str, Any]:
        of_classes = self._evaluate()[1]
        results: dict[str, Any] = {}
        if of_classes is None:
            return results
        for name, values in (("voc_map", of_classes.area), ("voc07_map", of_classes.eleven_point)):
            results[name] = _mean(values)
            results[f"{name}_per_class"] = dict(zip(self.classes, values.tolist(), strict=True))
        return results

    @property
    def num_images(self) -> int:
        """How many images have been seen since `reset`, each once."""
        return len(self._images)

    def reset(self) -> None:
        """Forget all images."""
        self._images = self._no_images()
        self._evaluated = None

    def _no_images(self) -> SeenImages:
        return SeenImages(with_masks=self.iou_type == "segm")

    def merge(self, other: MeanAveragePrecision) -> None:
        """Take in the images of another metric of the same classes; the result is as if all had come here.

        Raises:
            SettingError: where the classes differ, or one is of boxes and the other of masks.
            ValueError: where an image is in both with different content.
        """
        if other.classes != self.classes:
            raise SettingError("The other metric has other classes. Make both with the same classes in the same order.")
        if other.iou_type != self.iou_type:
            raise SettingError(
                f"The other metric's iou_type is {other.iou_type!r}, this one's {self.iou_type!r}. Make both with the same."
            )
        self._images.merge(other._images)
        self._evaluated = None

    def to_bytes(self) -> bytes:
        """The state as numbers and JSON in one run of bytes: the same bytes for the same images, however they came.

        Raises:
            TypeError: where an image id is an object without a `__repr__` of its own.
        """
        return self._images.to_bytes(self.classes)

    def merge_bytes(self, data: bytes) -> None:
        """Take in the images of what `to_bytes` of another metric, in any process, returned.

        Raises:
            SettingError: where the classes differ, or one is of boxes and the other of masks.
            ValueError: where the bytes are damaged, or an image is in both with different content.
        """
        self._images.add_bytes(data, self.classes)
        self._evaluated = None

    def state_dict(self) -> dict[str, Any]:
        """{"images": (B,) uint8}, the bytes of `to_bytes`."""
        return {"images": torch.frombuffer(bytearray(self.to_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on a state in place of this one's."""
        images = self._no_images()
        images.add_bytes(state["images"].cpu().numpy().tobytes(), self.classes)
        self._images, self._evaluated = images, None


def _mean(values: Array) -> float:
    """The mean of what is there: -1 stands for no truth. -1 where nothing is there."""
    there = values[values > -1]
    return float(np.mean(there)) if there.size else -1.0


def _checked_classes(classes: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(classes, str | int) or len(classes) == 0:
        raise SettingError(f"classes is {classes!r}; it has to be a list of the names of the classes.")
    if isinstance(classes, Mapping | Set) and not isinstance(classes, KeysView):
        raise SettingError(
            f"classes is a {type(classes).__name__}, {classes!r}; it has to be a list of the names, the one of label 0 first."
        )
    if len(set(classes)) < len(classes):
        twice = next(name for i, name in enumerate(classes) if name in classes[:i])
        raise SettingError(f"classes has {twice!r} twice. Give each class its own name.")
    return tuple(classes)


def _checked_grid(name: str, given: Sequence[float] | Array | None, default: Array) -> Array:
    grid = default if given is None else np.array(given, dtype=np.float64)
    if grid.ndim != 1 or grid.size == 0 or not ((grid >= 0) & (grid <= 1)).all() or len(set(grid.tolist())) < len(grid):
        raise SettingError(f"{name} are {given!r}; they have to be numbers from 0 to 1, at least one, none twice.")
    return grid


def _checked_max_dets(max_dets: Sequence[int]) -> tuple[int, ...]:
    limits = sorted(int(limit) for limit in max_dets)
    if not limits or limits[0] < 1 or len(set(limits)) < len(limits) or limits != sorted(max_dets):
        raise SettingError(f"max_dets is {max_dets!r}; it has to be whole numbers from 1, at least one, none twice.")
    return tuple(limits)


def _checked_ranges(
    area_ranges: Mapping[str, tuple[float, float]], max_dets: tuple[int, ...]
) -> dict[str, tuple[float, float]]:
    ranges = {name: (float(low), float(high)) for name, (low, high) in area_ranges.items()}
    if "all" not in ranges:
        raise SettingError(
            f"area_ranges has {', '.join(map(repr, ranges)) or 'nothing'}, but not 'all', which map is over. Add it."
        )
    taken = {"50", "75", "per_class", *(f"{limit}{end}" for limit in max_dets for end in ("", "_per_class"))}
    for name, (low, high) in ranges.items():
        if str(name) in taken:
            raise SettingError(
                f"area_ranges has {name!r}, but map_{name} or mar_{name} is the name of another result. Choose another name, "
                f"such as 'area_{name}'."
            )
        if not low <= high:
            raise SettingError(f"area_ranges has {name!r} from {low} to {high}; the lower end has to come first.")
    return ranges
