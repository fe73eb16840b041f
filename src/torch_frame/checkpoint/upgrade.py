"""States of the format before today's, turned into today's when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_frame.checkpoint.format import VERSION

OLDEST = 2
"""The oldest format that is read."""


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A whole state in today's format; one that is in it already is returned as it is.

    Args:
        state: of version `OLDEST` to `VERSION`.
    """
    return _from_2(state) if state["version"] == 2 else state


def _from_2(state: Mapping[str, Any]) -> dict[str, Any]:
    """Format 2 had one optimizer, whose state goes by the positions of its parameters, and one schedule."""
    renamed = {"optimizer": "optimizers", "lr_scheduler": "lr_schedulers"}
    made: dict[str, Any] = {}
    for key, value in state.items():
        if key in renamed:
            made[renamed[key]] = {key: value}
        else:
            made[key] = value
    return {**made, "version": VERSION, "frozen": None, "requires_grad": None, "attributes": None}
