"""What a checkpoint holds of a run, and in which order it is taken and put back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torch_frame._version import __version__
from torch_frame.checkpoint import io
from torch_frame.checkpoint.format import FORMAT, VERSION, is_full_state, plain
from torch_frame.checkpoint.weights import WeightsReport, bare_state_dict, load_weights
from torch_frame.data.seeding import (
    loader_generator_states,
    rng_state,
    set_loader_generator_states,
    set_rng_state,
    start_persistent_workers,
)
from torch_frame.errors import CheckpointError, NonFiniteError, SettingError
from torch_frame.tracking.console import logger

if TYPE_CHECKING:
    from torch_frame.trainer import Trainer


def save(trainer: Trainer, file_name: str, save_single_model: bool) -> str:
    """Write weights or the whole state below `ckpt_dir`; returns where.

    Raises:
        NonFiniteError: where weights are NaN or infinite.
        CheckpointError: where the file cannot be written.
        SettingError: for a whole state inside a window of gradients.
    """
    if not save_single_model and trainer.updater.window_open:
        raise SettingError(
            f"{file_name} would be saved inside a window of gradient_accumulation_steps, whose gradient it cannot hold. "
            "Ask with trainer.save_at_safe_point(...), which waits for the window's end."
        )
    check_finite(trainer)
    os.makedirs(trainer.ckpt_dir, exist_ok=True)
    path = os.path.join(trainer.ckpt_dir, file_name)
    if save_single_model:
        io.write(path, bare_state_dict(trainer.model_evaluate))
    else:
        older = os.path.join(trainer.ckpt_dir, "previous.pth") if file_name == "latest.pth" else None
        io.write(path, capture(trainer), keep_as=older)
    return path


def load(trainer: Trainer, path: str) -> Mapping[str, Any]:
    """Read a whole state and restore it, all but random numbers.

    Raises:
        CheckpointError: where the file is damaged, holds weights alone, or does not fit; nothing is changed then.
    """
    state: Any = io.read(path)
    if not is_full_state(state):
        raise CheckpointError(
            f"{path} holds weights, not a training state to resume from. "
            f"For the weights alone: trainer.load_checkpoint(checkpoint=torch.load({path!r}))."
        )
    restore(trainer, state)
    loaded: Mapping[str, Any] = state
    return loaded


def load_weights_only(trainer: Trainer, checkpoint: Mapping[str, Any]) -> WeightsReport:
    """Begin with given weights: what fits is loaded, EMA begins anew from it, and the rest is reported."""
    report = load_weights(trainer.model_or_module, checkpoint["model"] if is_full_state(checkpoint) else checkpoint)
    if trainer.model_ema is not None:
        trainer.model_ema.reset(trainer.model)
    if not report.complete:
        logger.warning("The weights fit in part: %s", report)
    return report


def capture(trainer: Trainer) -> dict[str, Any]:
    """The whole state of the run, as plain types and tensors."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "torch_frame": __version__,
        "torch": str(torch.__version__),
        "progress": trainer.progress.state_dict(),
        "model": bare_state_dict(trainer.model_or_module),
        "ema": None if trainer.model_ema is None else trainer.model_ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "classes": _classes(trainer),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "grad_scaler": None if trainer.precision.scaler is None else trainer.precision.scaler.state_dict(),
        "precision": trainer.precision.name,
        "metric_storage": trainer.metric_storage.state_dict(),
        "hooks": trainer.hook_caller.state_dict(),
        "seed": trainer.seed,
        "data": trainer.source.state_dict(),
        "rng": rng_state(),
        "loader_generators": loader_generator_states(trainer.data_loader),
    }
    converted: dict[str, Any] = plain(state)
    return converted


def _classes(trainer: Trainer) -> dict[str, str]:
    scheduler = trainer.lr_scheduler.scheduler
    return {"optimizer": type(trainer.optimizer).__qualname__, "lr_scheduler": type(scheduler).__qualname__}


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put a captured state back, all but random numbers: those follow when training begins (`restore_rng`).

    Raises:
        CheckpointError: where the state does not fit this trainer; it is checked before anything is changed.
    """
    _check_fits(trainer, state)
    load_weights(trainer.model_or_module, state["model"])
    if trainer.model_ema is not None:
        trainer.model_ema.load_state_dict(state["ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if trainer.precision.scaler is not None:
        trainer.precision.scaler.load_state_dict(state["grad_scaler"])
    trainer.metric_storage.load_state_dict(state["metric_storage"])
    trainer.hook_caller.load_state_dict(state["hooks"])
    trainer.progress.load_state_dict(state["progress"])
    trainer.seed = state["seed"]


def restore_rng(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put the random numbers back; the last thing before the first batch."""
    if state["data"]:
        trainer.source.load_state_dict(state["data"], trainer.progress.position)
    if not trainer.source.is_ours:
        start_persistent_workers(trainer.data_loader)
    set_loader_generator_states(trainer.data_loader, state["loader_generators"])
    set_rng_state(state["rng"])


