"""A batch's detections and truth as tables of numbers: checked, on the CPU, in few operations a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_frame.metrics._ids import ImageId

Table: TypeAlias = npt.NDArray[np.float64]
Claims: TypeAlias = npt.NDArray[np.bool_]
Entry: TypeAlias = Mapping[str, Any]

DETECTION_COLUMNS = ("x", "y", "w", "h", "score", "label")
TRUTH_COLUMNS = ("x", "y", "w", "h", "area", "crowd", "label")


def _from_xyxy(boxes: Table) -> None:
    boxes[:, 2:] -= boxes[:, :2]


def _from_cxcywh(boxes: Table) -> None:
    boxes[:, :2] -= boxes[:, 2:] / 2


TO_XYWH: dict[str, Callable[[Table], None]] = {
    "xyxy": _from_xyxy,
    "xywh": lambda boxes: None,
    "cxcywh": _from_cxcywh,
}
"""For each format, what turns (N, 4) float64 boxes into COCO's x, y, w, h, in place."""


def detection_tables(
    image_ids: Sequence[ImageId], preds: Sequence[Entry], num_classes: int, box_format: str, things: str = "boxes"
) -> list[Table]:
    """For each image its detections: (n, 6) of `DETECTION_COLUMNS`, in input order."""
    source = _Source("prediction", image_ids, preds, things)
    table = np.empty((source.num_rows, 6))
    table[:, :4] = source.boxes()
    table[:, 4] = source.column("scores")
    table[:, 5] = source.labels()
    source.check(table, DETECTION_COLUMNS, num_classes, box_format)
    return source.by_image(table)


def truth_tables(
    image_ids: Sequence[ImageId], targets: Sequence[Entry], num_classes: int, box_format: str, things: str = "boxes"
) -> list[Table]:
    """For each image its truth: (m, 7) of `TRUTH_COLUMNS`; `area` is the box's where none is given, `crowd` 0 or 1."""
    source = _Source("target", image_ids, targets, things)
    table = np.empty((source.num_rows, 7))
    table[:, :4] = source.boxes()
    table[:, 4] = source.column("area", default=0.0)
    table[:, 5] = source.column("iscrowd", default=0.0)
    table[:, 6] = source.labels()
    source.check(table, TRUTH_COLUMNS, num_classes, box_format)
    table[:, 5] = table[:, 5] != 0
    without = ~source.has("area")
    table[without, 4] = table[without, 2] * table[without, 3]
    return source.by_image(table)


