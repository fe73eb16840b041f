"""Masks of an image's detections and truth: checked, as run-length codes, as tables, and as one run of bytes.

A code is COCO's compressed one, in its only form without empty runs, so that equal masks have equal codes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_frame.metrics._batch import Entry
from torch_frame.metrics._ids import ImageId

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

MaskArrays: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]
"""Of N masks: sizes (N, 2), lengths of the codes (N,), the codes one after the other (B,)."""

_READ = (("scores", "labels"), ("labels", "iscrowd", "area"))
"""What is read of detections and of truth beside their masks."""

_MAGIC = b"torch-frame masks 1\n"


@dataclass(frozen=True)
class Masks:
    """An image's masks as codes, in input order. `size` is None if there is none."""

    size: Size | None
    detections: tuple[bytes, ...]
    truth: tuple[bytes, ...]


def read_masks(image_ids: Sequence[ImageId], preds: Sequence[Entry], targets: Sequence[Entry]) -> list[Masks]:
    """The masks of a batch.

    Raises:
        TypeError, ValueError: for what cannot be counted, naming the image.
    """
    masks = []
    for image_id, pred, target in zip(image_ids, preds, targets, strict=True):
        of_pred = _codes(f"the prediction of image {image_id!s}", pred)
        of_target = _codes(f"the target of image {image_id!s}", target)
        sizes = {size for size in (of_pred[0], of_target[0]) if size is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"The masks of image {image_id!s} are {_by(of_pred[0])} pixels (height x width) in the prediction and "
                f"{_by(of_target[0])} in the target. Bring the predicted masks to the size of the image."
            )
        masks.append(Masks(next(iter(sizes), None), of_pred[1], of_target[1]))
    return masks


def with_boxes(entries: Sequence[Entry], masks: Sequence[Masks], side: int) -> list[dict[str, Any]]:
    """The entries with what counts of their masks: `boxes` (xywh), and as `area`, unless it is given, the masks' own.

    Args:
        side: 0: of detections, which have no area of their own; 1: of truth.
    """
    import hotcoco

    read = []
    for entry, of_image in zip(entries, masks, strict=True):
        codes = of_image.truth if side else of_image.detections
        rles = [{"size": of_image.size, "counts": code} for code in codes]
        row = {name: entry[name] for name in _READ[side] if entry.get(name) is not None}
        row["boxes"] = hotcoco.mask.to_bbox(rles) if rles else np.empty((0, 4))
        if side and "area" not in row:
            row["area"] = mask_areas(rles)
        read.append(row)
    return read


def mask_areas(rles: list[dict[str, Any]]) -> npt.NDArray[np.float64]:
    """(N,): pixels of each mask."""
    import hotcoco

    return np.asarray(hotcoco.mask.area(rles) if rles else [], np.float64)


def _by(size: Size | None) -> str:
    return "x".join(map(str, size or ()))


# ---------------------------------------------------------------- what a user gives


def _codes(whose: str, entry: Entry) -> tuple[Size | None, tuple[bytes, ...]]:
    """(size, codes) of one side of an image."""
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{_start(whose)} is {type(entry).__name__}; it has to be a dict with masks, labels and, for predictions, scores."
        )
    masks = entry.get("masks")
    if masks is None:
        given = ", ".join(map(repr, entry)) or "nothing"
        raise ValueError(f"{_start(whose)} has no 'masks', only {given}. With iou_type=\"segm\" masks are compared.")
    if isinstance(masks, Mapping):
        raise TypeError(
            f"The masks of {whose} are one {type(masks).__name__}; pass a list with one code for each mask."
        )
    if isinstance(masks, Sequence) and len(masks) and isinstance(masks[0], Mapping):
        return _given_codes(whose, masks)
    return _encoded(whose, masks)


def _start(whose: str) -> str:
    return whose[0].upper() + whose[1:]


def _encoded(whose: str, masks: Any) -> tuple[Size | None, tuple[bytes, ...]]:
    import hotcoco

    array = _as_array(whose, masks)
    if array.shape[:1] == (0,):
        return None, ()
    is_number = array.dtype == bool or np.issubdtype(array.dtype, np.number)
    if array.ndim == 4 and array.shape[1] == 1 and is_number:
        raise ValueError(
            f"The masks of {whose} have shape {array.shape}, with a channel, as torchvision's Mask R-CNN returns them; they have "
            "to be (N, height, width). Choose a threshold: masks[:, 0] > 0.5."
        )
    if array.ndim != 3 or array.size == 0 or not is_number:
        raise ValueError(
            f"The masks of {whose} have shape {array.shape}; they have to be (N, height, width), (0, height, width) if there "
            "is none, or a list of COCO's run-length codes {'size': [height, width], 'counts': ...}, which "
            "pycocotools.mask.frPyObjects makes of polygons."
        )
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"The masks of {whose} are {array.dtype}; they have to be bool, or integers (0 is outside). Choose a threshold: "
            "masks > 0.5. (Of polygons pycocotools.mask.frPyObjects makes run-length codes, which are taken too.)"
        )
    inside = array if array.dtype == bool else array != 0
    rles = hotcoco.mask.encode(inside.transpose(1, 2, 0))
    return (array.shape[1], array.shape[2]), tuple(rle["counts"] for rle in rles)


