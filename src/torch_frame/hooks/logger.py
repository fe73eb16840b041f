"""LoggerHook: the console, and writers such as TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch_frame.errors import SettingError, TorchFrameError
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.run_lines import RunLines
from torch_frame.scalars import is_whole
from torch_frame.tracking.bar import ProgressBar
from torch_frame.tracking.console import keep_shown
from torch_frame.tracking.guard import GuardedWriter
from torch_frame.tracking.writers import JsonlWriter, Row, RunInfo, TensorBoardWriter, Writer, absolute_folder

_logger = logging.getLogger("torch_frame")
_TIMES = ("data_time", "iter_time", "lr")


class LoggerHook(HookBase):
    """Writes what is in `metric_storage`: a line on the console for each epoch, a bar, and whatever its writers write.

    Runs after all other hooks, every `period` batches and after each epoch, on the main process. What is logged later, in
    `after_train` or before an error, is written when the run ends. A writer that fails is told and ends no run.

    Args:
        period: batches between writes; 0: after each epoch only.
        tb_log_dir: where TensorBoard's files go; None: `tb_logs` in the work dir.
        modes: groups of names, by their first word: with "eval", `eval_acc` is shown with the eval scores and written as
            `eval/eval_acc`; the prefixes of the registered evaluation hooks are groups as well. Names of no group belong to
            "train". None: ["train", "eval"].
        progress_bar: show a bar (a line now and then, if the output is no terminal).
        writers: where values, pictures, texts and histograms go (`torch_frame.tracking.writers.Writer`); None: a
            TensorBoardWriter, which is left out with a line if tensorboard is missing or broken, and a JsonlWriter.
        kwargs: passed to `torch.utils.tensorboard.SummaryWriter`.

    Stores: up to which iteration each name has been written, and what the writers keep (where their files ended): a resumed run
    cuts them there.
    """

    runs_last = True
    takes_media = True
    asks_in_steps = False
    shows_columns = True
    """Evaluations find out before the first step which names they will log."""

    def __init__(
        self,
        period: int = 50,
        tb_log_dir: str | os.PathLike[str] | None = None,
        modes: Sequence[str] | None = None,
        *,
        progress_bar: bool = True,
        writers: Iterable[Writer] | None = None,
        **kwargs: Any,
    ) -> None:
        if not is_whole(period):
            raise SettingError(
                f"period is {period!r}; it has to be a whole number of batches, 0 for once an epoch only."
            )
        modes = ["train", "eval"] if modes is None else list(modes)
        self._period = max(int(period), 0)
        self.modes = modes if "train" in modes else ["train", *modes]
        self.tb_log_dir = None if tb_log_dir is None else absolute_folder(tb_log_dir)
        self.kwargs = kwargs
        self._progress_bar = progress_bar
        self._given = None if writers is None else checked_writers(writers, tb_log_dir, kwargs)
        self._writes = True  # on the main process
        self._last_write: dict[str, int] = {}
        self._saved: dict[str, Any] = {}  # of each writer, by its class name
        self._parameters_given = False
        self._run_id = uuid.uuid4().hex[:12]
        self._until_write = self._period
        self._lines: RunLines | None = None
        self._saved_lines: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._bar: ProgressBar | None = None
        self._next_look = 0.0
        self._shown: dict[str, float] = {}
        self._writers: dict[str, GuardedWriter] = {}  # those that are open
        self._row: tuple[int, Row] = 0, Row({}, 0, {}, {})
        self._groups: list[str] = []

    # ------------------------------------------------------------ stages

    def check(self) -> None:
        others = [hook for hook in self.trainer.hooks if isinstance(hook, LoggerHook) and hook is not self]
        if others:
            raise SettingError(
                f"Two LoggerHooks are registered ({self.class_name} and {others[0].class_name}): each value and line would be "
                "written twice. Leave one of them out; several destinations are its writers: LoggerHook(writers=[...])."
            )

    def before_train(self) -> None:
        self._writes = self.trainer.check_main()
        prefixes = [prefix for hook in self.trainer.hooks for prefix in hook.metric_prefixes()]
        # "val_ood" before "val"
        self._groups = sorted({*self.modes, *prefixes}, key=lambda group: (-len(group), group))
        if self._writes:
            self._error = None
            with self._without_lines_after_an_error():
                self._lines = RunLines(self.trainer, self._saved_lines)
            # inside a resumed epoch, too
            self._until_write = self._batches_until_write(self.trainer.progress.inner_iter)
            self._open_writers()

    def before_epoch(self) -> None:
        self._until_write = self._period
        if self._lines is not None:
            with self._without_lines_after_an_error():
                self._lines.begin_epoch()

    def after_iter(self) -> None:
        if not self._writes:
            return
        if self._bar is None:
            self._bar = self._open_bar()
        self._bar.update()
        self._until_write -= 1
        if self._until_write == 0:
            self._until_write = self._period
            self._write()
            self._write_period()

    def after_epoch(self) -> None:
        if not self._writes:
            return
        keep_shown()
        self._close_bar()
        self._write()
        self._tell_writers("flush")
        self._write_console()

    def after_train(self) -> None:
        if self._writes:
            self._write()

    def on_exception(self, error: BaseException) -> None:
        self._error = error
        self._tell_writers("failed", error)

    def close(self) -> None:
        self._close_bar()
        if self._writers:
            for write in (self.metric_storage.flush, self._write):  # the last values, as far as they can be had
                with contextlib.suppress(Exception):
                    write()
            self._note_states()
            self._tell_writers("close")
        self._writers = {}
        self.trainer.run_media.close()
        if self._lines is not None:
            with self._without_lines_after_an_error():
                self._saved_lines = self._lines.state_dict()  # another train() continues them
                self._lines.end(self._error)
            self._lines = None

    def logged_metrics(self) -> set[str] | None:
        return set() if type(self) is LoggerHook else None

    # ------------------------------------------------------------ where it goes

    def _batches_until_write(self, inner_iter: int) -> int:
        return self._period - inner_iter % self._period if self._period else 0

    def _open_writers(self) -> None:
        trainer = self.trainer
        run = RunInfo(trainer.work_dir, trainer.tb_log_dir, self._run_id, trainer.resumed_iter)
        for key, writer in _keyed(self._made_writers()).items():
            self._writers[key] = GuardedWriter(writer)
            with self._left_out_if_default(key):
                self._writers[key].begin(run, self._saved.get(key))
        for key, guarded in list(self._writers.items()) if run.resumed_iter is not None else ():
            with self._left_out_if_default(key):
                guarded.writer.cut(run.resumed_iter or 0)
        if not self._parameters_given:
            self._tell_writers("parameters", trainer.run_parameters)
            self._parameters_given = True
        trainer.run_media.open(list(self._writers.values()))

    @contextlib.contextmanager
    def _left_out_if_default(self, key: str) -> Iterator[None]:
        """A writer of ours is left out, told, if it cannot begin; the error of one that the script has asked for is raised."""
        try:
            yield
        except (ImportError, OSError) as error:
            if self._given is not None:
                raise
            level = logging.INFO if isinstance(error, ModuleNotFoundError) else logging.WARNING
            _logger.log(level, "%s is left out: %s", self._writers.pop(key).name, error)

    def _made_writers(self) -> list[Writer]:
        if self._given is None:
            return [TensorBoardWriter(self.tb_log_dir, **self.kwargs), JsonlWriter()]
        return self._given

    def _tell_writers(self, method: str, *args: Any) -> None:
        for writer in self._writers.values():
            writer.call(method, *args)

    @property
    def _tb_writer(self) -> Any:
        """torch's SummaryWriter, for scripts of 1.7; None where there is none."""
        found = (getattr(writer.writer, "summary_writer", None) for writer in self._writers.values())
        return next((writer for writer in found if writer is not None), None)

    def write_scores(self) -> None:
        """Called by an evaluation inside an epoch: scores that wait for the next log point are written before newer ones come."""
        if not self._writers:
            return
        prefixes = tuple(f"{prefix}_" for hook in self.trainer.hooks for prefix in hook.metric_prefixes())
        scores = {name: found for name, found in self._new_values().items() if name.startswith(prefixes)}
        if scores:
            self._write_row(max(self._row[0], *(step for step, _ in scores.values())), scores)

    def _write(self) -> None:
        """The values that are new since the last write, to all writers."""
        new = self._new_values()
        if new:
            self._write_row(self.trainer.cur_iter, new)

    def _new_values(self) -> dict[str, tuple[int, float]]:
        """name -> (step that it was logged with, value)."""
        return {
            name: (step, value)
            for name, (step, value) in self.metric_storage.values_maybe_smooth.items()
            if step > self._last_write.get(name, -1)
        }

    def _write_row(self, iteration: int, new: dict[str, tuple[int, float]]) -> None:
        at = {name: step for name, (step, _) in new.items()}
        self._last_write.update(at)
        values = {name: value for name, (_, value) in new.items()}
        self._row = iteration, Row(values, self.trainer.epoch, at, {n: self._group_of(n) for n in new})
        self._write_tensorboard()
        for writer in self._writers.values():
            if not isinstance(writer.writer, TensorBoardWriter):
                writer.call("write", *self._row)

    def _write_tensorboard(self) -> None:
        """Give TensorBoard what is new. 1.7's name: an override is called at each write."""
        for writer in self._writers.values():
            if isinstance(writer.writer, TensorBoardWriter):
                writer.call("write", *self._row)

    def _write_console(self) -> None:
        if self._lines is not None:
            with self._without_lines_after_an_error():
                self._lines.end_epoch(self._names(), is_last=self.is_last_epoch())

    def _write_period(self) -> None:
        """A line for a log period, if the run is counted in steps."""
        if self._lines is not None and self._lines.counts_steps:
            with self._without_lines_after_an_error():
                self._lines.end_period(self._names())

    def _names(self) -> list[str]:
        """All that have been logged, and those that hooks will log or wait for, as far as they say so."""
        hooks = self.trainer.hooks
        expected = [name for hook in hooks for name in hook.expected_names()]
        expected += [name for hook in hooks for _, name in hook.followed_metrics()]
        groups = self._grouped(dict.fromkeys([*self.metric_storage, *expected]))
        return [name for group in groups.values() for name in group]

    @contextlib.contextmanager
    def _without_lines_after_an_error(self) -> Iterator[None]:
        """What is shown ends no run: an odd optimizer, console or folder costs the lines, and is told."""
        try:
            yield
        except TorchFrameError:  # values that are read here and are not finite end the run
            raise
        except Exception as error:
            self._lines = None
            _logger.warning("The run's lines are not shown any more: %s: %s", type(error).__name__, error)

    def _epoch_of_all(self) -> str:
        """Which epoch it is, from 1 on, and of how many, if that is known."""
        of = self.trainer.max_epochs
        return f"{self.trainer.epoch + 1}" if of is None else f"{self.trainer.epoch + 1}/{of}"

    def _by_group(self) -> dict[str, list[str]]:
        """group -> its names that have been logged."""
        return self._grouped(self.metric_storage)

    def _grouped(self, names: Iterable[str]) -> dict[str, list[str]]:
        """group -> its names, `total_loss` first; the training's group before the others."""
        groups: dict[str, list[str]] = {group: [] for group in dict.fromkeys([*self.modes, *self._groups])}
        for name in names:
            if name not in _TIMES:
                groups[self._group_of(name)].append(name)
        return {group: sorted(names, key=lambda name: "total" not in name) for group, names in groups.items()}

    def _group_of(self, name: str) -> str:
        return next((group for group in self._groups if name.startswith(f"{group}_")), "train")

    # ------------------------------------------------------------ the bar

    def _open_bar(self) -> ProgressBar:
        return ProgressBar(
            total=self.trainer.length.batches_in_epoch,
            desc=f"epoch {self._epoch_of_all()}",
            initial=self.trainer.inner_iter,
            values=self._bar_values,
            disable=not self._progress_bar,
            leave=False,
        )

    def _bar_values(self) -> dict[str, float]:
        """The step's latest values; read from the device once a second at most, so that the bar does not slow the steps."""
        now = time.perf_counter()
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._shown = {name: self.metric_storage[name].latest for name in self._by_group()["train"]}
        return self._shown

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        self._note_states()
        return {
            "last_write": dict(self._last_write),
            "run_id": self._run_id,
            "writers": self._saved,
            "parameters_given": self._parameters_given,
            "lines": self._saved_lines if self._lines is None else self._lines.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_write = dict(state_dict["last_write"])
        self._run_id = state_dict.get("run_id", self._run_id)
        self._parameters_given = state_dict.get("parameters_given", False)
        self._saved_lines = dict(state_dict.get("lines", {}))
        files = state_dict.get("files") or {}  # of an older state
        older = {"JsonlWriter": files.get("metrics.jsonl"), "TensorBoardWriter": files.get("tensorboard")}
        self._saved = dict(state_dict.get("writers", older))

    def _note_states(self) -> None:
        """What a checkpoint keeps of the writers: where their files end, say; a resumed run cuts them there."""
        for key, writer in self._writers.items():
            state = writer.call("state_dict")
            if state is not None:
                self._saved[key] = state


def checked_writers(writers: Iterable[Writer], tb_log_dir: Any, kwargs: dict[str, Any]) -> list[Writer]:
    """The writers that LoggerHook was given.

    Raises:
        TypeError: naming what is no writer.
        SettingError: if arguments for TensorBoard stand beside them, which would have no effect.
    """
    if isinstance(writers, type) or not isinstance(writers, Iterable):
        raise TypeError(f"writers is {writers!r}; it has to be a list of writers: writers=[TensorBoardWriter(), ...].")
    given = list(writers)
    for writer in given:
        missing = [name for name in _METHODS if not callable(getattr(writer, name, None))]
        if isinstance(writer, type) or missing:
            what = (
                f"the class {writer.__name__}"
                if isinstance(writer, type)
                else f"{type(writer).__name__} without {missing}"
            )
            raise TypeError(f"writers contains {what}; a writer is an object with {', '.join(_METHODS)}.")
    beside = [*(["tb_log_dir"] if tb_log_dir is not None else []), *kwargs]
    if beside:
        raise SettingError(
            f"LoggerHook got writers and {', '.join(beside)}, which only its own TensorBoard writer would take. Pass it to that "
            "one: writers=[TensorBoardWriter(log_dir, ...), ...]."
        )
    return given


_METHODS = ("write", "image", "text", "histogram", "cut", "close")


def _keyed(writers: Iterable[Writer]) -> dict[str, Writer]:
    """By class name; further ones of a class by `Name#1`, `Name#2`, ..."""
    keyed: dict[str, Writer] = {}
    for writer in writers:
        name = type(writer).__name__
        count = sum(key.partition("#")[0] == name for key in keyed)
        keyed[f"{name}#{count}" if count else name] = writer
    return keyed
