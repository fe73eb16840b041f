"""How a run begins: the saved state, the checks, the folder and the log, the first lines, what is done before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch_frame.run import alike, checks, doubts, first_block
from torch_frame.run.resume import Found, newest
from torch_frame.run.run import Run
from torch_frame.run.session import Session, log_first_lines
from torch_frame.run.table import table
from torch_frame.run.values import check_plateaus
from torch_frame.tracking.console import open_run_log

_SILENT = 5
"""The console's level on ranks that print nothing: rank 0 says it."""


def opened(
    run: Run,
    log_levels: tuple[int, int],
    load_checkpoint: Callable[[str | os.PathLike[str]], object],
    steps: tuple[Callable[..., Any], Callable[..., Any]],
) -> Session:
    """The run stands where it is to begin, in a folder that is its own, and nothing forbids it to begin.

    Args:
        log_levels: of the console and of the file; see `Trainer.train`.
        load_checkpoint: of the trainer, which a script may have overridden.
        steps: the trainer's `train_one_iter`, and the standard one.

    Raises:
        SettingError, CheckpointError, ...: naming what forbids it.
    """
    with run.work_dir.left_on_error():
        asked = run.resumption.asked
        if asked == "auto":
            restore(run, run.ranks.find(lambda: newest(*run.work_dir.to_look_in())))
        elif asked is not None:
            load_checkpoint(asked)
        run.start.apply(run.progress, run.length.epoch_len)
        _check(run, *steps)
        anew = run.resumed_iter is None and run.progress.iter == 0
        told = run.work_dir.enter(run.strategy, anew=anew)
        run.resumption.told += [(logging.WARNING, line) for line in told]
        run.feed.set(run.feed.next_loader, run.seed, run.length.last_epoch)  # the seed may be a checkpoint's by now
        path, console_level = (run.work_dir.log, log_levels[0]) if run.is_main else (None, _SILENT)
        log = open_run_log(path, console_level, log_levels[1])
    around: list[AbstractContextManager[Any]] = [run.work_dir.left_at_end(), log]
    stages = run.hook_caller.stages
    return Session(around, run.stop_signals, run.saver, stages, partial(_report, run), partial(_end, run))


def restore(run: Run, found: Found | None) -> None:
    """Restore a saved state, or begin anew if there is none.

    Raises:
        CheckpointError: if it does not fit; nothing is changed then.
    """
    if found is None:
        run.resumption.begin_anew()
        return
    run.resumption.restore(found, table(run), run.progress)
    run.optimization.reset()  # the batches of a window that was interrupted in this process are trained again
    if found.state["seed"] is not None:
        run.seed = found.state["seed"]
    run.resumed_iter = run.progress.iter
    run.start.stand_at(run.progress)
    run.work_dir.move_to(found.path)
    was = found.state["environment"] or {}
    run.resumption.told += run.feed.count_again(run.progress, was, run.feed.batch_size)


def _check(run: Run, step: Callable[..., Any], standard: Callable[..., Any]) -> None:
    loader, metric, length = run.feed.next_loader, run.lr_scheduler_metric, run.length
    run.ranks.check_hooks(run.hook_caller.names)
    length.check()
    run.ranks.check_lengths(length.epoch_len)
    checks.check_device(run.model, run.device)
    checks.check_loader(loader, length.epochs_left(), length.epoch_len, prefetch=run.feed.prefetch)
    checks.check_schedules(run.optimization, metric, length, is_saved=run.settings.saved_count)
    checks.check_step(run.optimization, step, standard)
    check_plateaus(run.optimization, metric, run.hook_caller.hooks)
    run.schedule_free.check(has_ema=run.ema is not None)
    for hook in run.hook_caller.hooks:
        hook.check()


def begin(run: Run) -> None:
    """Training begins: what another `train()` has left is forgotten, and the first lines are logged."""
    run.in_train = True
    run.saver.remove_unfinished_files(run.work_dir.checkpoints)
    run.start.stand_at(run.progress)
    run.ranks.stops = False
    run.optimization.tell_of_interrupted()
    run.optimization.reset()
    run.schedule_free.train()
    run.follow_skips()
    run.frozen.begin()
    run.metric_storage.allow_repeats()
    if run.ema is not None:
        run.ema.begin(run.model)
    run.feed.tell()
    run.hook_caller.begin()
    log_first_lines(first_block.ordered(_rows(run)), run.resumption.told, run.info_params)
    run.length.log_beginning(run.window_len)


def _rows(run: Run) -> dict[str, str | None]:
    source, optimization = run.feed.source, run.optimization
    optimizers, schedules = optimization.optimizers, optimization.schedules
    clip = optimization.settings_of_steps()["clip_grad_norm"]
    rows = {
        "Work directory": run.work_dir.path,
        "Model": first_block.model_row(run.bare_model),
        "Device": f"{run.device}, precision {run.precision.name}",
        "Batch": first_block.batch_row(run.feed.batch_size, run.window_len, run.strategy.world_size),
        "Steps": run.length.row(run.window_len),
        "EMA": None if run.ema is None else run.ema.row,
        "Frozen, in eval mode": run.modes.row(),
    }
    return rows | first_block.rows(
        {
            "Data": lambda: first_block.data_row(run.feed.next_loader, run.feed.length),
            "Optimizer": lambda: first_block.optimizer_row(optimizers, schedules, clip),
            "Schedule": lambda: first_block.schedule_row(schedules, optimization.interval, run.lr_scheduler_metric),
            "Frozen": lambda: first_block.frozen_row(run.bare_model),
            "Hooks": lambda: first_block.hooks_row(run.hook_caller.hooks),
            "Seed": lambda: first_block.seed_row(
                getattr(source, "seed", run.seed), is_given=run.seed_is_explicit, orders_data=source.is_ours
            ),
        }
    )


def make_ready(run: Run) -> None:
    """`before_train` is over: the last things before the first step.

    Raises:
        SettingError: if what the script and the hooks have made cannot be saved, or cannot be what was meant.
    """
    run.start.apply(run.progress, run.length.epoch_len)
    run.start.in_train = True
    alike.begin_alike(run)
    alike.follow_length(run)
    _look(run)
    run.feed.use_next(run.length.last_epoch)
    run.resumption.restore_last(partial(table, run))


def _look(run: Run) -> None:
    run.hook_caller.check_states()
    held, schedules = run.attributes.parameters(), run.optimization.schedules.values()
    is_new, interval = run.progress.current_epoch == 0, run.optimization.interval
    doubts.tell(run.bare_model, held, schedules, interval, run.length, run.window_len, is_new=is_new)
    run.schedule_free.tell(run.bare_model)
    checks.check_can_be_saved(run.optimization.optimizers, table(run)["lr_schedulers"])
    run.attributes.begin()


def _report(run: Run, error: BaseException) -> str:
    """Add what helps to an error, and tell the other ranks; returns where the run was, in words."""
    checks.note_on_device(error, run.device)
    checks.note_on_ddp(error)
    run.ranks.report(error)
    return run.where


def _end(run: Run) -> None:
    run.in_train = run.start.in_train = False
    run.resumed_iter = None  # another train() continues where this one ended
    run.schedule_free.show()
    run.saver.forget()
    run.feed.source.close()
