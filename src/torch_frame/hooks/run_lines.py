"""What LoggerHook shows of a run: the table's lines, the last block, and the files that `torch-frame show` reads."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch_frame._version import __version__
from torch_frame.data.source_base import batch_size_of
from torch_frame.hooks.base import HookTrainer
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.tracking.console import console_encoding, console_width
from torch_frame.tracking.format import shortened, showable, wrapped
from torch_frame.tracking.line import Line
from torch_frame.tracking.memory import peak_memory_bytes
from torch_frame.tracking.record import RunRecord
from torch_frame.tracking.summary import FAILED, FINISHED, RUNNING, STOPPED, command_line, last_block
from torch_frame.tracking.table import Entry, Table

_logger = logging.getLogger("torch_frame")
_NAMES_TOLD = 6


class RunLines:
    """The lines of one `train()`.

    Args:
        trainer: whose run it is.
        saved: what `state_dict` returned when the state was saved that the run continues; empty for a new one.
    """

    def __init__(self, trainer: HookTrainer, saved: Mapping[str, Any]) -> None:
        self._trainer = trainer
        self._followers = [hook for hook in trainer.hooks if isinstance(hook, CheckpointerHook) and hook.save_metric]
        self._cur_best = {id(hook): hook.cur_best for hook in self._followers}
        self._best: dict[str, dict[str, Any]] = dict(saved.get("best", {}))
        self._shown_at: dict[str, int] = dict(saved.get("shown_at", {}))
        self._columns: list[str] = list(saved.get("columns", []))
        self._prefixes = tuple(f"{prefix}_" for hook in trainer.hooks for prefix in hook.metric_prefixes())
        self._samples_a_batch = _samples_a_batch(trainer)
        unit = "batches" if self._samples_a_batch is None else "samples"
        followed = list(dict.fromkeys(str(hook.save_metric) for hook in self._followers))
        word, last = ("Iter", trainer.max_iters) if self.counts_steps else ("Epoch", trainer.max_epochs)
        widest = 0 if last is None else len(_label(word, last, last))
        self._table = Table(followed, unit, widest, console_encoding())
        # another train() continues the lines of the one before
        self._record = RunRecord(trainer.work_dir, trainer.progress.iter or trainer.resumed_iter)
        self._begun_s = self._line_s = time.perf_counter()
        self._iters_before = self._iters_at_line = trainer.progress.iter
        self._times_before = self._times()
        self._steps_s_at_line = self._times_before[0]
        self._last: Entry | None = None
        self._rates_at_begin = _rates_of(trainer.optimizer)
        self._saved_rates: list[float] = list(saved.get("rates", []))
        self._ended_epoch = False
        self._record.begin(self._facts(), saved.get("lines"))

    def state_dict(self) -> dict[str, Any]:
        """The best values, how many lines the table has and in which columns, and of when the values are that have been shown."""
        best = {name: dict(found) for name, found in self._best.items()}
        lines, columns = self._record.num_lines, list(self._columns)
        # an epoch's line is still to come; its schedule has stepped
        rates = self._rates() if self._trainer.progress.epoch_trained else []
        return {
            "best": best,
            "lines": lines,
            "columns": columns,
            "shown_at": dict(self._shown_at),
            "rates": rates,
        }

    # ------------------------------------------------------------ lines

    def begin_epoch(self) -> None:
        """The time between two epochs belongs to neither."""
        if not self.counts_steps:
            self._line_s = time.perf_counter()
        self._samples_a_batch = _samples_a_batch(self._trainer)  # the loader may be another one
        self._rates_at_begin = _rates_of(self._trainer.optimizer)

    def end_epoch(self, names: Sequence[str], *, is_last: bool) -> None:
        """Print an epoch's line: the values that are new since the line before.

        Args:
            names: all that have been logged, or will be as far as that is known; in the order that new columns have.
            is_last: the run ends with this epoch.
        """
        self._ended_epoch = is_last
        trainer, storage = self._trainer, self._trainer.metric_storage
        if self.counts_steps:
            self.end_period(names)
            return
        latest = storage.latest_iters()
        values = {n: storage.value(n) for n in names if n in latest and latest[n] != self._shown_at.get(n)}
        self._shown_at = latest
        self._print(_label("Epoch", trainer.epoch + 1, trainer.max_epochs), values, names)

    @property
    def counts_steps(self) -> bool:
        """The run's length is given in batches: a line each log period, for epochs may be endless."""
        return self._trainer.length.own_max_iters is not None

    def end_period(self, names: Sequence[str]) -> None:
        """Print the line of a log period: of the steps' values the means of their windows, without NaN."""
        storage = self._trainer.metric_storage
        latest = storage.latest_iters()
        values = {n: storage.shown(n) for n in names if n in latest and latest[n] != self._shown_at.get(n)}
        if values:
            self._shown_at = latest
            self._print(_label("Iter", self._trainer.progress.iter, self._trainer.max_iters), values, names)

    def _print(self, label: str, values: Mapping[str, float], names: Sequence[str]) -> None:
        now = time.perf_counter()
        entry = Entry(
            label,
            iter=self._trainer.cur_iter,
            epoch=self._trainer.epoch,
            values=values,
            best=self._new_best(label, values),
            lr=self._rates(),
            per_s=self._speed(),
            time_s=now - self._line_s,
            eta_s=self._seconds_left(now),
            memory_mib=self._memory_mib(),
        )
        self._line_s, self._iters_at_line = now, self._trainer.progress.iter
        self._last = entry
        width = console_width()
        self._note_columns(names)
        lines = self._table.lines(entry, self._columns, width)
        left_out = self._table.left_out()
        if left_out:
            more = f" and {len(left_out) - _NAMES_TOLD} more" if len(left_out) > _NAMES_TOLD else ""
            told = ", ".join(shortened(showable(name), 40) for name in left_out[:_NAMES_TOLD])
            text = f"The screen is too narrow for {told}{more}: see log.txt and metrics.jsonl."
            for part in wrapped(text, width - 1):
                _logger.info("%s", part)
        for line in lines:
            line.log(_logger)
        self._record.add(entry)

    def _note_columns(self, names: Sequence[str]) -> None:
        columns = with_new(self._columns, names)
        if columns != self._columns:
            self._columns = columns
            self._record.note(columns=columns, scores=self._scores())

    def _scores(self) -> list[str]:
        return [name for name in self._columns if name.startswith(self._prefixes)]

    def _new_best(self, label: str, values: Mapping[str, float]) -> list[str]:
        """The names whose values are the best so far, by the hooks that follow them.

        Of several evaluations since the line before, an earlier one may have been the best; its value stands in no line then. A
        hook of the user's may have a best value of its own making.
        """
        found = []
        for hook in self._followers:
            metric = str(hook.save_metric)
            if hook.cur_best not in (None, self._cur_best[id(hook)]) and metric in values:
                self._cur_best[id(hook)] = hook.cur_best
                best = float(hook.cur_best)
                self._best[metric] = {"value": best, "label": label, "file": _file_of(hook)}
                is_once_a_line = getattr(hook, "period_unit", "epoch") == "epoch"
                found += [metric] if is_once_a_line or values[metric] == best else []
                self._record.note(best=self._best)
        return found

    # ------------------------------------------------------------ figures

    def _times(self) -> tuple[float, float]:
        """Seconds of all steps of the run, and of the waits for data among them."""
        storage = self._trainer.metric_storage
        return tuple(  # type: ignore[return-value]
            storage[name].global_sum if name in storage else 0.0 for name in ("iter_time", "data_time")
        )

    def _rates(self) -> list[float]:
        """Of each group, what the last steps were made with; a schedule may have moved on meanwhile."""
        trainer, storage = self._trainer, self._trainer.metric_storage
        if trainer.progress.epoch_trained and trainer.progress.iter == self._iters_before and self._saved_rates:
            return self._saved_rates
        rates = (trainer.progress.epoch_trained and _rates_of_epoch(trainer)) or _rates_of(trainer.optimizer)
        if "lr" not in storage or not rates or rates[0] == storage["lr"].latest:
            return rates
        # it has moved on by an update, or its warm-up has
        return _moved_back(rates, storage["lr"].latest, self._rates_at_begin)

    def _speed(self) -> float | None:
        """Samples or batches a second of the steps since the line before, evaluation left out."""
        steps_s, _ = self._times()
        iters = self._trainer.progress.iter - self._iters_at_line
        seconds, self._steps_s_at_line = steps_s - self._steps_s_at_line, steps_s
        size = self._samples_a_batch if self._table.unit == "samples" else 1
        if size is None or iters <= 0 or seconds <= 0:
            return None
        return iters * size * self._trainer.strategy.world_size / seconds

    def _seconds_left(self, now: float) -> float | None:
        """By what an iteration has taken since this process began, evaluation and saves included."""
        trainer = self._trainer
        done = trainer.progress.iter - self._iters_before
        if trainer.max_iters is None or done <= 0:
            return None
        iters_left = max(trainer.max_iters - trainer.progress.iter, 0)
        return (now - self._begun_s) / done * iters_left

    def _memory_mib(self) -> float | None:
        peak = peak_memory_bytes(self._trainer.device)
        return None if peak is None else peak / 2**20

    # ------------------------------------------------------------ the end

    def end(self, error: BaseException | None) -> None:
        """Print the last block; files are complete by now.

        Args:
            error: that ended the run; None: none has.
        """
        facts = self._facts()
        facts |= {"how": self._how(error), "iter": self._trainer.progress.iter, **self._time_facts()}
        if error is not None:
            facts["error"] = type(error).__name__
        block = last_block(self._trainer.work_dir, facts, self._last, console_width())
        for number, text in enumerate(block):
            (Line.title(text) if number == 0 else Line(text)).log(_logger)
        self._record.end(**facts)

    def _how(self, error: BaseException | None) -> str:
        if error is not None:
            return FAILED
        nothing_was_left = self._trainer.progress.iter == self._iters_before and self._trainer.length.is_over()
        return FINISHED if self._ended_epoch or nothing_was_left else STOPPED

    def _time_facts(self) -> dict[str, Any]:
        total = time.perf_counter() - self._begun_s
        steps, data = (now - before for now, before in zip(self._times(), self._times_before, strict=True))
        beside = max(total - steps, 0.0)
        split = {"steps": max(steps - data, 0.0), "data": data, "evaluation, hooks, saves": beside}
        return {"seconds": self._record.seconds_before + total, "split": split}

    def _facts(self) -> dict[str, Any]:
        trainer = self._trainer
        followed = {
            str(hook.save_metric): {"max_first": hook.max_first, "file": _file_of(hook)} for hook in self._followers
        }
        return {
            "torch_frame": __version__,
            "how": RUNNING,
            "max_epochs": trainer.max_epochs,
            "unit": self._table.unit,
            "followed": followed,
            "best": self._best,
            "columns": self._columns,
            "scores": self._scores(),
            "command": command_line() if trainer.strategy.world_size == 1 else None,
            "checkpoints": os.path.relpath(trainer.ckpt_dir, trainer.work_dir),
            "settings": trainer.run_parameters,
        }


