"""What a checkpoint file holds, without a model to load it into."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from torch_frame.checkpoint import io
from torch_frame.checkpoint.format import is_full_state
from torch_frame.checkpoint.seal import verify
from torch_frame.errors import CheckpointError


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a file in plain types, ready for JSON; runs no code that it may contain.

    Returns:
        "file", "bytes", "digest" ("valid", "none" or "damaged") and "digest_words", "kind" ("state", "weights", "other" or
        "unreadable"); where it can be read, "weights" (name, shape, dtype of each tensor), "num_parameters" and "num_bytes" of
        them; of a state "progress", "parts" (part -> number of tensors and bytes), "left_out" (names of the frozen parameters
        that `save_frozen=False` has left out), "precision", "seed", "classes", "hooks", "environment", "versions"; where it
        cannot be read, "problem".

    Raises:
        FileNotFoundError: where there is none.
    """
    verdict, words = verify(path)
    described: dict[str, Any] = {
        "file": os.fspath(path),
        "bytes": os.path.getsize(path),
        "digest": verdict,
        "digest_words": words,
    }
    try:
        checkpoint = io.read(path)
    except CheckpointError as error:
        return {**described, "kind": "unreadable", "problem": str(error)}
    if is_full_state(checkpoint):
        return {**described, **_of_state(checkpoint)}
    if isinstance(checkpoint, Mapping) and any(isinstance(value, Tensor) for value in checkpoint.values()):
        return {**described, "kind": "weights", **_of_weights(checkpoint)}
    return {**described, "kind": "other", "parts": _parts(checkpoint)}


def _of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    environment = state.get("environment") or {}
    return {
        "kind": "state",
        "versions": {
            "format": state["version"],
            "torch_frame": state["torch_frame"],
            "torch": environment.get("torch", "unknown"),
        },
        "progress": dict(state["progress"]),
        "precision": state["precision"],
        "seed": state["seed"],
        "data_length": None if state.get("data_length") is None else list(state["data_length"]),
        "classes": state["classes"],
        "hooks": sorted(name for name in state["hooks"] if not name.startswith("#")),
        "environment": dict(environment),
        "left_out": list(state.get("frozen") or {}),
        "parts": _parts(state),
        **_of_weights(state["model"]),
    }


def _of_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    return {
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_bytes": sum(map(_num_bytes, tensors.values())),
        "dtypes": sorted({_dtype(tensor) for tensor in tensors.values()}),
        "weights": [
            {"name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor), "bytes": _num_bytes(tensor)}
            for name, tensor in tensors.items()
        ],
    }


def _parts(checkpoint: Any) -> dict[str, dict[str, int]]:
    """For each part that holds tensors, how many and how large."""
    parts = checkpoint.items() if isinstance(checkpoint, Mapping) else [("content", checkpoint)]
    described = {}
    for name, part in parts:
        tensors = list(_tensors_in(part))
        if tensors:
            described[str(name)] = {"tensors": len(tensors), "bytes": sum(map(_num_bytes, tensors))}
    return described


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_in(item)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
