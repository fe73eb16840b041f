"""The lines that a run begins with: what is trained, on what, how long, and where it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from torch_frame._version import __version__
from torch_frame.distributed.comm import get_world_size

if TYPE_CHECKING:
    from torch_frame.trainer import Trainer

_LINE = "-" * 50


def banner(trainer: Trainer) -> str:
    """The run at a glance, as a text of several lines."""
    rows = {
        "Work directory": trainer.work_dir,
        "Model": _model_row(trainer.model_or_module),
        "Device": f"{trainer.device}, precision {trainer.precision.name}",
        "Batch": _batch_row(trainer),
        "Steps": _steps_row(trainer),
    }
    return "\n".join([_LINE, f"torch-frame {__version__}", *(f"{name}: {row}" for name, row in rows.items()), _LINE])


def _model_row(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    return f"{type(model).__name__}, {total:,} parameters ({trainable:,} trainable), {size / 2**20:.1f} MiB"


def _batch_row(trainer: Trainer) -> str:
    """The samples that one update is made of."""
    accumulated, processes = trainer.gradient_accumulation_steps, get_world_size()
    batch_size: int | None = getattr(trainer.data_loader, "batch_size", None)
    if batch_size is None:
        return f"{accumulated * processes} of the loader's batches an update"
    parts = [f"{batch_size} a batch"]
    if accumulated > 1:
        parts.append(f"{accumulated} accumulated")
    if processes > 1:
        parts.append(f"{processes} processes")
    return f"{batch_size * accumulated * processes} samples an update ({' x '.join(parts)})"


def _steps_row(trainer: Trainer) -> str:
    if trainer.updates_per_epoch is None:
        return f"{trainer.max_epochs} epochs; the loader has no length"
    updates = trainer.max_epochs * trainer.updates_per_epoch
    return f"{trainer.max_epochs} epochs x {trainer.epoch_len} batches, {updates:,} updates"