def _check_fits(trainer: Trainer, state: Mapping[str, Any]) -> None:
    differences = [
        *_model_differences(trainer, state["model"]),
        *_optimizer_differences(trainer, state["optimizer"]),
    ]
    if state["version"] > VERSION:
        differences.append(f"its format is {state['version']}, this torch-frame {__version__} knows up to {VERSION}")
    if (state["ema"] is None) != (trainer.model_ema is None):
        differences.append(f"use_ema was {state['ema'] is not None}, now it is {trainer.model_ema is not None}")
    if state["precision"] != trainer.precision.name:
        differences.append(f"precision was {state['precision']}, now it is {trainer.precision.name}")
    for what, name in _classes(trainer).items():
        if name != state["classes"][what]:
            differences.append(f"the {what} was {state['classes'][what]}, now it is {name}")
    steps_then = (state["lr_scheduler"]["scheduler"] or {}).get("total_steps")
    steps_now = getattr(trainer.lr_scheduler.scheduler, "total_steps", None)
    if steps_then != steps_now:
        differences.append(f"the lr_scheduler was made for {steps_then} steps, now it is for {steps_now}")
    if differences:
        raise CheckpointError(
            "The checkpoint is of another run than this trainer was built for:\n  - "
            + "\n  - ".join(differences)
            + "\nBuild the trainer as it was built then, or load the weights alone: load_checkpoint(checkpoint=...)."
        )


def _model_differences(trainer: Trainer, saved: Mapping[str, Any]) -> list[str]:
    own = bare_state_dict(trainer.model_or_module)
    differences = [f"the model has no {name}" for name in saved if name not in own]
    differences += [f"the checkpoint has no {name}" for name in own if name not in saved]
    for name, value in own.items():
        theirs = saved.get(name)
        if isinstance(value, torch.Tensor) and isinstance(theirs, torch.Tensor) and value.shape != theirs.shape:
            differences.append(f"{name} was {list(theirs.shape)}, now it is {list(value.shape)}")
    return _shortened(differences, "more tensors differ")


def _optimizer_differences(trainer: Trainer, saved: Mapping[str, Any]) -> list[str]:
    own = trainer.optimizer.state_dict()
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    mine = [len(group["params"]) for group in own["param_groups"]]
    if theirs != mine:
        return [f"the optimizer's parameter groups held {theirs} tensors, now they hold {mine}"]
    settings = [
        set(group) ^ set(other) for group, other in zip(own["param_groups"], saved["param_groups"], strict=True)
    ]
    if any(settings):
        return [
            f"the optimizer is another one: {', '.join(sorted(set().union(*settings)))} are settings of one of them alone"
        ]
    return []


def _shortened(lines: list[str], of: str, most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"{len(lines) - most} {of}"]


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """What batch norm has gathered. Other buffers may hold infinities on purpose, a mask for instance."""
    return {
        f"{name}.{kind}" if name else kind: getattr(module, kind)
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for kind in ("running_mean", "running_var")
        if getattr(module, kind, None) is not None
    }


def check_finite(trainer: Trainer) -> None:
    """Refuse to write weights that are NaN or infinite over a good checkpoint.

    Raises:
        NonFiniteError: naming the first such parameter.
    """
    trainer.metric_storage.flush()  # raises where a loss or a gradient that has not been read yet is not finite
    parameters = {
        n: p for n, p in trainer.model_or_module.named_parameters() if p.requires_grad and p.is_floating_point()
    }
    tensors: dict[str, Tensor] = {**parameters, **_running_statistics(trainer.model_or_module)}
    with torch.no_grad():
        norms = torch._foreach_norm(list(tensors.values()), math.inf) if tensors else ()
    for name, norm in zip(tensors, norms, strict=True):
        if not math.isfinite(norm.item()):
            raise NonFiniteError(
                f"{name} holds NaN or infinite values, so no checkpoint is written; the last one is untouched. "
                f"Epoch {trainer.epoch}, iteration {trainer.cur_iter}."
            )