def with_new(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns, which stay in their order, and each new name behind the one that stands before it in `names`.

    >>> with_new(["total_loss", "val_acc"], ["total_loss", "box_loss", "test_acc", "val_acc"])
    ['total_loss', 'box_loss', 'test_acc', 'val_acc']
    """
    found, place = list(columns), 0
    for name in names:
        if name not in found:
            found.insert(place, name)
        place = found.index(name) + 1
    return found


def _label(word: str, number: int, of: int | None) -> str:
    return f"{word} {number}" if of is None else f"{word} {number}/{of}"


def _rates_of(optimizer: Any) -> list[float]:
    """Of all groups of all optimizers there are."""
    several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    each = several if isinstance(several, list | tuple) else [several]
    return [float(group["lr"]) for one in each for group in one.param_groups if "lr" in group]


def _rates_of_epoch(trainer: HookTrainer) -> list[float]:
    """As they were when the epoch's batches were trained, before its schedules stepped; [] if one does not say."""
    given = trainer.lr_scheduler
    several = list(given.values()) if isinstance(given, Mapping) else given
    each = several if isinstance(several, list | tuple) else [several]
    of_each: list[list[float] | None] = [getattr(one, "epoch_lrs", None) for one in each]
    return [] if None in of_each else [rate for rates in of_each for rate in rates or ()]


def _moved_back(rates: Sequence[float], first: float, begin: Sequence[float]) -> list[float]:
    """The rates before the last update, of which the first group's is known.

    If all groups are in the proportions in which the epoch began, one factor moves them; else each group moves in its own way,
    and the others' rates of now are shown, which are one update on.

    Args:
        rates: of all groups, now.
        first: of the first group, then.
        begin: of all groups, when the epoch began.

    >>> _moved_back([0.5, 0.05], 0.25, [1.0, 0.1]), _moved_back([0.5, 0.1], 0.25, [1.0, 0.1])
    ([0.25, 0.025], [0.25, 0.1])
    """
    is_known = len(begin) == len(rates) and begin[0] != 0
    if is_known and all(math.isclose(now * begin[0], was * rates[0]) for now, was in zip(rates, begin, strict=True)):
        return [first * was / begin[0] for was in begin]
    return [first, *rates[1:]]


def _samples_a_batch(trainer: HookTrainer) -> int | None:
    size = batch_size_of(trainer.data_loader, trainer.strategy.world_size)
    return size if isinstance(size, int) and size > 0 else None


def _file_of(hook: CheckpointerHook) -> str:
    return getattr(hook, "best_file", None) or "best.pth"