class _Source:
    """The entries of a batch's images, read column by column.

    Args:
        what: "prediction" or "target", for messages.
        image_ids: one for each entry.
        entries: for each image a dict of tensors, `boxes` among them.
        things: "boxes" or "masks", for messages.
    """

    def __init__(self, what: str, image_ids: Sequence[ImageId], entries: Sequence[Entry], things: str) -> None:
        self._what, self._ids, self._entries, self._things = what, image_ids, entries, things
        for image_id, entry in zip(image_ids, entries, strict=True):
            if not isinstance(entry, Mapping):
                raise TypeError(
                    f"The {what} of image {image_id!s} is {type(entry).__name__}; "
                    "it has to be a dict with boxes, labels and, for predictions, scores."
                )
        self._boxes = [self._one_image_boxes(i) for i in range(len(entries))]
        self._counts = [boxes.shape[0] for boxes in self._boxes]
        self.num_rows = sum(self._counts)

    def boxes(self) -> Table:
        """(N, 4), as given."""
        return _to_numpy(self._boxes) if self.num_rows else np.empty((0, 4))

    def has(self, name: str) -> Claims:
        """(N,): whether a row's image has values under this name."""
        return np.repeat([entry.get(name) is not None for entry in self._entries], self._counts).astype(bool)

    def column(self, name: str, default: float | None = None) -> Table:
        """(N,): the values under `name`; where an image has none, the default, or an error where there is no default."""
        if default is not None and all(entry.get(name) is None for entry in self._entries):
            return np.full(self.num_rows, default)
        parts = [self._one_image_column(i, name, default) for i in range(len(self._entries))]
        return _to_numpy(parts) if self.num_rows else np.empty(0)

    def labels(self) -> Table:
        """(N,): indices of classes."""
        parts = [self._one_image_column(i, "labels", None) for i in range(len(self._entries))]
        for image_id, count, labels in zip(self._ids, self._counts, parts, strict=True):
            if count and (labels.dtype.is_floating_point or labels.dtype == torch.bool):
                raise ValueError(
                    f"The labels of the {self._what} of image {image_id!s} are {labels.dtype}; they have to be integers, "
                    "indices into `classes`. Use labels.long()."
                )
        return _to_numpy(parts) if self.num_rows else np.empty(0)

    def _one_image_boxes(self, i: int) -> Tensor:
        boxes = self._tensor(i, "boxes")
        if boxes.ndim == 2 and boxes.shape[1] == 4:
            return boxes
        if boxes.shape == (0,):  # torch.tensor([])
            return boxes.reshape(0, 4)
        raise ValueError(
            f"The boxes of the {self._what} of image {self._ids[i]!s} have shape {tuple(boxes.shape)}; "
            "they have to be (N, 4), and (0, 4) where there is none."
        )

    def _one_image_column(self, i: int, name: str, default: float | None) -> Tensor:
        count = self._counts[i]
        if default is not None and self._entries[i].get(name) is None:
            return torch.full((count,), default, device=self._boxes[i].device)
        values = self._tensor(i, name)
        if values.shape != (count,) and (count or values.numel()):
            raise ValueError(
                f"The {name} of the {self._what} of image {self._ids[i]!s} have shape {tuple(values.shape)}, "
                f"but it has {count} {self._things}. Pass one value for each of them."
            )
        return values

    def _tensor(self, i: int, name: str) -> Tensor:
        values = self._entries[i].get(name)
        if isinstance(values, Tensor):
            return values
        if values is None:
            given = ", ".join(map(repr, self._entries[i])) or "nothing"
            raise ValueError(f"The {self._what} of image {self._ids[i]!s} has no {name!r}, only {given}.")
        try:
            return _as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The {name} of the {self._what} of image {self._ids[i]!s} cannot be read as a tensor of numbers: {error}. "
                f"They are {_shortened(values)}; pass a tensor or an array."
            ) from None

    def by_image(self, table: Table) -> list[Table]:
        ends = np.cumsum(self._counts).tolist()
        return [table[end - count : end] for end, count in zip(ends, self._counts, strict=True)]

    def check(self, table: Table, columns: tuple[str, ...], num_classes: int, box_format: str) -> None:
        """Turn the table's boxes into x, y, w, h, and raise an error for any number that no result can be had from."""
        self._raise_unless(np.isfinite(table), table, columns, "a number that is NaN or infinite")
        listed = (table[:, -1:] >= 0) & (table[:, -1:] < num_classes)
        what = f"a label that is not listed: there are {num_classes} classes, labels are 0 to {num_classes - 1}"
        self._raise_unless(listed, table, columns, what)
        with np.errstate(over="ignore"):  # infinity is told below
            TO_XYWH[box_format](table[:, :4])
        self._raise_unless(np.abs(table[:, :4]) <= 1e140, table, columns, "a box that is too large for float64")
        what = "a box that is too small for float64, alone or beside its coordinates"
        self._raise_unless(_has_its_area(table[:, :4]), table, columns, what)

    def _raise_unless(self, claims: Claims, table: Table, columns: tuple[str, ...], what: str) -> None:
        """Raise an error for the first row, of (N, C), that one of its claims does not hold for."""
        if claims.all():
            return
        row = int(np.logical_and.reduce(claims, axis=1).argmin())
        ends = np.cumsum(self._counts)
        image = int(np.searchsorted(ends, row, side="right"))
        place = row - int(ends[image]) + self._counts[image]
        values = ", ".join(f"{value:.6g}" for value in table[row])
        raise ValueError(
            f"The {self._what} of image {self._ids[image]!s} has {what}. At place {place} stands [{values}] "
            f"(box, {', '.join(columns[4:])})."
        )


def _as_tensor(values: Any) -> Tensor:
    """Of lists too, whose parts may be tensors, with gradients or on a device."""
    if isinstance(values, list | tuple) and any(isinstance(part, Tensor) for part in values):
        return torch.stack([torch.as_tensor(part).detach() for part in values])
    array = np.array(values)  # a copy: torch takes no negative strides, and warns of what is read-only
    if array.dtype.kind in "OUSV":
        raise ValueError(f"{'texts' if array.dtype.kind in 'US' else 'objects'} are no numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _shortened(values: Any) -> str:
    text = repr(values)
    return text if len(text) <= 60 else text[:57] + "..."


def _has_its_area(boxes: Table) -> Claims:
    """(N, 4) xywh -> (N, 1): unless sides are positive, but lost beside the corner or multiplied to nothing.

    COCO's IoU has a positive denominator for all other boxes; for these it can be zero, negative or NaN, and NaN matches.
    """
    x, y, w, h = boxes.T
    kept = (np.abs(x + w - x - w) <= 1e-3 * w) & (np.abs(y + h - y - h) <= 1e-3 * h) & (w * h >= 1e-290)
    has: Claims = kept | (w <= 0) | (h <= 0)
    return has[:, None]


def _to_numpy(parts: list[Tensor]) -> Table:
    """The parts that are not empty (those may be of any type) one after the other, in float64 on the CPU.

    One transfer, unless they differ in type or device: joined as they are, bfloat16 beside integers would round these.
    """
    with torch.no_grad():
        filled = [part for part in parts if part.shape[0]]
        if len({(part.dtype, part.device) for part in filled}) > 1:
            filled = [part.to("cpu", torch.float64) for part in filled]
        return torch.cat(filled).to("cpu", torch.float64).numpy()
