"""Checkpoints of torch-frame 1.7, turned into states of today. Asked for by name, never done on the way.

A state of 1.7 is a pickle of objects: its MetricStorage and whatever its hooks held, a DataLoader with its dataset too. It is
read without running any of that (`inert`), and what is of use is put where a state of today has it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_frame._version import __version__
from torch_frame.checkpoint import inert, io
from torch_frame.checkpoint.format import FORMAT, VERSION, is_full_state, plain
from torch_frame.errors import CheckpointError
from torch_frame.progress import Progress

CONVERTED_FROM = "torch-frame 1.7"

_KNOWN = {
    "torch_frame.trainer.MetricStorage": OrderedDict,
    "torch_frame.utils.history_buffer.HistoryBuffer": inert.Record,
}
_KEYS = ("epoch", "model", "optimizer", "lr_scheduler", "metric_storage")
_HOOK_SETTINGS = {
    *("_period", "_max_to_keep", "save_metric", "save_last"),
    *("prefix", "dataloader", "_eval_func", "_eval_metric"),
}


@dataclass(frozen=True)
class Conversion:
    """What became of a state of 1.7.

    Attributes:
        state: of today's format.
        unknown: its keys that are None because 1.7 did not save them.
        left_out: place in the old state -> why it has none in the new one.
        saved_inside: it was saved between the batches of an epoch, which begins anew.
    """

    state: dict[str, Any]
    unknown: tuple[str, ...]
    left_out: dict[str, str]
    saved_inside: bool


def convert(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    ema: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Conversion:
    """Write the state of a run of torch-frame 1.7 as a state that `load_checkpoint` continues. `old` stays as it is.

    The run continues at the beginning of the next epoch, with the learning rates that 1.7 would have used.

    Args:
        old: what 1.7 wrote with `save_single_model=False`: `latest.pth`.
        new: the file to write.
        ema: weights of the average at the same moment, which 1.7 kept in a file of their own: `best.pth`, if it was written in
            the same epoch. None: the average begins anew from the weights, as it did in 1.7.
        force: write over `new` where it exists.

    Raises:
        CheckpointError: where `old` is no state of 1.7, is damaged or made to run code, or `new` cannot be written.
    """
    old, new = Path(old), Path(new)
    if new.exists() and old.exists() and os.path.samefile(old, new):
        raise CheckpointError(f"{new} is the file to be converted. It is kept as it is: give the new one another name.")
    if new.exists() and not force:
        raise CheckpointError(f"{new} exists already. Give another name, or --force (force=True) to write over it.")
    state = _read(old)
    try:
        conversion = converted(state, None if ema is None else _weights(Path(ema)))
    except CheckpointError as error:
        raise CheckpointError(f"{old} cannot be converted. {error}") from error
    io.write(new, conversion.state)
    return conversion


def converted(old: Mapping[str, Any], ema: Mapping[str, Any] | None = None) -> Conversion:
    """What `convert` writes.

    Args:
        old: a state of 1.7, read by `inert`.
        ema: weights of the average.

    Raises:
        CheckpointError: where a part of it is not what 1.7 writes.
    """
    left_out = {"work_dir": "a run's folder is the one that its file lies in"} if "work_dir" in old else {}
    try:
        progress, saved_inside = _progress(old)
        # One line for each part of `torch_frame.run.table`, in its order: here and nowhere else the two formats meet.
        state = {
            "format": FORMAT,
            "version": VERSION,
            "sealed": True,
            "torch_frame": __version__,
            "converted_from": CONVERTED_FROM,
            "progress": progress.state_dict(),
            "metric_storage": _metrics(old["metric_storage"], progress.iter),
            "hooks": {name: _hook(name, kept, left_out) for name, kept in old.get("hooks", {}).items()},
            "frozen": None,
            "attributes": None,
            "model": _bare(old["model"]),
            "ema": None if ema is None else _ema(ema, old["model"], progress.num_updates),
            "requires_grad": None,
            "optimizers": {"optimizer": old["optimizer"]},
            "classes": None,
            "lr_schedulers": {"lr_scheduler": _schedule(old["lr_scheduler"])},
            "settings": {},
            "grad_scaler": old.get("grad_scaler"),
            "modes": None,
            "precision": "fp16" if "grad_scaler" in old else "fp32",
            "seed": None,
            "loader_seed": None,
            "data_length": None,
            "environment": None,
            "data": None,
            "loader_generators": None,
            "rng": None,
        }
        unknown = tuple(key for key, value in state.items() if value is None and key not in ("grad_scaler", "frozen"))
        return Conversion(plain({**state, "unknown": list(unknown)}), unknown, left_out, saved_inside)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"It has the keys of a state of torch-frame 1.7, but not their content ({type(error).__name__}: {error}). "
            "For the weights alone: load_checkpoint(checkpoint=...)."
        ) from error


def _progress(old: Mapping[str, Any]) -> tuple[Progress, bool]:
    """The counters at the beginning of the epoch that is next, and whether that one had begun.

    1.7 saves the index of the epoch, and goes on behind it. Where a hook of the user's saved between two batches, that would
    leave out the rest of the epoch and put the schedule out of step with it: the epoch begins anew instead.
    """
    schedule, epoch = old["lr_scheduler"], int(old["epoch"])
    if "scheduler_state_dict" not in schedule:
        raise CheckpointError(
            "Its lr_scheduler is none that Trainer and DDPTrainer of 1.7 use, but another one (AccelerateTrainer with a schedule "
            "by name?), a kind of state that 1.7 could not resume either. For the weights alone: load_checkpoint(checkpoint=...)."
        )
    epoch_len, num_updates = int(schedule["epoch_len"]), int(schedule["last_epoch"])
    logged = vars(old["metric_storage"])["_latest_iter"].get("lr", -1) + 1
    trained = max(num_updates, logged)  # a train_one_iter of the user's may have left out the one or the other
    inside = trained > 0 and epoch * epoch_len <= trained < (epoch + 1) * epoch_len
    done = epoch if inside else epoch + 1
    return Progress(epoch=done, iter=done * epoch_len, num_updates=num_updates), inside


def _bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


def _ema(average: Mapping[str, Any], model: Mapping[str, Any], num_updates: int) -> dict[str, Any]:
    average = _bare(average)
    differing = sorted(average.keys() ^ _bare(model).keys())
    if differing:
        raise CheckpointError(
            f"The weights of the average are of another model: {', '.join(differing[:5])} "
            f"{'and more ' if len(differing) > 5 else ''}are in one of the two files alone."
        )
    return {"updates": num_updates, "model": average}


def _schedule(old: Mapping[str, Any]) -> dict[str, Any]:
    """1.7 asked the wrapped scheduler for its closed form and left its own counters behind; `step()` goes on from them."""
    wrapped = dict(old["scheduler_state_dict"])
    wrapped |= {"_step_count": wrapped["last_epoch"] + 1, "_last_lr": list(old["regular_lrs"])}
    method = old["warmup_method"]
    return {
        "num_updates": int(old["last_epoch"]),
        "metric_at": None,
        "regular_lrs": [float(lr) for lr in old["regular_lrs"]],
        "warmup": [method, 0 if method is None else old["warmup_iters"], old["warmup_factor"]],
        "scheduler": wrapped,
    }


def _metrics(storage: Any, iter: int) -> dict[str, Any]:
    """Values of an epoch that begins anew count as of the time before it: those that come are later."""
    smooth, latest_iter = vars(storage)["_smooth"], vars(storage)["_latest_iter"]
    return {
        name: {
            "window": [float(value) for value in buffer["_history"]],
            "window_size": buffer["_history"].maxlen,
            "count": int(buffer["_count"]),
            "sum": float(buffer["_sum"]),
            "smooth": bool(smooth[name]),
            "latest_iter": min(int(latest_iter[name]), iter - 1),
        }
        for name, buffer in ((name, vars(record)) for name, record in storage.items())
    }


def _hook(name: str, old: Any, left_out: dict[str, str]) -> Any:
    """A hook's state. 1.7's CheckpointerHook and EvalHook saved all their attributes: settings, loaders and functions too."""
    if not isinstance(old, Mapping):
        return old
    new = {}
    if {"cur_best", "_recent_checkpoints"} <= old.keys():
        new = {"cur_best": float(old["cur_best"]), "recent_checkpoints": list(old["_recent_checkpoints"])}
        settings = sorted(key.lstrip("_") for key in _HOOK_SETTINGS & old.keys())
        left_out[name] = f"{', '.join(settings)}: the hook that you register has its own"
        old = {k: v for k, v in old.items() if k not in _HOOK_SETTINGS | {"cur_best", "_recent_checkpoints"}}
    for key, value in old.items():
        try:
            new[key] = plain(value)
        except CheckpointError:
            left_out[f"{name}.{key}"] = "holds more than plain types and tensors"
    return new


# ---------------------------------------------------------------- is it one?


def _read(path: Path) -> Mapping[str, Any]:
    """Read a state of 1.7.

    Raises:
        CheckpointError: saying what it is instead.
    """
    old = inert.read(path, _KNOWN)
    if is_full_state(old):
        raise CheckpointError(f"{path} has today's format already: load_checkpoint({str(path)!r}) continues it.")
    if not isinstance(old, Mapping):
        raise CheckpointError(f"{path} holds a {type(old).__name__}, not a state of torch-frame 1.7.")
    missing = [key for key in _KEYS if key not in old]
    if not missing:
        return old
    if old and all(isinstance(value, Tensor) for value in old.values()):
        raise CheckpointError(
            f"{path} holds weights alone, which need no conversion: load_checkpoint(checkpoint=torch.load({str(path)!r}))."
        )
    raise CheckpointError(
        f"{path} is no state of torch-frame 1.7: it has no {_some(missing)}; it holds {_some(map(str, old)) or 'nothing'}."
    )


def _weights(path: Path) -> Mapping[str, Any]:
    try:
        weights = io.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    if isinstance(weights, Mapping) and weights and all(isinstance(value, Tensor) for value in weights.values()):
        return weights
    raise CheckpointError(f"{path} does not hold weights alone, as best.pth and epoch_N.pth of 1.7 do.")


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
