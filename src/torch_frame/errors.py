"""Errors that torch-frame raises on purpose.

```
TorchFrameError
 +- StepOutputError      (TypeError)            what a training step returned cannot be trained on
 +- SettingError         (ValueError)           a setting contradicts another one, or the model, or the data
 +- NonFiniteError       (FloatingPointError)   a loss, a gradient or a weight is NaN or infinite
 +- CheckpointError      (RuntimeError)         a checkpoint cannot be written, read, or does not fit
 +- WorkDirError         (OSError)              the work dir cannot be made or written
```

Each is also the built-in error that people would catch, so `except ValueError` keeps working.
"""

from __future__ import annotations


class TorchFrameError(Exception):
    """The base of every error that torch-frame raises on purpose."""


class StepOutputError(TorchFrameError, TypeError):
    """A training step returned something that cannot be trained on."""


class SettingError(TorchFrameError, ValueError):
    """A setting contradicts another setting, the model, the optimizer or the data."""


class NonFiniteError(TorchFrameError, FloatingPointError):
    """A loss, a gradient or a weight became NaN or infinite."""


class CheckpointError(TorchFrameError, RuntimeError):
    """A checkpoint could not be written or read, or it belongs to another run."""


class WorkDirError(TorchFrameError, OSError):
    """The work dir cannot be made or written."""
