"""The images that a detection metric has seen: each once, ordered by id, and as one run of bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from torch_frame.errors import SettingError
from torch_frame.metrics._batch import DETECTION_COLUMNS, TRUTH_COLUMNS, Table
from torch_frame.metrics._ids import ImageId, from_json, sort_key, to_json
from torch_frame.metrics._masks import MaskArrays, Masks, mask_arrays, pack_masks, unpack_masks

MAGIC = b"torch-frame detections 1\n"
MAGIC_MASKS = b"torch-frame masked detections 1\n"

Seen: TypeAlias = tuple[Table, Table, Masks | None]
"""An image's detections (n, 6), its truth (m, 7), and where they have masks the masks of both."""


class SeenImages:
    """id -> what was seen of each image, whatever order they came in.

    Two sets of images with the same content are one to the last bit, in whatever order they came: all is read by id.

    Args:
        with_masks: all images have masks; else none has.
    """

    def __init__(self, with_masks: bool = False) -> None:
        self._with_masks = with_masks
        self._images: dict[ImageId, Seen] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, images: Iterable[tuple[ImageId, Table, Table, Masks | None]]) -> None:
        """Add images, all or none; one that is there already with the same content is left out.

        Raises:
            ValueError: where an image comes again with other content.
        """
        new: dict[ImageId, Seen] = {}
        for image_id, detections, truth, masks in images:
            content = (detections, truth, masks)
            seen = self._images.get(image_id) or new.get(image_id)
            other = None if seen is None else _difference(seen, content)
            if other is not None:
                raise ValueError(
                    f"Image {image_id!s} came twice, with other {other} the second time. Give each image its own id, and call "
                    "reset() between evaluations."
                )
            if seen is None:
                new[image_id] = content
        self._images.update(new)

    def merge(self, other: SeenImages) -> None:
        self.add((image_id, *seen) for image_id, seen in other._images.items())

    def tables(self) -> tuple[Table, Table]:
        """(N, 7) and (M, 8): the detections and the truth of all images, each row led by the image's place in the order."""
        ordered = [self._images[image_id] for image_id in self._ordered_ids()]
        detections = [detections for detections, _, _ in ordered]
        truth = [truth for _, truth, _ in ordered]
        return led_by_place(detections, len(DETECTION_COLUMNS)), led_by_place(truth, len(TRUTH_COLUMNS))

    def masks(self) -> tuple[MaskArrays, MaskArrays] | None:
        """The masks of the rows of `tables`; None without masks."""
        if not self._with_masks:
            return None
        masks = self._ordered_masks()
        return mask_arrays(masks, 0), mask_arrays(masks, 1)

    def to_bytes(self, classes: Sequence[object]) -> bytes:
        ids = self._ordered_ids()
        tables = pack(classes, ids, [self._images[image_id][:2] for image_id in ids])
        if not self._with_masks:
            return tables
        return b"".join((MAGIC_MASKS, struct.pack("<Q", len(tables)), tables, pack_masks(self._ordered_masks())))

    def add_bytes(self, data: bytes, classes: Sequence[object]) -> None:
        has_masks = data[: len(MAGIC_MASKS)] == MAGIC_MASKS
        if has_masks != self._with_masks and data[: len(MAGIC)] in (MAGIC, MAGIC_MASKS[: len(MAGIC)]):
            raise SettingError(
                f"The state is of a metric {'with' if has_masks else 'without'} masks, and this one is "
                f"{'with' if self._with_masks else 'without'}. Make both with the same iou_type."
            )
        if not self._with_masks:
            self.add((*row, None) for row in unpack(data, classes))
            return
        start = len(MAGIC_MASKS) + 8
        if not has_masks or len(data) < start:
            raise ValueError("These bytes are not the state of a metric of masks. Pass what to_bytes() returned.")
        (length,) = struct.unpack("<Q", data[len(MAGIC_MASKS) : start])
        rows = unpack(data[start : start + length], classes)
        self.add((*row, masks) for row, masks in zip(rows, unpack_masks(data[start + length :]), strict=True))

    def _ordered_masks(self) -> list[Masks]:
        return [masks for image_id in self._ordered_ids() if (masks := self._images[image_id][2]) is not None]

    def _ordered_ids(self) -> list[ImageId]:
        return sorted(self._images, key=sort_key)


def _same(first: Table, second: Table) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def _difference(seen: Seen, again: Seen) -> str | None:
    """What an image came with that is not what was seen of it."""
    if not _same(seen[0], again[0]):
        return "detections"
    if not _same(seen[1], again[1]):
        return "truth"
    return None if seen[2] == again[2] else "masks"


def led_by_place(tables: Sequence[Table], width: int) -> Table:
    """Tables of `width` columns as one of `width + 1`: the first column says which table a row is of."""
    together = np.empty((sum(map(len, tables)), width + 1))
    together[:, 0] = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    if tables:
        np.concatenate(tables, out=together[:, 1:])
    return together


def pack(classes: Sequence[object], ids: Sequence[ImageId], images: Sequence[tuple[Table, Table]]) -> bytes:
    """Images as bytes that hold numbers and JSON alone; the inverse of `unpack`."""
    detections = [detections for detections, _ in images]
    truth = [truth for _, truth in images]
    header = {
        "classes": [str(name) for name in classes],
        "ids": [to_json(image_id) for image_id in ids],
        "num_detections": [len(rows) for rows in detections],
        "num_truth": [len(rows) for rows in truth],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    numbers = [rows.astype("<f8", copy=False).tobytes() for rows in (*detections, *truth)]
    return b"".join((MAGIC, struct.pack("<Q", len(text)), text, *numbers))


def unpack(data: bytes, classes: Sequence[object]) -> list[tuple[ImageId, Table, Table]]:
    """The images in bytes that `pack` made.

    Raises:
        ValueError: where they are not such bytes, or not whole.
        SettingError: where they are of a metric with other classes.
    """
    start = len(MAGIC) + 8
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise ValueError("These bytes are not the state of a detection metric. Pass what to_bytes() returned.")
    (length,) = struct.unpack("<Q", data[len(MAGIC) : start])
    header = json.loads(data[start : start + length])
    if header["classes"] != [str(name) for name in classes]:
        raise SettingError(
            f"The state is of a metric of {len(header['classes'])} classes that are not the {len(classes)} of this one. "
            "Make both metrics with the same classes in the same order."
        )
    sizes = [6 * n for n in header["num_detections"]] + [7 * n for n in header["num_truth"]]
    if len(data) != start + length + 8 * sum(sizes):
        raise ValueError(
            f"The state is {len(data)} bytes long instead of {start + length + 8 * sum(sizes)}: a part is missing."
        )
    numbers = np.frombuffer(data, "<f8", offset=start + length).astype(np.float64)
    tables = np.split(numbers, np.cumsum(sizes)[:-1]) if sizes else []
    ids = [from_json(value) for value in header["ids"]]
    detections = [rows.reshape(-1, 6) for rows in tables[: len(ids)]]
    truth = [rows.reshape(-1, 7) for rows in tables[len(ids) :]]
    return list(zip(ids, detections, truth, strict=True))
