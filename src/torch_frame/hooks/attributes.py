"""Attributes of a user's hook that have changed since it was registered: 1.7 kept them in its checkpoints."""

from __future__ import annotations

import logging
import types
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from torch_frame.checkpoint.digest import fingerprint
from torch_frame.checkpoint.slots import attributes_of
from torch_frame.checkpoint.values import encode
from torch_frame.errors import CheckpointError
from torch_frame.hooks.base import HookBase

_logger = logging.getLogger("torch_frame")
_WITHOUT_STATE = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type),
    *(DataLoader, Dataset, logging.Logger, HookBase),
)


class _Seen(NamedTuple):
    """An attribute as it was: a number that tells whether it has changed, or the object itself if there is no such number."""

    number: int | None
    thing: Any


class Attributes:
    """Tells which attributes of a hook have changed.

    Args:
        hook: as it is registered.
        kept_otherwise: names that are not looked at.
    """

    def __init__(self, hook: HookBase, kept_otherwise: frozenset[str]) -> None:
        self._kept_otherwise = kept_otherwise
        self._told: set[str] = set()
        self._seen = {name: _seen(value) for name, value in self._of(hook).items()}

    def _of(self, hook: HookBase) -> dict[str, Any]:
        return {name: value for name, value in attributes_of(hook).items() if name not in self._kept_otherwise}

    def changed(self, hook: HookBase) -> dict[str, Any]:
        """Names and values of those that have changed and can be saved; of others is told, once each."""
        found: dict[str, Any] = {}
        for name, value in self._of(hook).items():
            was, now = self._seen.get(name), _seen(value)
            if was is not None and was.number == now.number and was.thing is now.thing:
                continue
            if now.number is not None:
                found[name] = value
            elif name not in self._told and not _has_no_state(value):
                self._told.add(name)
                _logger.warning("%s.%s is not in the checkpoint: %s", hook.class_name, name, _why(value, name))
        return found

    def opaque(self, hook: HookBase) -> list[str]:
        """Names of those that may change without being seen, because they hold more than plain values."""
        return [
            name for name, value in self._of(hook).items() if _seen(value).number is None and not _has_no_state(value)
        ]


def _seen(value: Any) -> _Seen:
    try:
        return _Seen(fingerprint(value), None)
    except CheckpointError:
        return _Seen(None, value)


def _has_no_state(value: Any) -> bool:
    return isinstance(value, _WITHOUT_STATE)


def _why(value: Any, name: str) -> str:
    try:
        encode(value, name)
    except CheckpointError as error:
        return str(error)
    return ""
