"""What one run is made of, as the rooms around the loop know it: they are given this, and no Trainer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from torch_frame.distributed.comm import is_main
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.progress import Progress
from torch_frame.run.attributes import Attributes
from torch_frame.run.feed import Feed
from torch_frame.run.length import RunLength
from torch_frame.run.modes import Modes
from torch_frame.run.ranks import Ranks
from torch_frame.run.resume import Resumption
from torch_frame.run.saving import Saver
from torch_frame.run.script_settings import AllSettings
from torch_frame.run.session import Stages, log_parameters
from torch_frame.run.skipped import follow_skips
from torch_frame.run.start_epoch import StartEpoch
from torch_frame.run.trained import FrozenParameters
from torch_frame.run.work_dir import WorkDir
from torch_frame.signals.stop import StopSignals
from torch_frame.tracking.storage import MetricStorage
from torch_frame.training.ema import EMA
from torch_frame.training.optimization import Optimization
from torch_frame.training.precision import Precision
from torch_frame.training.schedule_free import ScheduleFree


class Hook(Protocol):
    """What a run asks one of its hooks; `HookBase` has it."""

    @property
    def saves_last_state(self) -> bool: ...

    def check(self) -> None: ...

    def higher_is_better(self, name: str) -> bool | None: ...


class Hooks(Protocol):
    """The hooks of a run, and the part of its state that is theirs; `HookCaller` is it."""

    @property
    def hooks(self) -> Sequence[Hook]: ...

    @property
    def names(self) -> list[str]: ...

    @property
    def stages(self) -> Stages: ...

    def begin(self) -> None: ...

    def check_states(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class Run:
    """The parts of a run, which stay the same objects, and the values that a script may set.

    Attributes:
        model: as the loop calls it: prepared, wrapped.
        seed: of the data's order and augmentation; a script sets `script_seed`.
        seed_is_explicit: the script has given it.
        lr_scheduler_metric: as `Trainer` has it.
        resumed_iter: batches that were trained when this `train()` resumed the run; None if it began anew.
        info_params, named_params: lines that the script wants in the log, and values that it has named.
        in_train: `train()` is under way.
        storage: the run's values by name; `metric_storage` sets another one.
        schedule_free: switches those of the optimizers that are schedule-free.
    """

    model: nn.Module
    device: torch.device
    strategy: Strategy
    ranks: Ranks
    precision: Precision
    progress: Progress
    length: RunLength
    storage: MetricStorage
    hook_caller: Hooks
    optimization: Optimization
    settings: AllSettings
    frozen: FrozenParameters
    attributes: Attributes
    modes: Modes
    feed: Feed
    work_dir: WorkDir
    saver: Saver
    stop_signals: StopSignals
    resumption: Resumption
    seed: int
    seed_is_explicit: bool
    lr_scheduler_metric: str | None
    start: StartEpoch = field(default_factory=StartEpoch)
    resumed_iter: int | None = None
    info_params: list[str] = field(default_factory=list)
    named_params: dict[str, Any] = field(default_factory=dict)
    in_train: bool = False
    schedule_free: ScheduleFree = field(init=False)

    def __post_init__(self) -> None:
        optimization = self.optimization
        self.schedule_free = ScheduleFree(lambda: optimization.optimizers.values())

    @property
    def metric_storage(self) -> MetricStorage:
        """The run's values by name."""
        return self.storage

    @metric_storage.setter
    def metric_storage(self, storage: MetricStorage) -> None:
        """One that a script or a hook sets takes the place of the one before, whose values are not the run's any more."""
        if not isinstance(storage, MetricStorage):
            raise TypeError(f"trainer.metric_storage was set to {storage!r}; it has to be a MetricStorage.")
        storage.take_place_of(self.storage)
        self.storage = storage
        if self.in_train:
            self.follow_skips()

    def follow_skips(self) -> None:
        """From now on the storage knows which batches were trained on."""
        follow_skips(self.storage, self.optimization, has_scaler=self.precision.scaler is not None)

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper of DDP or DataParallel."""
        return self.strategy.unwrap(self.model)

    @property
    def ema(self) -> EMA | None:
        """The average of the weights, if there is one."""
        return self.optimization.ema

    @property
    def model_to_use(self) -> nn.Module:
        """The model to evaluate and to use: EMA's if there is one."""
        if self.ema is None:
            return self.bare_model
        if self.ema.updates == 0:
            self.ema.begin(self.model)  # weights may have been loaded into the model, which is evaluated before the run
        return self.ema.model

    @property
    def window_len(self) -> int:
        """Batches in an update."""
        return self.optimization.window_len

    @property
    def script_seed(self) -> int:
        """The seed, which a script may set before `train()`."""
        return self.seed

    @script_seed.setter
    def script_seed(self, seed: int) -> None:
        if self.in_train or self.progress.is_inside_epoch:
            raise SettingError(
                f"trainer.seed was set inside a run whose data is in the order of seed {self.seed}. Set it before train()."
            )
        self.seed, self.seed_is_explicit = operator.index(seed), True

    @property
    def where(self) -> str:
        """The moment, in words."""
        return f"epoch {self.progress.current_epoch + 1}, iteration {self.progress.current_iter}"

    @property
    def is_main(self) -> bool:
        """This is the process that writes and prints."""
        return self.strategy.rank == 0 and is_main()

    @property
    def start_iter(self) -> int:
        """Batches before the epoch that this `train()` began with."""
        return self.start.epoch * (self.length.epoch_len or 0)

    @property
    def updates_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch; None if the loader has no length."""
        return self.length.updates_per_epoch(self.window_len)

    def log_param(self, lines: Iterable[Any], named: Mapping[str, Any]) -> None:
        """Texts, and names with values, for the log: when training begins, or at once if it has begun."""
        self.named_params |= named
        new = [str(line) for line in lines] + [f"{name}: {value}" for name, value in named.items()]
        self.info_params += new
        if self.in_train:
            log_parameters(new)

    def wants_last_state(self) -> bool:
        """A hook saves the whole state at the run's end, so an early end does, too."""
        return any(hook.saves_last_state for hook in self.hook_caller.hooks)
