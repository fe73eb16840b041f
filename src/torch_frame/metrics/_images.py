"""The images that a detection metric has seen: each once, ordered by id, and as one run of bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence

import numpy as np

from torch_frame.errors import SettingError
from torch_frame.metrics._batch import DETECTION_COLUMNS, TRUTH_COLUMNS, Table
from torch_frame.metrics._ids import ImageId, from_json, sort_key, to_json

MAGIC = b"torch-frame detections 1\n"


class SeenImages:
    """id -> (detections (n, 6), truth (m, 7)) of each image, whatever order they came in.

    Two sets of images with the same content are one to the last bit, whoever added them: everything is read in the order of ids.
    """

    def __init__(self) -> None:
        self._images: dict[ImageId, tuple[Table, Table]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, images: Iterable[tuple[ImageId, Table, Table]]) -> None:
        """Add images, all or none; one that is there already with the same content is left out.

        Raises:
            ValueError: where an image comes again with other content.
        """
        new: dict[ImageId, tuple[Table, Table]] = {}
        for image_id, detections, truth in images:
            seen = self._images.get(image_id) or new.get(image_id)
            if seen is None:
                new[image_id] = (detections, truth)
            elif not (_same(seen[0], detections) and _same(seen[1], truth)):
                raise ValueError(
                    f"Image {image_id!s} came twice, with other {'truth' if _same(seen[0], detections) else 'detections'} the "
                    "second time. Give each image its own id, and call reset() between evaluations."
                )
        self._images.update(new)

    def merge(self, other: SeenImages) -> None:
        self.add((image_id, *tables) for image_id, tables in other._images.items())

    def tables(self) -> tuple[Table, Table]:
        """(N, 7) and (M, 8): the detections and the truth of all images, each row led by the image's place in the order."""
        ordered = [self._images[image_id] for image_id in self._ordered_ids()]
        detections = [detections for detections, _ in ordered]
        truth = [truth for _, truth in ordered]
        return led_by_place(detections, len(DETECTION_COLUMNS)), led_by_place(truth, len(TRUTH_COLUMNS))

    def to_bytes(self, classes: Sequence[object]) -> bytes:
        ids = self._ordered_ids()
        return pack(classes, ids, [self._images[image_id] for image_id in ids])

    def add_bytes(self, data: bytes, classes: Sequence[object]) -> None:
        self.add(unpack(data, classes))

    def _ordered_ids(self) -> list[ImageId]:
        return sorted(self._images, key=sort_key)


def _same(first: Table, second: Table) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()


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
