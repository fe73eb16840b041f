"""The hooks of a Trainer that is not given any."""

from __future__ import annotations

from torch_frame.hooks.base import HookBase
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.hooks.logger import LoggerHook


def default_hooks() -> list[HookBase]:
    """Save each epoch, after the last one and every 30 minutes; log to the console, TensorBoard and metrics.jsonl."""
    return [CheckpointerHook(every_n_minutes=30), LoggerHook()]
