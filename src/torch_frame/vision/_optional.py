"""OpenCV and torchvision: used where they can be imported, needed nowhere."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

logger = logging.getLogger("torch_frame")


def opencv() -> Any:
    """The module cv2, or None."""
    return imported("cv2", "torch and NumPy change pictures instead, up to a level apart")


def torchvision_ops() -> Any:
    """The module torchvision.ops, or None: also where torchvision was built for another torch, which is a RuntimeError."""
    return imported("torchvision.ops", "NMS runs in NumPy, with the same results")


@functools.cache
def imported(name: str, instead: str) -> Any:
    """The module, or None if it is not installed or can't be imported; the latter is told in one line."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            return None
        reason: Exception = error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = error
    logger.info("%s can't be imported (%s); %s.", package, str(reason).strip(), instead)
    return None
