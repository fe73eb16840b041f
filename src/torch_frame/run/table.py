"""The parts of a run's state, by name, and what a save takes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from torch_frame.run import parts
from torch_frame.run.optimizers import OptimizersPart
from torch_frame.run.run import Run
from torch_frame.run.saving import Contents
from torch_frame.run.settings import SettingsPart
from torch_frame.run.state import Part
from torch_frame.run.trained import RequiresGradPart
from torch_frame.run.values import hyper_parameters


def table(run: Run) -> dict[str, Part]:
    """What a checkpoint holds, by name, in the order of restoring. A new part is a line here."""
    optimizers, schedules = run.optimization.optimizers, run.optimization.schedules
    return {
        "progress": run.progress,
        "metric_storage": run.metric_storage,
        "hooks": run.hook_caller,
        "frozen": run.frozen,
        "attributes": run.attributes,  # before the model: an object of the user's may refuse its state
        "model": parts.ModelPart(run.model, run.strategy, run.frozen, run.modes),
        "ema": parts.AveragePart(run.ema, run.model, run.frozen, run.progress),
        "requires_grad": RequiresGradPart(run.bare_model, optimizers),
        "optimizers": OptimizersPart(optimizers, run.model, run.strategy),
        "classes": parts.classes_part(optimizers, schedules),
        "lr_schedulers": parts.schedules_part(schedules, run.settings),
        "settings": SettingsPart(run.settings, run.length, run.optimization.interval),
        "grad_scaler": parts.ScalerPart(run.precision.scaler),
        "modes": run.modes,
        "precision": parts.SettingPart("precision", run.precision.name),
        "seed": parts.SeedPart(run.seed, run.seed_is_explicit),
        "loader_seed": parts.LoaderSeedPart(run.feed.loader),
        "data_length": parts.LengthPart(run.feed.length, varies=run.feed.source.length_varies),
        "environment": environment(run),
        **run.feed.parts(),
        "rng": parts.RandomPart(run.strategy),
    }


def environment(run: Run) -> parts.EnvironmentPart:
    """The part of the state with what is told if it is another at a resume."""
    return parts.EnvironmentPart(
        run.device,
        run.strategy.world_size,
        batch_size=run.feed.batch_size,
        lr_scheduler_metric=run.lr_scheduler_metric,
        limit_batches=run.length.limit_batches,
        **run.optimization.settings_of_steps(),
    )


def run_parameters(run: Run) -> dict[str, Any]:
    """The run's settings as writers show them: name -> number, text or boolean."""
    settings = {"max_epochs": run.length.max_epochs, "precision": run.precision.name, "seed": run.seed}
    return hyper_parameters(run.optimization, {**settings, **environment(run).state_dict()}, run.named_params)


def parts_of_hooks(run: Run) -> dict[str, Part]:
    """What `after_epoch` changes."""
    return {
        "metric_storage": run.metric_storage,
        "hooks": run.hook_caller,
        "rng": parts.RandomPart(run.strategy),
    }


def beside_hooks(run: Run) -> list[Any]:
    """What else is in a state, and may be changed by a hook."""
    parts_of_steps = [*run.optimization.optimizers.values(), *run.optimization.schedules.values()]
    ema = [] if run.ema is None else [run.ema.model, run.ema.updates]
    return [run.bare_model, run.feed.generator_states(), *parts_of_steps, *ema, *run.attributes.things()]


def contents(run: Run, own_save: Callable[[str, bool], object] | None, own_model: nn.Module | None = None) -> Contents:
    """What can be saved now.

    Args:
        own_save: a trainer's own `save_checkpoint`, which saves instead; None: it has none.
        own_model: that a trainer of the script's evaluates and uses; files of weights hold it. None: the run's.
    """
    weights = parts.weights_to_use(run.model, run.ema, run.strategy) if own_model is None else own_model.state_dict
    models = [run.bare_model] if own_model is None else [run.bare_model, own_model]
    return Contents(
        run.work_dir.checkpoints,
        run.where,
        (run.work_dir.renew, run.metric_storage.flush, partial(run.frozen.look, values=True)),
        weights,
        partial(parts.as_saved, run.frozen),
        partial(table, run),
        lambda: set().union(*map(parts.finite_names, models)),
        run.optimization.window_open,
        own_save,
    )
