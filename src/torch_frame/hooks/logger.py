"""LoggerHook: the console, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import datetime
import logging
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.tracking.bar import ProgressBar
from torch_frame.tracking.memory import peak_memory_bytes
from torch_frame.tracking.writers import JsonlWriter, TensorBoardWriter

_logger = logging.getLogger("torch_frame")
_TIMES = ("data_time", "iter_time", "lr")
TENSORBOARD_INTERVAL_S = 1.0
"""TensorBoard's writer is a thread; waking it for each row would slow fast steps by 3 %."""


class LoggerHook(HookBase):
    """Writes what is in `metric_storage`: a line on the console for each epoch, TensorBoard, `metrics.jsonl`, a bar.

    Runs after all other hooks, every `period` batches and after each epoch, on the main process. TensorBoard is left out, with
    one line that says so, if the package is not installed; `metrics.jsonl` in the work dir is always written.

    Args:
        period: batches between writes.
        tb_log_dir: where TensorBoard's files go; None: `tb_logs` in the work dir.
        modes: groups of names, by their first word: with "eval", `eval_acc` is shown with the eval scores and written as
            `eval/eval_acc`. Names of no group belong to "train". None: ["train", "eval"].
        progress_bar: show a bar (a line now and then, if the output is no terminal).
        kwargs: passed to `torch.utils.tensorboard.SummaryWriter`.

    Stores: up to which iteration each name has been written, and where the files ended: a resumed run cuts them there.
    """

    runs_last = True

    def __init__(
        self,
        period: int = 50,
        tb_log_dir: str | os.PathLike[str] | None = None,
        modes: Sequence[str] | None = None,
        *,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(period, int) or period < 1:
            raise SettingError(f"period is {period!r}; it has to be a positive number of batches.")
        modes = ["train", "eval"] if modes is None else list(modes)
        self._period = period
        self.modes = modes if "train" in modes else ["train", *modes]
        self.tb_log_dir = tb_log_dir
        self.kwargs = kwargs
        self._progress_bar = progress_bar
        self._writes = True  # on the main process
        self._last_write: dict[str, int] = {}
        self._new: dict[str, tuple[int, float]] = {}  # name -> (step, value), of the write under way
        self._files: dict[str, Any] | None = None  # where they ended; None: not opened yet
        self._run_id = uuid.uuid4().hex[:12]
        self._until_write = period
        self._bar: ProgressBar | None = None
        self._next_look = 0.0
        self._shown: dict[str, float] = {}
        self._jsonl: JsonlWriter | None = None
        self._tensorboard: TensorBoardWriter | None = None
        self._for_tensorboard: list[tuple[int, dict[str, float]]] = []  # (step, tag -> value) still to be handed over
        self._next_hand_over = 0.0

    # ------------------------------------------------------------ stages

    def before_train(self) -> None:
        self._writes = self.trainer.check_main()
        if self._writes:
            self._open_files()

    def _open_files(self) -> None:
        self._train_started = time.perf_counter()
        self._iter_time_before = self._iter_time_sum()
        self._iters_before = self.trainer.progress.iter
        self._until_write = (
            self._period - self.trainer.progress.inner_iter % self._period
        )  # inside a resumed epoch, too
        resumed_at = self.trainer.resumed_iter
        last_row = None if resumed_at is None else resumed_at - 1
        ends = {} if resumed_at is None or self._files is None else self._files
        self._jsonl = JsonlWriter(
            os.path.join(self.trainer.work_dir, "metrics.jsonl"), last_row, keep_until=ends.get("metrics.jsonl")
        )
        try:
            self._tensorboard = TensorBoardWriter(
                self.tb_log_dir or self.trainer.tb_log_dir,
                purge_step=resumed_at,
                run_id=self._run_id,
                keep=ends.get("tensorboard"),
                **self.kwargs,
            )
        except ModuleNotFoundError as error:
            _logger.info("%s metrics.jsonl in the work dir is written all the same.", error)

    def before_epoch(self) -> None:
        self._until_write = self._period

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

    def after_epoch(self) -> None:
        if not self._writes:
            return
        self._close_bar()
        self._write()
        self._hand_over()
        self._write_console()

    def after_train(self) -> None:
        if not self._writes:
            return
        total = time.perf_counter() - self._train_started
        on_hooks = max(total - (self._iter_time_sum() - self._iter_time_before), 0.0)
        _logger.info("Total train time: %s (%s of it beside the training steps)", _duration(total), _duration(on_hooks))

    def close(self) -> None:
        self._close_bar()
        self._note_ends()
        for writer in (self._jsonl, self._tensorboard):
            if writer is not None:
                writer.close()
        self._jsonl = self._tensorboard = None

    def logged_metrics(self) -> set[str] | None:
        return set() if type(self) is LoggerHook else None

    # ------------------------------------------------------------ where it goes

    def _write(self) -> None:
        """The values that are new since the last write, to TensorBoard and metrics.jsonl."""
        self._new = new = {
            name: (step, value)
            for name, (step, value) in self.metric_storage.values_maybe_smooth.items()
            if step > self._last_write.get(name, -1)
        }
        if not new:
            return
        self._write_tensorboard()
        self._last_write.update({name: step for name, (step, _) in new.items()})
        if self._jsonl is not None:
            counters = {"iter": self.trainer.cur_iter, "epoch": self.trainer.epoch, "time": round(time.time(), 3)}
            self._jsonl.write({**counters, **{name: value for name, (_, value) in new.items()}})

    def _write_tensorboard(self) -> None:
        """The values that are new since the last write, to TensorBoard; subclasses of 1.7 override it."""
        if self._tensorboard is not None:
            by_step: dict[int, dict[str, float]] = {}
            for name, (step, value) in self._new.items():
                by_step.setdefault(step, {})[f"{self._mode_of(name)}/{name}"] = value
            self._for_tensorboard += by_step.items()
            if time.perf_counter() >= self._next_hand_over:
                self._hand_over()

    def _hand_over(self) -> None:
        """Give TensorBoard's writer what has gathered."""
        rows, self._for_tensorboard = self._for_tensorboard, []
        self._next_hand_over = time.perf_counter() + TENSORBOARD_INTERVAL_S
        if self._tensorboard is not None:
            for step, values in rows:
                self._tensorboard.write_all(values, step)

    def _write_console(self) -> None:
        storage = self.metric_storage
        parts = [f"Epoch {self.trainer.epoch + 1}/{self.trainer.max_epochs}"]
        if "iter_time" in storage:
            if self.trainer.max_iters is not None:
                parts.append(f"ETA {_duration(self._seconds_left())}")
            parts.append(f"iter_time {storage['iter_time'].avg:.4f}")
        if "data_time" in storage:
            parts.append(f"data_time {storage['data_time'].avg:.4f}")
        if "lr" in storage:
            parts.append(f"lr {storage['lr'].latest:.5g}")
        peak = peak_memory_bytes(self.trainer.device)
        if peak is not None:
            parts.append(f"max_mem {peak / 2**20:.0f}M")
        for names in self._by_mode().values():
            parts += [f"{name} {storage[name].avg:.4g}" for name in names]
        _logger.info("  ".join(parts))

    def _seconds_left(self) -> float:
        """By what an iteration has taken since this process began, evaluation and saves included."""
        elapsed = time.perf_counter() - self._train_started
        iters_left = (self.trainer.max_epochs - self.trainer.epoch - 1) * (self.trainer.epoch_len or 0)
        return elapsed / max(self.trainer.progress.iter - self._iters_before, 1) * iters_left

    def _by_mode(self) -> dict[str, list[str]]:
        """mode -> its names, `total_loss` first."""
        groups: dict[str, list[str]] = {mode: [] for mode in self.modes}
        for name in self.metric_storage:
            if name not in _TIMES:
                groups[self._mode_of(name)].append(name)
        return {mode: sorted(names, key=lambda name: "total" not in name) for mode, names in groups.items()}

    def _mode_of(self, name: str) -> str:
        return next((mode for mode in self.modes if name.startswith(f"{mode}_")), "train")

    # ------------------------------------------------------------ the bar

    def _open_bar(self) -> ProgressBar:
        return ProgressBar(
            total=self.trainer.epoch_len,
            desc=f"epoch {self.trainer.epoch + 1}/{self.trainer.max_epochs}",
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
            self._shown = {name: self.metric_storage[name].latest for name in self._by_mode()["train"]}
        return self._shown

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ------------------------------------------------------------ state

    def _iter_time_sum(self) -> float:
        return self.metric_storage["iter_time"].global_sum if "iter_time" in self.metric_storage else 0.0

    def state_dict(self) -> dict[str, Any]:
        self._note_ends()
        return {"last_write": dict(self._last_write), "run_id": self._run_id, "files": self._files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_write = dict(state_dict["last_write"])
        self._run_id = state_dict.get("run_id", self._run_id)
        self._files = state_dict.get("files")

    def _note_ends(self) -> None:
        """Write everything to the files and remember where they end: a resumed run cuts them there."""
        self._hand_over()
        if self._jsonl is None:
            return
        self._files = {"metrics.jsonl": self._jsonl.mark()}
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._files["tensorboard"] = self._tensorboard.sizes()


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
