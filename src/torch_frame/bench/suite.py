"""The bench: a device's figures, each measured for a second or two, all within a minute."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_frame.bench.compiled import time_compiled
from torch_frame.bench.device import name_of
from torch_frame.bench.flops import training_flops
from torch_frame.bench.models import build
from torch_frame.bench.sensors import Readings, Sensors
from torch_frame.bench.timing import Clock, Timing, clock_of, time_calls
from torch_frame.bench.verdict import Verdict, judge
from torch_frame.bench.work import Work, copy, forward_pass, fp32_as, matmul, training_step
from torch_frame.tracking.memory import peak_memory_bytes, reset_peak_memory

LIMIT_S = 60.0
KEPT_BACK_S = 4.0
"""Of the time for the last part, for what is done around it."""
TRAINING_KINDS = ("fp32", "tf32", "bf16", "channels-last", "compiled")
"""Each with what the ones before it have, from bf16 on."""


@dataclass(frozen=True)
class Sizes:
    """How much work a measurement is made of.

    Attributes:
        batch_size: of ResNet-50; halved until it fits into the device's memory.
        matmul_shapes: (M, N, K); the fastest counts.
        copy_bytes: read, and written.
        seconds: to time each part.
        judged_s: to time the part that the verdict is about.
        warm_up, min_calls: of `time_calls`.
    """

    batch_size: int
    matmul_shapes: tuple[tuple[int, int, int], ...]
    copy_bytes: int
    seconds: float
    judged_s: float
    warm_up: int
    min_calls: int


ON_ACCELERATOR = Sizes(128, ((8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 13312)), 2**30, 1.0, 4.0, 4, 6)
ON_CPU = Sizes(2, ((1024, 1024, 1024),), 2**29, 1.0, 3.0, 1, 3)


@dataclass
class Bench:
    """A bench that is under way, and what it has found.

    Args:
        device: what is measured.
        clock: its clock; None: the one that suits it.
        sensors: for clocks and watts; None: those of the device.
        sizes: None: those for the kind of device.
        limit_s: seconds for everything.

    Attributes:
        timings: part -> its times.
        left_out: part -> why it has no figure.
    """

    device: torch.device
    clock: Clock | None = None
    sensors: Sensors | None = None
    sizes: Sizes | None = None
    limit_s: float = LIMIT_S
    timings: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    watts: float | None = None
    sm_mhz: float | None = None
    peak_bytes: int | None = None
    verdict: Verdict | None = None

    def run(self) -> dict[str, Any]:
        """Measure everything; `figures` of what was found."""
        self.started = time.perf_counter()
        self.clock = clock_of(self.device) if self.clock is None else self.clock
        self.sensors = Sensors(self.device) if self.sensors is None else self.sensors
        self.sizes = (ON_CPU if self.device.type == "cpu" else ON_ACCELERATOR) if self.sizes is None else self.sizes
        self.batch_size = self.sizes.batch_size
        self.busy_percent = self.sensors.busy_percent()
        self.readings = Readings()  # of the part that the verdict is about
        self._measure_parts(self.sizes)
        return figures(self)

    def _measure_parts(self, sizes: Sizes) -> None:
        for shape in sizes.matmul_shapes:
            self._measure(f"matmul {_text(shape)}", lambda shape=shape: matmul(shape, self.device))  # type: ignore[misc]
        self._measure("copy", lambda: copy(sizes.copy_bytes, self.device))
        self._measure_trainings()
        self._measure(
            "inference", lambda: forward_pass("resnet50", self.input_size, self.device, bf16=True, channels_last=True)
        )
        self._measure_compiled(sizes)

    # ------------------------------------------------------------ parts

    def _measure_trainings(self) -> None:
        """fp32, tf32, bf16 and channels-last; the last one is long, and is what the verdict is about."""
        if self.device.type == "cuda":
            with fp32_as("ieee"):
                self._measure_training("fp32")
            with fp32_as("tf32"):
                self._measure_training("tf32")
        else:
            self._measure_training("fp32")
            self.left_out["tf32"] = "it is a format of CUDA devices"
        self._measure_training("bf16", bf16=True)
        self._measure_judged()

    def _measure_training(self, name: str, **kinds: bool) -> None:
        """Measure a training; a batch that does not fit into memory is halved, for this part and the later ones."""
        while True:
            self._measure(name, lambda: training_step("resnet50", self.input_size, self.device, **kinds))
            if not self.left_out.get(name, "").startswith("out of memory") or self.batch_size == 1:
                return
            self.batch_size //= 2

    def _measure_judged(self) -> None:
        reset_peak_memory(self.device)
        self._measure_training("channels-last", bf16=True, channels_last=True)
        self.peak_bytes = peak_memory_bytes(self.device)
        timing = self.timings.get("channels-last")
        if timing is not None:
            self.watts, self.sm_mhz = self.readings.watts, self.readings.sm_mhz
            self.verdict = judge(timing, self.readings, self.busy_percent)

    def _measure_compiled(self, sizes: Sizes) -> None:
        left = self.limit_s - KEPT_BACK_S - (time.perf_counter() - self.started)
        if self.device.type != "cuda":
            self.left_out["compiled"] = "compiling is timed on CUDA devices only"
            return
        with self._reasons("compiled"):
            self.timings["compiled"] = time_compiled(self.device, self.batch_size, sizes.seconds, limit_s=left)

    # ------------------------------------------------------------ how a part is measured

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.batch_size, 3, 224, 224

    def _measure(self, name: str, make: Callable[[], Work]) -> None:
        """Time what `make` makes; what goes wrong, or has no time left, is noted in its place."""
        assert self.clock is not None
        assert self.sensors is not None
        assert self.sizes is not None
        self.left_out.pop(name, None)
        left = self.limit_s - 2 * KEPT_BACK_S - (time.perf_counter() - self.started)
        if left < 0:
            self.left_out[name] = f"the {self.limit_s:.0f} s were over"
            return
        sizes = self.sizes
        settings: dict[str, Any] = {"warm_up": sizes.warm_up, "min_calls": sizes.min_calls, "at_most_s": left}
        seconds = self.sizes.seconds
        if name == "channels-last":
            seconds, self.readings = self.sizes.judged_s, Readings()
            settings["during"] = self.sensors.watching(self.readings)
        with self._reasons(name):
            self.timings[name] = time_calls(make(), self.clock, seconds, **settings)
        _free_memory(self.device)

    @contextlib.contextmanager
    def _reasons(self, name: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            self.left_out[name] = f"out of memory with a batch of {self.batch_size}"
        except (RuntimeError, NotImplementedError) as error:
            self.left_out[name] = str(error).splitlines()[0]


def _free_memory(device: torch.device) -> None:
    """What the part before has left goes back to the device: the next one may need it in other sizes."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError):
            torch.accelerator.empty_cache()


