"""The parts of a checkpoint that are not simply an object's own `state_dict`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_frame.checkpoint.format import plain
from torch_frame.checkpoint.misfits import misfits, own_names
from torch_frame.checkpoint.names import bare_name, bare_names
from torch_frame.checkpoint.values import decode, encode_most
from torch_frame.data.rng import (
    loader_generator_states,
    rng_state,
    set_loader_generator_states,
    set_rng_state,
    start_persistent_workers,
)
from torch_frame.data.source import Source
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import CheckpointError
from torch_frame.progress import Progress
from torch_frame.run.libraries import LIBRARIES, loaded_versions
from torch_frame.run.modes import Modes
from torch_frame.run.optimizers import some
from torch_frame.run.samplers import Samplers
from torch_frame.run.script_settings import AllSettings, Settings
from torch_frame.run.state import CheckedPart, Line, Part, RefusingPart, UndoablePart
from torch_frame.run.trained import FrozenParameters
from torch_frame.training.buffers import prepare_to_load, without_empty
from torch_frame.training.ema import EMA
from torch_frame.training.finite import trained_tensors
from torch_frame.training.schedule_state import kept_as_it_is, loads_in_its_own_way
from torch_frame.training.schedules import LRWarmupScheduler
from torch_frame.training.several import schedule_label

_logger = logging.getLogger("torch_frame")


class ModelPart:
    """The weights and buffers, under the names of the bare model, without those that are never trained if they are left out."""

    def __init__(self, model: nn.Module, strategy: Strategy, frozen: FrozenParameters, modes: Modes) -> None:
        self._model = model
        self._strategy = strategy
        self._frozen = frozen
        self._modes = modes

    def state_dict(self) -> dict[str, Any]:
        return self._frozen.without(bare_names(self._strategy.model_state(self._model)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._frozen.before_load(state)
        self._modes.before_load()
        model = self._strategy.unwrap(self._model)
        state = own_names(model, state)
        prepare_to_load(model, state)
        self._strategy.load_model_state(self._model, state)

    def differences(self, saved: Mapping[str, Any], unknown: Collection[str]) -> list[str]:
        expected = self._frozen.expected(self._whole())
        model = self._strategy.unwrap(self._model)
        differing = misfits(model, expected, without_empty(model, saved))
        return _first_few(differing, "more tensors differ")

    def lines(self, saved: Mapping[str, Any]) -> list[Line]:
        """What is not in the saved state, of a model whose own `state_dict` leaves parts out."""
        left_out = [name for name in self._frozen.expected(self._whole()) if name not in saved]
        if not left_out:
            return []
        return [(logging.WARNING, f"The checkpoint does not have {some(left_out)}: as the script made them.")]

    def _whole(self) -> dict[str, Any]:
        return bare_names(self._strategy.model_state(self._model))


class AveragePart:
    """EMA: its weights, under the names of the bare model, and its number of updates; None if there is no EMA."""

    def __init__(self, ema: EMA | None, model: nn.Module, frozen: FrozenParameters, progress: Progress) -> None:
        self._ema = ema
        self._model = model
        self._frozen = frozen
        self._progress = progress

    def state_dict(self) -> dict[str, Any] | None:
        if self._ema is None:
            return None
        weights = self._frozen.without(bare_names(self._ema.weights(self._model)))
        wide = bare_names(self._ema.wide_state())
        return {"updates": self._ema.updates, "model": weights, **({"wide": wide} if wide else {})}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self._ema is None:
            return
        self._ema.follow_modes(self._model)
        if state is None:
            # 1.7 kept none: begin anew from the model, restored before, as far into the ramp as the run is.
            self._ema.reset(self._model)
            self._ema.updates = self._progress.num_updates
        else:
            self._ema.updates = int(state["updates"])
            weights = own_names(self._ema.model, state["model"])
            prepare_to_load(self._ema.model, weights)
            self._ema.model.load_state_dict(weights, strict=False)
            self._ema.load_wide_state(own_names(self._ema.model, state.get("wide", {})))

    def differences(self, saved: dict[str, Any] | None, unknown: Collection[str]) -> list[str]:
        if (saved is None) != (self._ema is None):
            return [f"use_ema was {saved is not None}, now it is {self._ema is not None}"]
        if saved is None or self._ema is None:
            return []
        expected = self._frozen.expected(bare_names(self._ema.weights(self._model)))
        differing = misfits(self._ema.model, expected, without_empty(self._ema.model, saved["model"]))
        return _first_few([f"in EMA {line}" for line in differing], "more tensors of EMA differ")


def weights_to_use(model: nn.Module, ema: EMA | None, strategy: Strategy) -> Callable[[], Mapping[str, Any]]:
    """What gives the weights that a file without a state holds: EMA's if there is one."""
    if ema is None:
        return functools.partial(strategy.model_state, model)  # a function would be one more frame above an error in it
    return functools.partial(ema.weights, strategy.unwrap(model))