def _as_array(whose: str, masks: Any) -> npt.NDArray[Any]:
    if isinstance(masks, Tensor):
        return _read(whose, masks)
    if isinstance(masks, Sequence):
        masks = [_read(whose, mask) for mask in masks]
        if len({mask.shape for mask in masks}) > 1:
            raise ValueError(
                f"The masks of {whose} have several shapes: {', '.join(sorted({str(mask.shape) for mask in masks}))}."
            )
    return np.asarray(masks)


def _read(whose: str, masks: Any) -> npt.NDArray[Any]:
    try:
        if not isinstance(masks, Tensor):
            return np.asarray(masks)
        on_cpu = masks.detach().cpu()
        return np.asarray(on_cpu.float() if on_cpu.dtype == torch.bfloat16 else on_cpu)  # NumPy has no bfloat16
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(f"The masks of {whose} cannot be read as an array: {reason}.") from error


def _given_codes(whose: str, masks: Sequence[Any]) -> tuple[Size, tuple[bytes, ...]]:
    sizes, codes = [], []
    for place, mask in enumerate(masks):
        try:
            if not isinstance(mask, Mapping):
                raise TypeError(f"it is a {type(mask).__name__}")
            height, width = (int(side) for side in mask["size"])
            codes.append(_canonical(height, width, mask["counts"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"The mask at place {place} of {whose} is no run-length code: {type(error).__name__}: {error}. It has to be "
                "{'size': [height, width], 'counts': bytes, text, or a list of the lengths of the runs}; of a polygon "
                "pycocotools.mask.frPyObjects makes one."
            ) from error
        sizes.append((height, width))
    if len(set(sizes)) > 1:
        raise ValueError(f"The masks of {whose} have several sizes: {', '.join(sorted(map(_by, set(sizes))))}.")
    return sizes[0], tuple(codes)


def _canonical(height: int, width: int, counts: Any) -> bytes:
    """A code without empty runs that covers the mask; hotcoco raises ValueError or TypeError for what is no code."""
    import hotcoco

    if isinstance(counts, Tensor | np.ndarray):
        counts = counts.tolist()
    if height < 1 or width < 1:
        raise ValueError(f"the size is {height}x{width}")
    rle = {"size": [height, width], "counts": counts}
    outside = {"size": [height, width], "counts": [height * width]}
    code: bytes = hotcoco.mask.merge([rle, outside])["counts"]  # ends where the mask ends
    if code != counts and code != hotcoco.mask.merge([rle, rle])["counts"]:  # ends where its own runs end
        raise ValueError(f"its runs cover less than {height}x{width} pixels")
    return code


# ---------------------------------------------------------------- as arrays, and as bytes


def mask_arrays(images: Sequence[Masks], side: int) -> MaskArrays:
    """The masks of all images, side 0 of detections, 1 of truth, in the order of the tables' rows."""
    of_images = [masks.truth if side else masks.detections for masks in images]
    sizes = [masks.size for masks, codes in zip(images, of_images, strict=True) for _ in codes]
    codes = [code for codes in of_images for code in codes]
    return (
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array([len(code) for code in codes], np.int64),
        np.frombuffer(b"".join(codes), np.uint8),
    )


def pack_masks(images: Sequence[Masks]) -> bytes:
    """Masks as bytes that hold codes and JSON only; the inverse of `unpack_masks`."""
    header = {
        "sizes": [masks.size for masks in images],
        "detections": [[len(code) for code in masks.detections] for masks in images],
        "truth": [[len(code) for code in masks.truth] for masks in images],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    codes = [code for masks in images for code in (*masks.detections, *masks.truth)]
    return b"".join((_MAGIC, struct.pack("<Q", len(text)), text, *codes))


def unpack_masks(data: bytes) -> list[Masks]:
    """The masks in bytes that `pack_masks` made.

    Raises:
        ValueError: if they are not such bytes, or not whole.
    """
    start = len(_MAGIC) + 8
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise ValueError("These bytes are not the state of a metric of masks. Pass what to_bytes() returned.")
    (length,) = struct.unpack("<Q", data[len(_MAGIC) : start])
    header = json.loads(data[start : start + length])
    lengths = [(header["detections"][i], header["truth"][i]) for i in range(len(header["sizes"]))]
    place, end = start + length, start + length + sum(sum(a) + sum(b) for a, b in lengths)
    if len(data) != end:
        raise ValueError(f"The state's masks are {len(data)} bytes long instead of {end}: a part is missing.")
    images = []
    for size, sides in zip(header["sizes"], lengths, strict=True):
        codes = []
        for of_side in sides:
            ends = (place + np.cumsum(of_side, dtype=np.int64)).tolist()
            codes.append(tuple(data[end - n : end] for n, end in zip(of_side, ends, strict=True)))
            place += sum(of_side)
        images.append(Masks(None if size is None else (size[0], size[1]), *codes))
    return images