# ---------------------------------------------------------------- from times to figures


def figures(bench: Bench) -> dict[str, Any]:
    """What was found, in plain types: rates with their 10th and 90th percentile, and what is left out, with the reason."""
    batch = bench.batch_size
    flops = training_flops(build("resnet50"), bench.input_size)
    assert bench.sizes is not None
    assert bench.sensors is not None
    matmuls = {
        shape: rate(bench.timings[f"matmul {_text(shape)}"], matmul_flops(shape) / 1e12)
        for shape in bench.sizes.matmul_shapes
        if f"matmul {_text(shape)}" in bench.timings
    }
    best = max(matmuls, key=lambda shape: matmuls[shape]["median"], default=None)
    return {
        "card": name_of(bench.device),
        "device": str(bench.device),
        "driver": bench.sensors.driver,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "matmul_tflops": None if best is None else {**matmuls[best], "shape": _text(best)},
        "memory_gb_s": _rate_of(bench, "copy", 2 * bench.sizes.copy_bytes / 1e9),
        "training_images_s": {name: _rate_of(bench, name, batch) for name in TRAINING_KINDS},
        "inference_images_s": _rate_of(bench, "inference", batch),
        "batch_size": batch,
        "training_tflop_per_step": round(flops / 1e12, 3),
        "training_tflops": _rate_of(bench, "channels-last", flops / 1e12),
        "peak_mib": None if bench.peak_bytes is None else round(bench.peak_bytes / 2**20),
        "watts": bench.watts,
        "sm_mhz": bench.sm_mhz,
        "sensors": bench.sensors.missing or "read",
        "verdict": None if bench.verdict is None else bench.verdict._asdict(),
        "left_out": bench.left_out,
        "seconds": round(time.perf_counter() - bench.started, 1),
    }


def matmul_flops(shape: tuple[int, int, int]) -> int:
    """Of an (M, K) times a (K, N) matrix; a multiply-add counts as two.

    >>> matmul_flops((2, 3, 4))
    48
    """
    m, n, k = shape
    return 2 * m * n * k


def rate(timing: Timing, amount: float) -> dict[str, float]:
    """Amounts a second: the median, and the rates that 10 % and 90 % of the calls stay below.

    Args:
        amount: done by each call.

    >>> rate(Timing([0.5, 0.5, 0.5]), 4)
    {'median': 8.0, 'p10': 8.0, 'p90': 8.0, 'calls': 3}
    """
    slow, fast = timing.percentile(90), timing.percentile(10)
    rates = {"median": amount / timing.median, "p10": amount / slow, "p90": amount / fast}
    return {**{name: round(value, 3) for name, value in rates.items()}, "calls": len(timing.seconds)}


def _rate_of(bench: Bench, name: str, amount: float) -> dict[str, float] | None:
    return rate(bench.timings[name], amount) if name in bench.timings else None


def _text(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