def as_saved(frozen: FrozenParameters, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under bare names and in plain types, without the parameters that no file holds."""
    made: dict[str, Any] = plain(frozen.without(bare_names(weights)), "the model's state_dict")
    return made


def finite_names(model: nn.Module) -> set[str]:
    """The bare names of what has to be finite in a file: see `trained_tensors`."""
    return {bare_name(name) for name in trained_tensors(model)}


class NamedParts:
    """Several parts of a kind, each under its name."""

    def __init__(self, **parts: Part) -> None:
        self._parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(states[name])

    def differences(self, saved: Mapping[str, Any], unknown: Collection[str]) -> list[str]:
        differences: list[str] = []
        for name, part in self._parts.items():
            if isinstance(part, CheckedPart):
                differences += part.differences(saved[name], unknown)
        return differences

    def refusals(self, saved: Mapping[str, Any]) -> list[str]:
        parts = [(name, part) for name, part in self._parts.items() if isinstance(part, RefusingPart)]
        return [line for name, part in parts for line in part.refusals(saved[name])]

    def keep(self) -> Callable[[], None]:
        kept = [
            part.keep()
            if isinstance(part, UndoablePart)
            else functools.partial(part.load_state_dict, part.state_dict())
            for part in self._parts.values()
        ]

        def put_back() -> None:
            for part in kept:
                part()

        return put_back


class SchedulePart:
    """The learning-rate scheduler and its warm-up; not restored if the script's is built anew."""

    def __init__(self, lr_scheduler: LRWarmupScheduler, settings: Settings) -> None:
        self._lr_scheduler = lr_scheduler
        self._settings = settings

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = encode_most(self._lr_scheduler.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._settings.builds_anew:
            self._lr_scheduler.load_state_dict(decode(state))

    def refusals(self, saved: Any) -> list[str]:
        """What a scheduler with its own way of loading says of a saved state; it is left as it was."""
        scheduler = self._lr_scheduler.scheduler
        if self._settings.builds_anew or not loads_in_its_own_way(scheduler):
            return []
        put_back = self.keep()
        try:
            self.load_state_dict(saved)
        except Exception as error:
            return [f"{type(scheduler).__qualname__}.load_state_dict refuses it: {type(error).__name__}: {error}"]
        finally:
            put_back()
        return []

    def keep(self) -> Callable[[], None]:
        return kept_as_it_is(self._lr_scheduler)


def schedules_part(schedules: Mapping[str, LRWarmupScheduler], settings: AllSettings) -> NamedParts:
    """The schedules under their labels.

    Args:
        schedules: label of the optimizer -> its schedule.
    """
    each = {schedule_label(label): SchedulePart(one, settings.each[label]) for label, one in schedules.items()}
    return NamedParts(**each)


def classes_part(optimizers: Mapping[str, Optimizer], schedules: Mapping[str, LRWarmupScheduler]) -> ClassesPart:
    """The classes of the optimizers and of torch's schedulers."""
    return ClassesPart(**optimizers, **{schedule_label(label): one.scheduler for label, one in schedules.items()})


class ScalerPart:
    """The gradient scaler of fp16, or None."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any] | None:
        return None if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self._scaler is not None and state is not None:
            self._scaler.load_state_dict(state)


class FactPart:
    """A value that is saved and read, and has nothing to restore."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def state_dict(self) -> Any:
        return self._value

    def load_state_dict(self, state: Any) -> None:
        """Nothing to restore."""


class SettingPart(FactPart):
    """A setting that has to be the saved one.

    Args:
        name: in words: "precision".
        value: a plain value.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(value)
        self._name = name

    def differences(self, saved: Any, unknown: Collection[str]) -> list[str]:
        return [] if saved == self._value else [f"{self._name} was {saved}, now it is {self._value}"]


class SeedPart(SettingPart):
    """The seed of the data's order. The saved one is taken over, by the trainer, unless the script names another."""

    def __init__(self, seed: int, is_explicit: bool) -> None:
        super().__init__("seed", seed)
        self._is_explicit = is_explicit

    def differences(self, saved: int | None, unknown: Collection[str]) -> list[str]:
        return super().differences(saved, unknown) if self._is_explicit and saved is not None else []


class LoaderSeedPart(SettingPart):
    """The seed that an InfiniteDataLoader was given, which goes before the trainer's; else None."""

    def __init__(self, loader: Any) -> None:
        seed = getattr(loader, "seed", None)
        super().__init__("the loader's seed", seed if isinstance(seed, int) else None)


class ClassesPart(FactPart):
    """The classes of some objects, by what they are: "optimizer", "lr_scheduler" (which is compared with the settings)."""

    def __init__(self, **objects: Any) -> None:
        super().__init__({what: type(value).__qualname__ for what, value in objects.items()})

    def differences(self, saved: Mapping[str, str], unknown: Collection[str]) -> list[str]:
        return [
            f"the {what} was {saved[what]}, now it is {name}"
            for what, name in self._value.items()
            if not what.startswith("lr_scheduler") and name != saved.get(what, name)
        ]


class LengthPart(FactPart):
    """The length of an epoch's data, as (number, of what); None if it is not known, or the loader was set during the run.

    Args:
        length: as it is now.
        varies: a sampler of the user's gives it, perhaps another one in each epoch, so it is only told.
    """

    def __init__(self, length: tuple[int, str] | None, *, varies: bool) -> None:
        super().__init__(length)
        self._varies = varies

    def differences(self, saved: tuple[int, str] | None, unknown: Collection[str]) -> list[str]:
        now, text = self._value, self._differing(saved)
        if text is None or (self._varies and saved is not None and saved[1] == now[1]):
            return []
        same_kind = saved is not None and saved[1] == now[1]
        return [text if same_kind else f"{text}: another kind of loader, or take_over has changed"]

    def lines(self, saved: tuple[int, str] | None) -> list[Line]:
        """What to say when the run is resumed all the same."""
        text = self._differing(saved)
        return [] if text is None else [(logging.INFO, f"By the sampler, {text}.")]

    def _differing(self, saved: tuple[int, str] | None) -> str | None:
        now = self._value
        if saved is None or now is None or tuple(saved) == tuple(now):
            return None
        return f"an epoch's data was {saved[0]} {saved[1]}, now it is {now[0]} {now[1]}"


ENVIRONMENT = frozenset(
    {
        *("torch", "device", "cpu_capability", "num_threads", "world_size"),
        *("deterministic_algorithms", "cudnn_deterministic", "cudnn_benchmark"),
        *LIBRARIES,
    }
)
"""What a step's last bits depend on beside the script's settings."""


class EnvironmentPart:
    """What a step depends on, beside the state: compared when a run is resumed, for a warning.

    Args:
        device: that trains.
        world_size: number of processes.
        settings: of the run, that change how a step is computed.
    """

    def __init__(self, device: torch.device, world_size: int, **settings: Any) -> None:
        self._device = device
        self._world_size = world_size
        self._settings = settings

    def state_dict(self) -> dict[str, Any]:
        device = self._device
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "world_size": self._world_size,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            **loaded_versions(),
            **self._settings,
        }

    def load_state_dict(self, state: Any) -> None:
        """Nothing to restore."""


# ---------------------------------------------------------------- restored as the last thing before the first batch


class DataPart:
    """Where the data stands beside the position.

    Args:
        source: what is iterated.
        samplers: of the loader.
        loader: the loader that it iterates.
        first_loader: the one that the trainer was made with. Another one was set by a script or a hook, so a run that is resumed
            inside an epoch over it has to set it too.
    """

    def __init__(self, source: Source, samplers: Samplers, loader: Any, first_loader: Any, progress: Progress) -> None:
        self._source = source
        self._samplers = samplers
        self._loader = loader
        self._is_first = loader is first_loader
        self._progress = progress

    def state_dict(self) -> dict[str, Any]:
        samplers = self._samplers.state_dict(self._progress)
        state = self._source.state_dict(self._progress.position)
        if "loader" in state and self._progress.in_iter:
            _logger.warning(
                "A state is saved while a batch is under way, which the loader has counted already: a run that is resumed from "
                "this state leaves the batch out. Save in after_iter."
            )
        return {
            **state,
            **({"samplers": samplers} if samplers else {}),
            **({} if self._is_first else {"loader_was_set": True}),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        state = state or {}
        inside = self._progress.is_epoch_begun and not self._progress.epoch_trained
        if inside and state.get("loader_was_set") and self._is_first:
            raise CheckpointError(
                "The run is resumed inside an epoch over a loader that was set during the run (trainer.data_loader = ...), but "
                "this trainer still has the one that it was made with. Set it again in before_train, or make the trainer with it."
            )
        self._samplers.load_state_dict(state.get("samplers", {}))
        if state:
            self._source.load_state_dict(state, self._progress.position)
        if not self._source.is_ours:
            start_persistent_workers(self._loader)


class LoaderGeneratorsPart:
    """The generators that the user gave the loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        return loader_generator_states(self._loader)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            set_loader_generator_states(self._loader, state)


class RandomPart:
    """The random numbers of every rank, in the order of the ranks."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def state_dict(self) -> list[Any]:
        return self._strategy.gather(rng_state())

    def load_state_dict(self, state: list[Any] | None) -> None:
        if state is not None and self._strategy.rank < len(state):
            set_rng_state(state[self._strategy.rank])


def _first_few(lines: list[str], of: str, most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"{len(lines) - most} {of}"]
