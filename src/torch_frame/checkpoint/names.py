"""Names of a bare model's tensors: those that they have without torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def bare_name(name: str) -> str:
    """The name that a tensor of a bare model has without torch.compile."""
    return name.replace("_orig_mod.", "")


def bare_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A bare model's `state_dict` under the names that it has without torch.compile."""
    return {bare_name(name): value for name, value in state.items()}
