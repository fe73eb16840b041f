"""Numbers that tell whether something has changed."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from torch_frame.checkpoint.values import encode


def fingerprint(value: Any) -> int:
    """A number that tells whether a value has changed; only this process can compare it with others.

    A list of a million numbers takes some 10 ms.

    Raises:
        CheckpointError: if it is no value that can be encoded.
    """
    try:
        written = io.BytesIO()
        _Builtins(written).dump(value)
        return hash(written.getvalue())
    except (_NotBuiltin, RecursionError, ValueError):
        return _fingerprint_of_plain(encode(value))


class _NotBuiltin(Exception):
    """A value holds more than Python's own types."""


class _Builtins(pickle.Pickler):
    """Writes values of Python's own types at the speed of C, and stops at the first other one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 5)
        self.fast = True  # equal values are equal bytes, whether an object is met twice or not

    def reducer_override(self, value: Any) -> Any:
        raise _NotBuiltin


def _fingerprint_of_plain(value: Any) -> int:
    if isinstance(value, Tensor) and value.layout is torch.jagged:
        parts = [value.values(), value.offsets()]  # type: ignore[attr-defined]
        return hash((value.dtype, *tensor_digest(parts)))
    if isinstance(value, Tensor):
        return hash((value.shape, value.dtype, *tensor_digest([value])))
    if isinstance(value, dict):
        return hash(tuple((key, _fingerprint_of_plain(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return hash(tuple(_fingerprint_of_plain(item) for item in value))
    return hash((type(value).__name__, repr(value)))


@torch.no_grad()
def tensor_digest(tensors: list[Tensor]) -> list[int]:
    """A number for the bits of each tensor, the same on every device: sums of its words, weighted by their places.

    Takes about a second for 1 GB on a CPU, and reads a device once for all of its tensors.
    """
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        sums.setdefault(tensor.device, []).append((index, _sum_of_words(tensor)))
    digests = [0] * len(tensors)
    for pairs in sums.values():
        for (index, _), number in zip(pairs, torch.stack([total for _, total in pairs]).tolist(), strict=True):
            digests[index] = number
    return digests


_ROW = 1024  # words
_AT_A_TIME = 4096 * _ROW  # 32 MB
_FACTOR = -7046029254386353131  # splitmix64's, as a signed number


def _sum_of_words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    num_words = flat.numel() // 8
    words, rest = flat[: num_words * 8].view(torch.int64), flat[num_words * 8 :].long()
    total = _weighted(_mixed(rest), 0) * 7
    for first in range(0, num_words, _AT_A_TIME):
        total = total + _sum_of_chunk(_mixed(words[first : first + _AT_A_TIME]), first // _ROW)
    return total + flat.numel() * 0x9E3779B1


def _sum_of_chunk(words: Tensor, first_row: int) -> Tensor:
    whole = len(words) // _ROW
    rows, tail = words[: whole * _ROW].view(whole, _ROW), words[whole * _ROW :]
    return _weighted(rows.sum(1), first_row) + _weighted(rows.sum(0), 0) * 3 + _weighted(tail, first_row) * 5


def _mixed(words: Tensor) -> Tensor:
    """Each word by itself, so that all of its bits count in a sum."""
    mixed = (words ^ (words >> 32)).mul_(_FACTOR)
    return mixed.bitwise_xor_(mixed >> 29)


def _weighted(numbers: Tensor, first: int) -> Tensor:
    """Integers wrap around, so any order of adding gives the same."""
    return (numbers * (2 * torch.arange(first, first + len(numbers), device=numbers.device) + 1)).sum()
