"""Where a run's values go: writers behind one seam. LoggerHook gives each of them the same."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torch_frame.tracking.log_files import EventFiles, JsonlFile

HAND_OVER_INTERVAL_S = 1.0
"""TensorBoard's writer is a thread; waking it for each row would slow fast steps by 3 %."""


def absolute_folder(folder: str | os.PathLike[str]) -> str:
    """The folder, whatever the current one is later; an address such as "s3://logs" as it is."""
    text = os.fspath(folder)
    return text if "://" in text else os.path.abspath(text)


class Row(dict[str, float]):
    """What is new at a log point: name -> value.

    Attributes:
        epoch: index of the epoch under way.
        at: name -> the step that the value was logged with: of a training step's values the iteration, of scores their epoch.
        group: name -> "train", "eval" or another first word.
    """

    def __init__(
        self, values: Mapping[str, float], epoch: int, at: Mapping[str, int], group: Mapping[str, str]
    ) -> None:
        super().__init__(values)
        self.epoch = epoch
        self.at = at
        self.group = group


@dataclass(frozen=True)
class RunInfo:
    """What a writer is told of the run before the first value.

    Attributes:
        work_dir, tb_log_dir: the run's folders.
        run_id: a text that a resumed run has too.
        resumed_iter: iterations that were done when the run was resumed; None if it began anew.
    """

    work_dir: str
    tb_log_dir: str
    run_id: str
    resumed_iter: int | None

    @property
    def name(self) -> str:
        """The last part of the run's folder."""
        return os.path.basename(os.path.normpath(self.work_dir))


class Writer(Protocol):
    """Takes a run's values; only rank 0 has one that is open. An error in it is told and ends no run.

    Of a resumed run all writers begin, and then all are cut.

    It may have more methods, which are called if they are there:

    * `begin(run: RunInfo)`, before all else;
    * `parameters(values)`, once a run: its settings, name -> number, text or boolean;
    * `flush()`, when an epoch has ended;
    * `state_dict()` and `load_state_dict(state)`: what a checkpoint keeps of it; restored before `begin`;
    * `failed(error)`, before `close`, if the run ends by an error.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take what is new (a `Row`) at a log point, by iteration `step` of the run."""

    def image(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Take a picture, (H, W, C), C being 1, 3 (RGB) or 4."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text; Markdown is shown where the tool knows it."""

    def histogram(self, step: int, name: str, values: npt.NDArray[np.float64]) -> None:
        """Take finite values, (N,), to show how they are distributed."""

    def cut(self, step: int) -> None:
        """The run continues with iteration `step`: what was written for it and for later ones will come again."""

    def close(self) -> None:
        """The run has ended, whatever happened."""


class JsonlWriter:
    """Rows of values in `metrics.jsonl`, one JSON object a line; no pictures, texts or histograms.

    Args:
        path: of the file, from the current folder; None: in the work dir.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else os.path.abspath(path)
        self._path: str | os.PathLike[str] = ""
        self._file: JsonlFile | None = None
        self._saved: Mapping[str, Any] | None = None

    def begin(self, run: RunInfo) -> None:
        """Open the file, unless it has to be cut first."""
        self._path = os.path.join(run.work_dir, "metrics.jsonl") if self.path is None else self.path
        if run.resumed_iter is None:
            self._file = JsonlFile(self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        counters = {"iter": step, "epoch": getattr(values, "epoch", None), "time": round(time.time(), 3)}
        if self._file is not None:
            self._file.write({**counters, **values})

    def image(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        """Not for this file."""

    def text(self, step: int, name: str, text: str) -> None:
        """Not for this file."""

    def histogram(self, step: int, name: str, values: npt.NDArray[np.float64]) -> None:
        """Not for this file."""

    def cut(self, step: int) -> None:
        """Open the file, which ends where it ended when the state was saved."""
        self._file = JsonlFile(self._path, step - 1, keep_until=self._saved)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> Any:
        """Where the file ends now."""
        return self._saved if self._file is None else self._file.mark()

    def load_state_dict(self, state: Any) -> None:
        self._saved = state


class TensorBoardWriter:
    """TensorBoard's event files: scalars as `<group>/<name>` at the step that they were logged with.

    Args:
        log_dir: their folder, from the current one; None: `tb_logs` in the work dir.
        kwargs: passed to `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        self.log_dir = None if log_dir is None else absolute_folder(log_dir)
        self.kwargs = kwargs
        self._files: EventFiles | None = None
        self._saved: Mapping[str, int] | None = None
        self._waiting: list[tuple[int, dict[str, float]]] = []  # (step, tag -> value) still to be handed over
        self._next_hand_over_s = 0.0

    @property
    def summary_writer(self) -> Any:
        """torch's SummaryWriter, while the run lasts; else None."""
        return None if self._files is None else self._files.writer

    def begin(self, run: RunInfo) -> None:
        """Open a file; those of a resumed run end where they ended when the state was saved.

        Raises:
            ImportError: tensorboard is not installed (`ModuleNotFoundError`), or broken.
        """
        log_dir = run.tb_log_dir if self.log_dir is None else self.log_dir
        keep = None if run.resumed_iter is None else self._saved
        self._files = EventFiles(log_dir, purge_step=run.resumed_iter, run_id=run.run_id, keep=keep, **self.kwargs)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        at, group = getattr(values, "at", {}), getattr(values, "group", {})
        by_step: dict[int, dict[str, float]] = {}
        for name, value in values.items():
            by_step.setdefault(at.get(name, step), {})[f"{group.get(name, 'train')}/{name}"] = value
        self._waiting += by_step.items()
        if time.perf_counter() >= self._next_hand_over_s:
            self.flush()

    def flush(self) -> None:
        """Give torch's writer what has gathered."""
        rows, self._waiting = self._waiting, []
        self._next_hand_over_s = time.perf_counter() + HAND_OVER_INTERVAL_S
        if self._files is not None:
            for step, values in rows:
                self._files.write_all(values, step)

    def parameters(self, values: Mapping[str, Any]) -> None:
        if self._files is not None:
            self._files.write_parameters(values)

    def image(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        if self._files is not None:
            self._files.writer.add_image(name, image, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        if self._files is not None:
            self._files.writer.add_text(name, text, step)

    def histogram(self, step: int, name: str, values: npt.NDArray[np.float64]) -> None:
        if self._files is not None:
            self._files.writer.add_histogram(name, values, step)

    def cut(self, step: int) -> None:
        """Done by `begin`."""

    def close(self) -> None:
        if self._files is not None:
            self.flush()
            self._files.close()
            self._files = None

    def state_dict(self) -> Any:
        """The sizes of the files now, when all is in them."""
        if self._files is not None:
            self.flush()
            self._files.flush()
            self._saved = self._files.sizes()
        return self._saved

    def load_state_dict(self, state: Any) -> None:
        self._saved = state
