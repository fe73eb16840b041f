"""What a checkpoint holds of a run, and in which order it is taken and put back."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

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
from torch_frame.distributed.comm import get_world_size
from torch_frame.errors import CheckpointError, SettingError
from torch_frame.files import SaveRequest
from torch_frame.tracking.console import logger
from torch_frame.training.finite import check_weights, trained_tensors

if TYPE_CHECKING:
    from torch_frame.trainer import Trainer


def contents(trainer: Trainer, requests: Sequence[SaveRequest]) -> dict[str, Any]:
    """What is to be written for some saves, as the run stands now: plain types, and the run's own tensors.

    Returns:
        "files": (path, path the old file is kept as, content, files to remove afterwards) for each request.
        "must_be_finite": tensors without which nothing is written. "where": the moment, in words.

    Raises:
        NonFiniteError: where a loss or a gradient that has not been read yet is not finite.
        SettingError: for a whole state inside a window of gradients.
        WorkDirError: where the folder cannot be made.
    """
    trainer.metric_storage.flush()  # raises where what is read now is not finite
    _make_folder(trainer.ckpt_dir)
    weights = bare_state_dict(trainer.model_evaluate)
    files = []
    for file_name, save_single_model, outdated in requests:
        if not save_single_model and trainer.updater.window_open:
            raise SettingError(
                f"{file_name} would be saved inside a window of gradient_accumulation_steps, whose gradient it cannot hold. "
                "Ask with trainer.save_at_safe_point(...), which waits for the window's end."
            )
        older = os.path.join(trainer.ckpt_dir, "previous.pth") if file_name == "latest.pth" else None
        content = weights if save_single_model else capture(trainer)
        files.append((os.path.join(trainer.ckpt_dir, file_name), older, content, list(outdated)))
    where = f"epoch {trainer.epoch}, iteration {trainer.cur_iter}"
    return {"files": files, "must_be_finite": trained_tensors(trainer.model_or_module), "where": where}


def write_files(files: Mapping[str, Any], cancelled: Callable[[], bool] | None = None) -> None:
    """Write what `contents` gave; what a file makes superfluous goes once that file is verified.

    Raises:
        NonFiniteError: where weights are NaN or infinite; nothing is written then.
        CheckpointError: where a file cannot be written.
    """
    check_weights(files["must_be_finite"], files["where"])
    for path, older, content, outdated in files["files"]:
        io.write(path, content, keep_as=older, cancelled=cancelled)
        remove(outdated)


def remove(paths: Iterable[str]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def remove_halves(ckpt_dir: str) -> None:
    """Remove what a process that was killed inside a save has left; for a run that begins, whose folder it is."""
    remove(glob.glob(os.path.join(glob.escape(ckpt_dir), ".*.tmp")))


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made, so nothing is saved: {error}.") from error


def read(path: str) -> Mapping[str, Any]:
    """Read a whole state.

    Raises:
        CheckpointError: where the file is damaged, or holds weights alone.
    """
    state: Any = io.read(path)
    if not is_full_state(state):
        raise CheckpointError(
            f"{path} holds weights, not a training state to resume from. "
            f"For the weights alone: trainer.load_checkpoint(checkpoint=torch.load({path!r}))."
        )
    if not 2 <= state["version"] <= VERSION:
        raise CheckpointError(
            f"{path} has format {state['version']}, and this torch-frame {__version__} reads formats 2 to {VERSION}. "
            f"It was written by torch-frame {state.get('torch_frame')}: resume it with that version."
        )
    loaded: Mapping[str, Any] = state
    return loaded


def newest(ckpt_dir: str, news: list[tuple[int, str]]) -> tuple[str, Mapping[str, Any]] | None:
    """The newest whole state of a run, or None where it has none.

    Args:
        ckpt_dir: where `latest.pth` and `previous.pth` are.
        news: what was wrong with the other one is added here.

    Raises:
        CheckpointError: where there are states, and all are damaged: beginning anew would write over them.
    """
    problems = []
    for name in ("latest.pth", "previous.pth"):
        path = os.path.join(ckpt_dir, name)
        try:
            state = read(path)
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            problems.append(str(error))
            continue
        news += [(logging.WARNING, f"Not resumed from: {problem}") for problem in problems]
        return path, state
    if problems:
        raise CheckpointError(
            f"resume='auto' finds no whole state in {ckpt_dir}: {' '.join(problems)} To begin anew, move them away; to begin "
            "from weights alone (best.pth), use load_checkpoint(checkpoint=...)."
        )
    return None


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
        "sealed": True,  # a digest follows in the file: one that lacks it has been cut
        "torch_frame": __version__,
        "progress": trainer.progress.state_dict(),
        "model": bare_state_dict(trainer.model_or_module),
        "ema": None if trainer.model_ema is None else trainer.model_ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "classes": _classes(trainer),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "grad_scaler": None if trainer.precision.scaler is None else trainer.precision.scaler.state_dict(),
        "precision": trainer.precision.name,
        "seed": trainer.seed,
        "loader_seed": _loader_seed(trainer),
        "data": trainer.source.state_dict(),
        "data_length": trainer.source.length,
        "environment": environment(trainer),
        "loader_generators": loader_generator_states(trainer.data_loader),
        **_what_hooks_may_change(trainer),
        **(trainer.before_after_epoch or {}),
    }
    converted: dict[str, Any] = plain(state)
    return converted


def _what_hooks_may_change(trainer: Trainer) -> dict[str, Any]:
    return {
        "metric_storage": trainer.metric_storage.state_dict(),
        "hooks": trainer.hook_caller.state_dict(),
        "rng": [rng_state()],  # of each rank
    }


def before_after_epoch(trainer: Trainer) -> dict[str, Any] | None:
    """The part of a state that `after_epoch` changes, to save the run as it was before where a signal breaks that off.

    None where a hook's state cannot be saved: a signal then waits for the end of `after_epoch`.
    """
    try:
        copied: dict[str, Any] = plain(_what_hooks_may_change(trainer), copy_tensors=True)
    except CheckpointError:
        return None
    return copied


def environment(trainer: Trainer) -> dict[str, Any]:
    """What the last bits of a training step depend on beside the state."""
    device = trainer.device
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "world_size": get_world_size(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "batch_size": getattr(trainer.data_loader, "batch_size", None),
    }


def environment_differences(trainer: Trainer, state: Mapping[str, Any]) -> list[str]:
    """What is different from where the state was saved: the run goes on, but its last bits may differ."""
    then, now = state["environment"] or {}, environment(trainer)
    return [
        f"{name} was {then[name]}, now it is {now[name]}" for name in now if name in then and then[name] != now[name]
    ]


def _loader_seed(trainer: Trainer) -> int | None:
    """Of an InfiniteDataLoader that was given one; it goes before the trainer's."""
    seed = getattr(trainer.data_loader, "seed", None)
    return seed if isinstance(seed, int) else None


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
        if state["ema"] is None:  # a converted state: 1.7 kept none
            trainer.model_ema.reset(trainer.model)
            trainer.model_ema.updates = state["progress"]["num_updates"]
        else:
            trainer.model_ema.load_state_dict(state["ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if trainer.precision.scaler is not None:
        trainer.precision.scaler.load_state_dict(state["grad_scaler"])
    trainer.metric_storage.load_state_dict(state["metric_storage"])
    trainer.hook_caller.load_state_dict(state["hooks"])
    trainer.progress.load_state_dict(state["progress"])
    if state["seed"] is not None:
        trainer.seed = state["seed"]


def restore_rng(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put the random numbers back; the last thing before the first batch."""
    if state["data"]:
        trainer.source.load_state_dict(state["data"], trainer.progress.position)
    if not trainer.source.is_ours:
        start_persistent_workers(trainer.data_loader)
    if state["loader_generators"] is not None:
        set_loader_generator_states(trainer.data_loader, state["loader_generators"])
    if state["rng"] is not None:
        set_rng_state(state["rng"][0])


def _check_fits(trainer: Trainer, state: Mapping[str, Any]) -> None:
    differences = [
        *_model_differences(trainer, state["model"]),
        *_optimizer_differences(trainer, state["optimizer"], tolerant="classes" in state.get("unknown", ())),
    ]
    unknown = state.get("unknown", ())  # in a state converted from 1.7, which saved less
    if "ema" not in unknown and (state["ema"] is None) != (trainer.model_ema is None):
        differences.append(f"use_ema was {state['ema'] is not None}, now it is {trainer.model_ema is not None}")
    if state["precision"] != trainer.precision.name:
        differences.append(f"precision was {state['precision']}, now it is {trainer.precision.name}")
    for what, name in _classes(trainer).items():
        if "classes" not in unknown and name != state["classes"][what]:
            differences.append(f"the {what} was {state['classes'][what]}, now it is {name}")
    steps_then = (state["lr_scheduler"]["scheduler"] or {}).get("total_steps")
    steps_now = getattr(trainer.lr_scheduler.scheduler, "total_steps", None)
    if steps_then != steps_now:
        differences.append(f"the lr_scheduler was made for {steps_then} steps, now it is for {steps_now}")
    length_then, length_now = state["data_length"], trainer.source.length
    if length_then is not None and length_now is not None and length_then != length_now:
        differences.append(
            f"an epoch's data was {length_then[0]} {length_then[1]}, now it is {length_now[0]} {length_now[1]}"
        )
    if trainer.seed_is_explicit and state["seed"] not in (None, trainer.seed):
        differences.append(f"seed was {state['seed']}, now it is {trainer.seed}")
    if state["loader_seed"] != _loader_seed(trainer) and "seed" not in unknown:
        differences.append(f"the loader's seed was {state['loader_seed']}, now it is {_loader_seed(trainer)}")
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


def _optimizer_differences(trainer: Trainer, saved: Mapping[str, Any], *, tolerant: bool) -> list[str]:
    """`tolerant`: an older torch wrote it, whose optimizers had fewer settings."""
    own = trainer.optimizer.state_dict()
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    mine = [len(group["params"]) for group in own["param_groups"]]
    if theirs != mine:
        return [f"the optimizer's parameter groups held {theirs} tensors, now they hold {mine}"]
    settings = [
        set(other) - set(group) if tolerant else set(group) ^ set(other)
        for group, other in zip(own["param_groups"], saved["param_groups"], strict=True)
    ]
    if any(settings):
        return [
            f"the optimizer is another one: {', '.join(sorted(set().union(*settings)))} are settings of one of them alone"
        ]
    return []


def _shortened(lines: list[str], of: str, most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"{len(lines) - most} {of}"]
