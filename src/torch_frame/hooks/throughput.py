"""ThroughputHook: where a run's time goes, and how much it gets done."""

from __future__ import annotations

import logging
import math
from numbers import Real

import torch

from torch_frame.bench.cards import find_card
from torch_frame.bench.device import name_of
from torch_frame.data.source_base import batch_size_of
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.tracking.memory import peak_memory_bytes, peak_resident_bytes
from torch_frame.tracking.step_times import Parts, TimeSplit

_logger = logging.getLogger("torch_frame")
_NAMES = ("data", "step", "hooks", "save")


class ThroughputHook(HookBase):
    """Splits the run's time into data, step, hooks and save, and records throughput, peak memory and MFU.

    After each epoch it logs, for the time since the row before: `batches_per_s`, `samples_per_s` (if known), `data_share`,
    `step_share`, `hooks_share` and `save_share` (of 1), `peak_mib` and `mfu` (if FLOPs are known). `LoggerHook` writes them to
    TensorBoard and `metrics.jsonl`. The run's last lines name the time of each part and each hook, a batch. Runs first of all
    hooks, on all ranks; the main process logs the lines.

    It costs 1 us a step on a CPU (docs/gpu.md). The times are the host's: on an accelerator, which works behind the host, the
    device is waited for every `period` batches and after each epoch, so that what it is behind counts as the step's. Evaluations
    count as hooks, and everything counts for the rates: batches/s are those of the run, not of its fastest part.

    Args:
        flops_per_batch: FLOPs of one batch, forward and backward, on one device; for ResNets and such
            `torch_frame.bench.flops.count_flops` counts them. MFU is what the run achieves of `peak_tflops`
            ("model FLOPs utilization", PaLM, arXiv:2204.02311, appendix B).
        peak_tflops: of the device; None: the bf16 specification in `torch_frame.bench.cards`.
        samples_per_batch: None: the loader's batch size, if it has one; a smaller last batch counts as a whole one.
        period: batches between two waits for an accelerator; 50 is LoggerHook's, which reads then anyway.

    Raises:
        SettingError: for numbers that are not positive.

    >>> hook = ThroughputHook(flops_per_batch=8e9)
    """

    runs_first = True
    asks_in_steps = False
    time_split: TimeSplit

    def __init__(
        self,
        flops_per_batch: float | None = None,
        peak_tflops: float | None = None,
        samples_per_batch: int | None = None,
        *,
        period: int = 50,
    ) -> None:
        numbers = {
            "flops_per_batch": flops_per_batch,
            "peak_tflops": peak_tflops,
            "samples_per_batch": samples_per_batch,
        }
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
                raise SettingError(f"{name} is {value!r}; it has to be a positive number, or None.")
        if not isinstance(period, int) or period < 1:
            raise SettingError(f"period is {period!r}; it has to be a whole number of batches, 1 or more.")
        if peak_tflops is not None and flops_per_batch is None:
            raise SettingError("peak_tflops is given, but MFU needs the FLOPs of a batch too: pass flops_per_batch.")
        self.flops_per_batch = flops_per_batch
        self.peak_tflops = peak_tflops
        self.samples_per_batch = samples_per_batch
        self._period = period
        self._lines_due = False
        self._samples: float | None = 0.0  # of the batches in rows; None: not known
        self._peak: float | None = None
        self.time_split = TimeSplit()

    # ------------------------------------------------------------ stages

    def before_train(self) -> None:
        self._on_accelerator = self.trainer.device.type not in ("cpu", "meta")
        self._until_wait = self._period
        self._samples = 0.0
        self._peak = self._known_peak() if self.flops_per_batch is not None else None
        self._iter_at_start = self._iter_at_row = self.trainer.progress.iter
        self.time_split.start()
        self._parts_at_row = Parts(0.0, 0.0, 0.0, 0.0)
        self._lines_due = True

    def after_iter(self) -> None:
        self._until_wait -= 1
        if self._until_wait == 0:
            self._wait()

    def after_epoch(self) -> None:
        self._wait()
        parts, done = self.time_split.parts(), self.trainer.progress.iter
        num_batches = done - self._iter_at_row
        if num_batches > 0:  # none if the run was resumed behind the epoch's last batch
            row = self._row(parts.since(self._parts_at_row), num_batches, self._samples_in(num_batches))
            self.log(self.trainer.cur_iter, smooth=False, **row)
            self._count(num_batches)
        self._parts_at_row, self._iter_at_row = parts, done

    def after_train(self) -> None:
        self._lines_due = False
        num_batches = self.trainer.progress.iter - self._iter_at_start
        self._count(self.trainer.progress.iter - self._iter_at_row)
        self._iter_at_row = self.trainer.progress.iter
        if num_batches > 0 and self.trainer.check_main():
            for line in self._lines(self.time_split.parts(), num_batches):
                _logger.info(line)

    def logged_metrics(self) -> set[str] | None:
        return set(self._row(Parts(1.0, 0.0, 0.0, 0.0), 1, self._samples_in(1)))

    def on_exception(self, error: BaseException) -> None:
        """The lines of a run that fails: what took its time until then."""
        if self._lines_due:
            self.after_train()

    # ------------------------------------------------------------ what is told

    def _samples_in(self, num_batches: int) -> float | None:
        """Samples in so many batches of the loader of this epoch, on all ranks; None: not known."""
        num_ranks = self.trainer.strategy.world_size
        size = self.samples_per_batch or batch_size_of(self.trainer.data_loader, num_ranks)
        return num_batches * float(size) * num_ranks if isinstance(size, Real) else None

    def _count(self, num_batches: int) -> None:
        more = self._samples_in(num_batches)
        self._samples = None if self._samples is None or more is None else self._samples + more

    def _row(self, parts: Parts, num_batches: int, num_samples: float | None) -> dict[str, float]:
        row = self._rates(parts, num_batches, num_samples)
        return row | {f"{name}_share": part / parts.total for name, part in zip(_NAMES, parts, strict=True)}

    def _rates(self, parts: Parts, num_batches: int, num_samples: float | None) -> dict[str, float]:
        rate = num_batches / parts.total
        rates = {"batches_per_s": rate}
        if num_samples is not None:
            rates["samples_per_s"] = num_samples / parts.total
        peak = _peak_bytes(self.trainer.device)
        if peak is not None:
            rates["peak_mib"] = peak / 2**20
        if self._peak is not None and self.flops_per_batch is not None:
            rates["mfu"] = rate * self.flops_per_batch / (self._peak * 1e12)
        return rates

    def _lines(self, parts: Parts, num_batches: int) -> list[str]:
        per_batch = {name: part / num_batches * 1e3 for name, part in zip(_NAMES, parts, strict=True)}
        shown = ", ".join(f"{name} {ms:.2f} ({ms / sum(per_batch.values()):.0%})" for name, ms in per_batch.items())
        hooks = self.time_split.hooks()
        named = ", ".join(f"{name} {seconds / num_batches * 1e3:.2f}" for name, seconds in hooks.items())
        rates = self._rates(parts, num_batches, self._samples)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in rates.items())
        return [
            f"Milliseconds a batch: {sum(per_batch.values()):.2f} = {shown}.",
            f"Of the hooks' time: {named}.",
            f"Most of the time went to: {max(per_batch, key=lambda name: per_batch[name])}. {figures}.",
        ]

    def _known_peak(self) -> float | None:
        """TFLOP/s that MFU is a fraction of."""
        if self.peak_tflops is not None:
            return self.peak_tflops
        name = name_of(self.trainer.device)
        card = find_card(name)
        if card is None or card.bf16_tflops is None:
            _logger.warning(
                "MFU is not recorded: how many TFLOP/s %s can do is not known here. Pass peak_tflops.", name
            )
            return None
        return card.bf16_tflops.value

    def _wait(self) -> None:
        """Let the device catch up; the time is the step's."""
        self._until_wait = self._period
        if self._on_accelerator:
            with self.time_split.stepping():
                torch.accelerator.synchronize(self.trainer.device)


def _peak_bytes(device: torch.device) -> int | None:
    return peak_resident_bytes() if device.type == "cpu" else peak_memory_bytes(device)
