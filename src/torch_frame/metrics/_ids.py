"""What names an image: any hashable, in one order, and as JSON that means the same in every process."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

ImageId: TypeAlias = Hashable


@dataclass(frozen=True)
class NamedId:
    """An id of another kind than numbers, text, bytes, None and tuples: told apart by its type and its repr."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def as_image_ids(image_ids: Iterable[Any]) -> list[ImageId]:
    """The ids of a batch, each in the form that it is compared, ordered and sent in.

    Raises:
        TypeError: where one is not hashable.

    >>> as_image_ids([True, np.int64(7), 2.0, ("a", np.float32(0.5))])
    [1, 7, 2, ('a', 0.5)]
    """
    if isinstance(image_ids, Tensor | np.ndarray):
        image_ids = image_ids.tolist()
    return [image_id if type(image_id) in (int, str) else as_image_id(image_id) for image_id in image_ids]


def as_image_id(image_id: Any) -> ImageId:
    """Numbers as plain ones, a tensor's too (a tensor hashes by its address); tuples of such; others by type and repr."""
    if isinstance(image_id, Tensor | np.ndarray | np.generic):
        image_id = image_id.item() if len(np.shape(image_id)) == 0 else tuple(image_id.tolist())
    if isinstance(image_id, int) or (isinstance(image_id, float) and image_id.is_integer()):
        return int(image_id)
    if image_id is None or type(image_id) in (str, bytes, float):
        return image_id  # type: ignore[no-any-return]  # one of those
    if type(image_id) is tuple:
        return tuple(as_image_id(part) for part in image_id)
    try:
        hash(image_id)
    except TypeError:
        raise TypeError(
            f"Image id {image_id!r} is a {type(image_id).__name__}, which is not hashable. "
            "Pass a number, a string, or a tuple of such."
        ) from None
    return _named(image_id)


def _named(image_id: Hashable) -> ImageId:
    kind = type(image_id)
    if kind.__repr__ is object.__repr__:  # its repr is its address: the object itself is the id, in this process alone
        return image_id
    text = repr(sorted(map(repr, image_id))) if isinstance(image_id, frozenset) else repr(image_id)
    return NamedId(f"{kind.__module__}.{kind.__qualname__}", text)


def sort_key(image_id: ImageId) -> tuple[Any, ...]:
    """The order of images: numbers by value, then strings, bytes, None, tuples, and others by type and repr.

    >>> sorted(["b", 10, (1, "a"), 9, None, "a", (1,)], key=sort_key)
    [9, 10, 'a', 'b', None, (1,), (1, 'a')]
    """
    if isinstance(image_id, int | float):
        return (0, image_id)
    if isinstance(image_id, str):
        return (1, image_id)
    if isinstance(image_id, bytes):
        return (2, image_id)
    if image_id is None:
        return (3,)
    if isinstance(image_id, tuple):
        return (4, tuple(sort_key(part) for part in image_id))
    if isinstance(image_id, NamedId):
        return (5, image_id.kind, image_id.text)
    return (6,)  # known to this process alone: in the order they came


def to_json(image_id: ImageId) -> Any:
    """The id as JSON; the inverse of `from_json`.

    Raises:
        TypeError: for an object that can't be told from another one in another process.
    """
    if image_id is None or isinstance(image_id, int | str):
        return image_id
    if isinstance(image_id, float):
        return {"float": image_id.hex()}
    if isinstance(image_id, bytes):
        return {"bytes": image_id.hex()}
    if isinstance(image_id, tuple):
        return [to_json(part) for part in image_id]
    if isinstance(image_id, NamedId):
        return {"kind": image_id.kind, "text": image_id.text}
    raise TypeError(
        f"Image id {image_id!r} is known by its address alone and can't be sent to another process. "
        "Use a number, a string, a tuple of such, or a class with a __repr__ of its own."
    )


def from_json(value: Any) -> ImageId:
    """
    >>> from_json(to_json((1, "a", b"b", 0.1)))
    (1, 'a', b'b', 0.1)
    """
    if isinstance(value, list):
        return tuple(from_json(part) for part in value)
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]  # a number, a string or None
    if "float" in value:
        return float.fromhex(value["float"])
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    return NamedId(value["kind"], value["text"])
