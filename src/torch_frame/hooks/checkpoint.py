"""CheckpointerHook: when a run is saved, and which files are kept."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch_frame.checkpoint.values import like
from torch_frame.errors import SettingError
from torch_frame.hooks import written
from torch_frame.hooks.attributes import Attributes
from torch_frame.hooks.base import HookBase, is_ours
from torch_frame.hooks.best import BEST, assign_best_files, writes_by_itself
from torch_frame.scalars import is_whole
from torch_frame.tracking.history import HistoryBuffer

_logger = logging.getLogger("torch_frame")
_LOWER_IS_BETTER = re.compile(r"(^|_)(loss|error|err|mae|mse|rmse|perplexity|ppl|wer|cer|nll)(_|$)", re.IGNORECASE)


_OWN_KEYS = frozenset(
    {"cur_best", "save_metric", "max_first", "recent_checkpoints", "recent_steps", "best_file", "attributes", "written"}
)


class CheckpointerHook(HookBase):
    """Saves the run every `period` epochs, and after the last one; with `every_n_iters` or `every_n_minutes` inside epochs too.

    Runs after each epoch (and each batch, if it is to save inside epochs), on all ranks. Saves are carried out when all hooks
    of the event have run and no window of gradients is open; training waits for the copy of the state (45 ms for 307 MB), and
    the file is written meanwhile. Weights are copied at once: they are those that were scored. Files in the work dir's
    `checkpoints`:

    * `latest.pth`, `previous.pth`: the full state, to resume from (`save_last`);
    * `best.pth`: the weights (EMA's if EMA is on) of the best epoch by `save_metric`; without `save_metric` of the last one,
      unless another hook with a `save_metric` writes it. If several hooks follow a metric, it is the file of the first that
      evaluates, else of the first; each other one writes `best_<metric>.pth`. One line says which;
    * `step_N.pth`: with `every_n_iters` and `keep_steps`, the weights (EMA's if EMA is on) after N updates;
    * `epoch_N.pth`: the weights of the last `max_to_keep` saved epochs (with `save_metric`: of the last that were best). What an
      overridden `save_checkpoint` writes instead, `epoch_N/` for instance, goes by the same rule.

    Args:
        period: epochs between saves; 0: only after the last epoch.
        max_to_keep: how many `epoch_N.pth` to keep; None writes none.
        save_metric: name in `trainer.metric_storage`: a loss of the training step ("total_loss") or an evaluation's result, of a
            hook that stands before this one. A value of earlier weights does not count.
        max_first: higher is better; False: lower is better.
        save_last: write `latest.pth`.
        every_n_iters: write `latest.pth` every so many batches of the run as well.
        every_n_minutes: write `latest.pth` as well when so much time has passed since the last time.
        keep_steps: write `step_N.pth` as well every `every_n_iters` batches, and keep the last so many; None writes none.

    When to save and what to keep are independent: several CheckpointerHooks with different settings work side by side, and a
    file that two of them ask for at once is written once. A file that two of them keep is removed when neither keeps it.

    Stores: the best value so far, its metric, direction and file, and the files it keeps; of a subclass the attributes that
    have changed since it was registered, if they are of a kind that `torch_frame.checkpoint.values` lists.
    """

    _kept_otherwise = frozenset(
        {
            "trainer",
            "cur_best",
            "best_file",
            "_recent_checkpoints",
            "_recent_steps",
            "_written",
            "_tells_of_nothing_written",
            "_step_is_due",
            "_next_save_s",
            "idle_stages",
            "_as_registered",
            "_resume_notes",
            "_begun_run",
            "_has_told_nan",
            "_has_told_old",
        }
    )
    """Attributes that are not looked at for a change."""

    evaluates: bool = False
    """`save_metric` is a score of the hook's own evaluation."""

    best_file: str | None = None
    """Where the best weights by `save_metric` are; None: not decided yet."""

    _tells_of_nothing_written: bool = True
    _as_registered: Attributes | None = None
    _resume_notes: tuple[str, ...] = ()
    _has_told_nan = _has_told_old = False

    def __init__(
        self,
        period: int = 1,
        max_to_keep: int | None = None,
        save_metric: str | None = None,
        max_first: bool = True,
        save_last: bool = True,
        *,
        every_n_iters: int | None = None,
        every_n_minutes: float | None = None,
        keep_steps: int | None = None,
    ) -> None:
        if not is_whole(period):
            raise SettingError(f"period is {period!r}; it has to be a whole number of epochs, 0 for the last one only.")
        _check_interval("every_n_iters", every_n_iters, Integral, "batches", save_last or keep_steps is not None)
        _check_interval("every_n_minutes", every_n_minutes, Real, "minutes", save_last)
        if max_to_keep is not None and (not is_whole(max_to_keep) or max_to_keep < 1):
            raise SettingError(f"max_to_keep is {max_to_keep!r}; it has to be a positive number of files, or None.")
        self._period = max(int(period), 0)
        self._max_to_keep = None if max_to_keep is None else int(max_to_keep)
        self.save_metric = save_metric
        self.max_first = max_first
        self.save_last = save_last
        self.cur_best = float("-inf") if max_first else float("inf")
        self._recent_checkpoints: list[str] = []
        self._every_n_iters = int(every_n_iters or 0)
        self._keep_steps = _checked_keep_steps(keep_steps, every_n_iters)
        self._recent_steps: list[str] = []
        # file of the two lists -> what the trainer's own save_checkpoint wrote for it
        self._written: dict[str, list[str]] = {}
        self._step_is_due = False
        self._every_n_seconds = math.inf if every_n_minutes is None else 60.0 * every_n_minutes
        self._next_save_s = math.inf
        if every_n_iters is None and every_n_minutes is None and type(self).after_iter is CheckpointerHook.after_iter:
            self.idle_stages = frozenset({"after_iter"})

    @property
    def saves_last_state(self) -> bool:
        return self.save_last

    @property
    def asks_in_steps(self) -> bool:
        return self._every_n_iters > 0  # every_n_minutes fall on no particular batch

    def is_better(self, value: float | HistoryBuffer) -> bool:
        """Whether `value` (of a HistoryBuffer: its mean) beats the best so far; NaN never does."""
        return float(value) > self.cur_best if self.max_first else float(value) < self.cur_best

    def check(self) -> None:
        if self.save_metric is None:
            return
        check_direction(self.trainer.hooks, "save_metric", self.save_metric, self.max_first)
        if self.max_first and _LOWER_IS_BETTER.search(self.save_metric):
            _logger.warning(
                "save_metric is %r and max_first is True: best.pth will be of the epoch in which it is highest. "
                "Where lower is better, pass max_first=False.",
                self.save_metric,
            )

    def followed_metrics(self) -> list[tuple[str, str]]:
        return [] if self.save_metric is None else [(f"{self.class_name}'s save_metric", self.save_metric)]

    def logged_metrics(self) -> set[str] | None:
        return set() if type(self) is CheckpointerHook else None

    def before_train(self) -> None:
        self._next_save_s = time.monotonic() + self._every_n_seconds

    def after_iter(self) -> None:
        is_due = self.every_n_iters(self._every_n_iters)
        self._step_is_due = self._step_is_due or (is_due and self._keep_steps > 0)
        if self._step_is_due and not self.trainer.window_open:
            self._step_is_due = False
            self._save_step()
        if self.save_last and (is_due or time.monotonic() >= self._next_save_s):
            self._save_latest()

    def _save_step(self) -> None:
        """The weights as `step_N.pth`, N updates done, when no window of gradients is open; the last ones are kept."""
        self._recent_steps = self._ask_for(
            f"step_{self.trainer.progress.num_updates}.pth", self._recent_steps, self._keep_steps
        )

    def _save_latest(self) -> None:
        self._next_save_s = time.monotonic() + self._every_n_seconds
        self.trainer.save_at_safe_point("latest.pth", save_single_model=False)

    def after_epoch(self) -> None:
        if self._step_is_due:  # the epoch has ended a window
            self._step_is_due = False
            self._save_step()
        if self.every_n_epochs(self._period) or self.is_last_epoch():
            self.save_model()

    def save_model(self) -> None:
        """Ask for the files that are due; they are written at the next safe point, when all hooks of the epoch have run."""
        if self.save_last:
            self._save_latest()
        if self.save_metric is not None and not self._is_new_best():
            return
        best_file = self._file_of_best()
        if best_file is not None:
            self.trainer.save_at_safe_point(best_file)
        if self._max_to_keep is not None:
            self._save_epoch(self._max_to_keep)

    def _is_new_best(self) -> bool:
        assert self.save_metric is not None
        value = self.trainer.hook_strategy.broadcast(self._metric_value(self.save_metric))  # rank 0's decides for all
        if value is not None and math.isnan(value) and not self._has_told_nan:
            self._has_told_nan = True
            _logger.warning("%s is NaN, which is never the best: no file of weights is written.", self.save_metric)
        if value is None or not self.is_better(value) or self._is_of_other_weights(self.save_metric):
            return False
        self.cur_best = value
        _logger.debug("%s is the best so far: %.6g", self.save_metric, value)
        return True

    def _is_of_other_weights(self, name: str) -> bool:
        """The value is of earlier weights: the hook runs before the one that logs it, or in another rhythm. Told once."""
        is_old = self.trainer.hook_strategy.broadcast(not self._is_of_these_weights(name))
        if is_old and not self._has_told_old:
            self._has_told_old = True
            _logger.warning(
                "%s follows %r, whose value is of earlier weights: these here are not taken for the best. Register %s behind the "
                "hook that logs it, and let it save when that is logged; or give save_metric to the evaluation.",
                self.class_name,
                name,
                self.class_name,
            )
        return bool(is_old)

    def _is_of_these_weights(self, name: str) -> bool:
        evaluated = [hook.evaluated_at(name) for hook in checkpointers(self.trainer.hooks)]
        known = [iter for iter in evaluated if iter is not None]
        if known:
            return self.trainer.progress.iter in known
        return self.metric_storage.is_of_this_epoch(name)

    def evaluated_at(self, name: str) -> int | None:
        """Batches trained when the hook's own evaluation yielded this name the last time; None: not known."""
        return None

    def _metric_value(self, name: str) -> float | None:
        """The metric's value; None as long as nothing has been logged under its name: an evaluation every few epochs."""
        if name in self.metric_storage:
            return self.metric_storage.value(name)
        prefix = getattr(self, "prefix", "")
        if prefix and name.removeprefix(prefix) in self.metric_storage:
            raise SettingError(
                f"save_metric is {name.removeprefix(prefix)!r}, which {self.class_name} looks for as {name!r}: it puts "
                f"its prefix before the name. Log it as {name!r}."
            )
        for hook in self.trainer.hooks:
            full_name = getattr(hook, "prefix", "") + name
            if full_name in self.metric_storage:
                raise SettingError(
                    f"save_metric is {name!r}, which {hook.class_name} logs as {full_name!r}. Pass that name."
                )
        if self.is_last_epoch():
            _logger.warning(
                "%s's save_metric is %r, but nothing has been logged under this name, so there is no best.pth; there are: %s. If "
                "a hook logs it, register that hook before %s.",
                self.class_name,
                name,
                ", ".join(sorted(self.metric_storage)) or "none",
                self.class_name,
            )
        return None

    def _file_of_best(self) -> str | None:
        """The file that the weights are now the best for; without a metric best.pth, if that is no other hook's."""
        hooks = checkpointers(self.trainer.hooks)
        assign_best_files(hooks, CheckpointerHook.save_model)
        if self.save_metric is not None:
            return self.best_file
        return None if any(hook.save_metric and hook.best_file == BEST for hook in hooks) else BEST

    def _save_epoch(self, max_to_keep: int) -> None:
        name = f"epoch_{self.trainer.epoch}.pth"
        self._recent_checkpoints = self._ask_for(name, self._recent_checkpoints, max_to_keep)

    def _ask_for(self, name: str, recent: list[str], most: int) -> list[str]:
        """Ask for weights under a name; of the recent files of this kind `most` are kept, whose names are returned."""
        recent = [kept for kept in recent if kept != name] + [name]
        others = [hook for hook in checkpointers(self.trainer.hooks) if hook is not self]
        kept_by_others = {
            Path(file).name for hook in others for file in (*hook._recent_checkpoints, *hook._recent_steps)
        }
        outdated = [old for old in recent[:-most] if Path(old).name not in kept_by_others]
        folder = self.trainer.ckpt_dir
        outdated = [path for old in outdated for path in written.paths(folder, old, self._written.get(old))]
        watched = written.watch(folder, name) if written.is_overridden(self.trainer) else None
        self.trainer.save_at_safe_point(name, then_remove=outdated)
        self._written = {kept: found for kept, found in self._written.items() if kept not in (name, *recent[:-most])}
        if watched is not None and self.trainer.check_main():
            self._note_written(name, watched())
        return recent[-most:]

    def _note_written(self, name: str, found: list[str]) -> None:
        if found:
            self._written[name] = found
        elif self._tells_of_nothing_written:
            self._tells_of_nothing_written = False
            _logger.warning(
                "%s asked for %s, but save_checkpoint of %s has written nothing of that name (with any suffix) to %s before it "
                "returned. So old ones of its are not removed: remove them there.",
                self.class_name,
                name,
                self.trainer.__class__.__name__,
                self.trainer.ckpt_dir,
            )

    def state_dict(self) -> dict[str, Any]:
        state = {
            "cur_best": self.cur_best,
            "save_metric": self.save_metric,
            "max_first": self.max_first,
            "recent_checkpoints": list(self._recent_checkpoints),
            "best_file": self.best_file,
            **({"recent_steps": list(self._recent_steps)} if self._recent_steps else {}),
            **({"written": {name: list(found) for name, found in self._written.items()}} if self._written else {}),
        }
        changed = {} if self._as_registered is None else self._as_registered.changed(self)
        return {**state, "attributes": changed} if changed else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        older = {name: value for name, value in state_dict.items() if name in vars(self) and name not in _OWN_KEYS}
        attributes = state_dict.get("attributes", {} if is_ours(type(self)) or "save_metric" in state_dict else older)
        for name, value in attributes.items():  # a state of 1.7 has them beside the rest
            setattr(self, name, like(value, getattr(self, name, None)))
        kept = list(state_dict["recent_checkpoints"])  # of a save_model of the script's in whatever way it notes them
        is_ours_to_name = writes_by_itself(self, CheckpointerHook.save_model)
        self._recent_checkpoints = [Path(name).name for name in kept] if is_ours_to_name else kept
        self._recent_steps = list(state_dict.get("recent_steps", ()))
        self._written = {name: list(found) for name, found in state_dict.get("written", {}).items()}
        now = self.save_metric, self.max_first
        was = state_dict.get("save_metric", now[0]), state_dict.get("max_first", now[1])  # older states do not say
        best = float(state_dict["cur_best"])
        if was == now or state_dict.get("best_file") == BEST:
            self.best_file = state_dict.get("best_file")
        if was == now and best != (math.inf if self.max_first else -math.inf):
            self.cur_best = best
        elif was != now and now[0] is not None:
            self._resume_notes = (
                f"{self.class_name}: the best value begins anew, for it belongs to a metric and its direction: it was of "
                f"{_in_words(*was)}, now it is of {_in_words(*now)}.",
            )

    def _look_for_best(self) -> None:
        """A state may have been copied without its weights: a best value without a file would keep out those that are worse."""
        if self.best_file is None or math.isinf(self.cur_best):
            return
        path = Path(self.trainer.ckpt_dir, self.best_file)
        if self.trainer.hook_strategy.broadcast(path.exists()) or not self._writes_by_itself():
            return
        _logger.warning(
            "%s is not there, of which the state says that it is the best by %r (%.6g): the best value begins anew.",
            path,
            self.save_metric,
            self.cur_best,
        )
        self.cur_best = float("-inf") if self.max_first else float("inf")

    def _writes_by_itself(self) -> bool:
        """Neither the hook nor the trainer saves in a way of the user's, under other names perhaps."""
        return not written.is_overridden(self.trainer) and writes_by_itself(self, CheckpointerHook.save_model)

    def _note_attributes(self) -> None:
        """Called when the hook is registered: what a subclass keeps in attributes is compared with this moment."""
        if not is_ours(type(self)):
            self._as_registered = Attributes(self, self._kept_otherwise)

    def _tell(self) -> None:
        """Called when the run begins, with a log: what was found when the state was loaded, and what is not saved."""
        for text in self._resume_notes:
            _logger.warning(text)
        self._resume_notes = ()
        self._look_for_best()
        unseen = [] if self._as_registered is None else self._as_registered.opaque(self)
        if unseen:
            _logger.info(
                "Not in the checkpoints, because they hold more than plain values: %s of %s. If they change, save them in its "
                "state_dict().",
                ", ".join(unseen),
                self.class_name,
            )


def check_direction(hooks: Iterable[HookBase], who: str, metric: str, max_first: bool) -> None:
    """A metric is not followed against what the hook that logs it knows of it.

    Raises:
        SettingError: naming the metric.
    """
    for hook in hooks:
        higher = hook.higher_is_better(metric)
        if higher is not None and higher is not bool(max_first):
            raise SettingError(
                f"{who} is {metric!r}, of which {'higher' if higher else 'lower'} is better, but max_first is {max_first}: the "
                f"worst would be taken for the best. Pass max_first={higher}."
            )


def checkpointers(hooks: Iterable[HookBase]) -> list[CheckpointerHook]:
    """Those of the hooks that save."""
    return [hook for hook in hooks if isinstance(hook, CheckpointerHook)]


def tell_best_files(hooks: Iterable[HookBase]) -> None:
    """Before the first step: which hook writes which file, if several follow a metric."""
    assign_best_files(checkpointers(hooks), CheckpointerHook.save_model)


def _in_words(metric: str | None, max_first: bool) -> str:
    return "no metric" if metric is None else f"{metric!r} ({'higher' if max_first else 'lower'} is better)"


def _checked_keep_steps(keep_steps: Any, every_n_iters: Any) -> int:
    if keep_steps is None:
        return 0
    if not is_whole(keep_steps) or keep_steps < 1:
        raise SettingError(f"keep_steps is {keep_steps!r}; it has to be a positive number of files, or None.")
    if every_n_iters is None:
        raise SettingError(
            f"keep_steps is {keep_steps}, but every_n_iters is None, so no step_N.pth would be written. Pass every_n_iters."
        )
    return int(keep_steps)


def _check_interval(name: str, value: Any, kind: Any, unit: str, save_last: bool) -> None:
    if value is None:
        return
    if not isinstance(value, kind) or isinstance(value, bool) or not float(value) > 0:
        raise SettingError(f"{name} is {value!r}; it has to be a positive number of {unit}, or None.")
    if not save_last:
        raise SettingError(f"{name} is {value!r}, but save_last=False writes no latest.pth. Remove one of the two.")
