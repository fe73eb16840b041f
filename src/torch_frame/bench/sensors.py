"""Clocks, watts and load of an NVIDIA card while something is timed."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

INTERVAL_S = 0.05
BUSY_READINGS = 10


class Reading(NamedTuple):
    """What the card says at one moment."""

    sm_mhz: float
    watts: float


@dataclass
class Readings:
    """The readings of one measurement, in order; none if nothing could be read.

    Attributes:
        readings: taken each `INTERVAL_S`.
    """

    readings: list[Reading] = field(default_factory=list)

    @property
    def watts(self) -> float | None:
        """The median."""
        return statistics.median(reading.watts for reading in self.readings) if self.readings else None

    @property
    def sm_mhz(self) -> float | None:
        """The median."""
        return statistics.median(reading.sm_mhz for reading in self.readings) if self.readings else None

    @property
    def clock_drift(self) -> float | None:
        """The last third's median clock over the first third's; None with less than six readings.

        >>> Readings([Reading(1980, 500)] * 3 + [Reading(990, 500)] * 3).clock_drift
        0.5
        """
        third = len(self.readings) // 3
        if third < 2:
            return None
        first = statistics.median(reading.sm_mhz for reading in self.readings[:third])
        last = statistics.median(reading.sm_mhz for reading in self.readings[-third:])
        return last / first if first else None


class Sensors:
    """Reads an NVIDIA card through nvidia-ml-py (`pip install "torch-frame[bench]"`).

    Attributes:
        read: one reading; None where there is nothing to read.
        driver: version of the driver, or None.
        missing: why nothing is read, in a sentence; empty if something is.
    """

    def __init__(self, device: torch.device) -> None:
        self.read: Callable[[], Reading] | None = None
        self.driver: str | None = None
        self.missing = ""
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.missing = f"Clocks and watts are read on NVIDIA cards only; this is {device.type}."
            return
        try:
            self._open(device)
        except ModuleNotFoundError:
            self.missing = 'Clocks and watts are not read: nvidia-ml-py is missing (pip install "torch-frame[bench]").'
        except Exception as error:  # NVML has an error class for each status
            self.missing = f"Clocks and watts are not read: {error}."

    def _open(self, device: torch.device) -> None:
        import pynvml  # the module of nvidia-ml-py

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = self._handle_of(device)
        self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
        self._reading()
        self.read = self._reading

    def _handle_of(self, device: torch.device) -> Any:
        """By UUID: NVML counts all cards, torch those of CUDA_VISIBLE_DEVICES. Of a single card the number will do."""
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError:
            if self._nvml.nvmlDeviceGetCount() > 1:
                raise
            return self._nvml.nvmlDeviceGetHandleByIndex(0)

    def _reading(self) -> Reading:
        clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        return Reading(float(clock), self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)

    def busy_percent(self) -> float | None:
        """How busy the card is with the work of others: ask while nothing of ours runs. None if it cannot be asked.

        Processes are not counted: one that only holds memory disturbs nothing, and a container hides the others.
        """
        if self.read is None:
            return None
        found = []
        for _ in range(BUSY_READINGS):
            time.sleep(INTERVAL_S)
            try:
                found.append(float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
            except Exception:  # not supported (a MIG slice), or a card that stops answering
                return None
        return statistics.median(found)

    @contextlib.contextmanager
    def watching(self, readings: Readings) -> Iterator[None]:
        """Readings are added while the block runs, by a thread."""
        if self.read is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(self.read, readings, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @staticmethod
    def _watch(read: Callable[[], Reading], readings: Readings, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                readings.readings.append(read())
            except Exception:  # a card that stops answering does not end the bench
                return
            time.sleep(INTERVAL_S)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
