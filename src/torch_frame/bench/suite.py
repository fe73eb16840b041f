"""The bench: a device's figures, each measured for a second or two, all within a minute."""

from __future__ import annotations

import contextlib
import datetime
import threading
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
from torch_frame.bench.verdict import ENOUGH_CALLS, Verdict, judge
from torch_frame.bench.work import Work, copy, forward_pass, fp32_as, is_out_of_memory, matmul, training_step
from torch_frame.tracking.memory import peak_memory_bytes, reset_peak_memory

LIMIT_S = 60.0
KEPT_BACK_S = 8.0
"""For what comes behind the measurements, and for a call that lasts longer than expected."""
TO_PRINT_S, MIN_S = 3.0, 0.5
"""A call that is still under way then is given up; but what takes no time is waited for."""
FOR_COMPILING_S = 25.0
"""Of the limit, on devices for which the network is compiled; what the parts before leave over is for compiling too."""
MIN_FOR_COMPILING_S = 5.0
"""What its process needs to begin."""
TRAINING_KINDS = ("fp32", "tf32", "bf16", "channels-last", "compiled")
"""Each with what the ones before it have, from bf16 on."""
JUDGED = "channels-last"
SHARES = {"fp32": 2, "tf32": 2, "bf16": 2, JUDGED: 4}
"""Of the time that is left; of every other part 1."""
OUT_OF_MEMORY, NO_TIME = "out of memory", "no time was left"
NO_TF32, NOT_COMPILED = "it is a format of CUDA devices", "compiling is timed on CUDA devices only"
LIKE = {"tf32": 1.0, "bf16": 1.0, "channels-last": 1.0, "inference": 1 / 3}
"""A part -> how long its calls last beside those of the last training before it."""


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
ON_CPU = Sizes(1, ((1024, 1024, 1024),), 2**29, 1.0, 3.0, 1, 3)


@dataclass
class Bench:
    """A bench that is under way, and what it has found.

    Args:
        device: what is measured.
        clock: its clock; None: the one that suits it.
        sensors: for clocks and watts; None: those of the device.
        sizes: None: those for the kind of device.
        limit_s: seconds for everything. Each part gets its share of what is left, so that on a slow or busy machine every part is
            measured with fewer calls, rather than the first ones with many and the last ones not at all.
        used_s: seconds of them that are over: Python's start and its imports.

    Attributes:
        timings: part -> its times.
        batch_sizes: part -> images in each call, of the parts with a network.
        left_out: part -> why it has no figure.
        abandoned: whether a call has not come back in time; its thread is still there then.
    """

    device: torch.device
    clock: Clock | None = None
    sensors: Sensors | None = None
    sizes: Sizes | None = None
    limit_s: float = LIMIT_S
    used_s: float = 0.0
    timings: dict[str, Timing] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    watts: float | None = None
    sm_mhz: float | None = None
    peak_bytes: int | None = None
    verdict: Verdict | None = None
    abandoned: bool = False

    def run(self) -> dict[str, Any]:
        """Measure everything; `figures` of what was found."""
        self.started = time.perf_counter() - self.used_s
        self.clock = clock_of(self.device) if self.clock is None else self.clock
        self.sensors = Sensors(self.device) if self.sensors is None else self.sensors
        self.sizes = (ON_CPU if self.device.type == "cpu" else ON_ACCELERATOR) if self.sizes is None else self.sizes
        self.batch_size = self.sizes.batch_size
        self.busy_percent = self.sensors.busy_percent()
        self.readings = Readings()  # of the part that the verdict is about
        with torch.device("meta"):
            network = build("resnet50")
        self.flops_per_image = training_flops(network, (1, 3, 224, 224))
        self._measure_in_time(self.sizes)
        return figures(self)

    def _measure_in_time(self, sizes: Sizes) -> None:
        """Measure in a thread: a call that does not come back (a card hangs, a CPU is very busy) is given up."""
        failed: list[BaseException] = []

        def measure() -> None:
            try:
                self._measure_parts(sizes)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=measure, name="bench", daemon=True)
        thread.start()
        thread.join(max(self.limit_s - TO_PRINT_S - (time.perf_counter() - self.started), MIN_S))
        self.abandoned = thread.is_alive()
        if failed:
            raise failed[0]
        if self.abandoned:
            for part in [*self.to_come, "compiled"]:
                self.left_out.setdefault(part, f"{NO_TIME} of the {self.limit_s:.0f} s")

    def _measure_parts(self, sizes: Sizes) -> None:
        if self.device.type != "cuda":
            self.left_out.update(tf32=NO_TF32, compiled=NOT_COMPILED)
        fp32 = ("fp32", "tf32") if self.device.type == "cuda" else ("fp32",)
        matmuls = [f"matmul {_text(shape)}" for shape in sizes.matmul_shapes]
        self.to_come = [*matmuls, "copy", *fp32, "bf16", JUDGED, "inference"]
        for name, shape in zip(matmuls, sizes.matmul_shapes, strict=True):
            self._measure(name, lambda shape=shape: matmul(shape, self.device))  # type: ignore[misc]
        self._measure("copy", lambda: copy(sizes.copy_bytes, self.device))
        self._measure_trainings()
        self._measure_network(
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
        self._measure_training("bf16", bf16=True)
        self._measure_judged()

    def _measure_training(self, name: str, **kinds: bool) -> None:
        self._measure_network(name, lambda: training_step("resnet50", self.input_size, self.device, **kinds))

    def _measure_network(self, name: str, make: Callable[[], Work]) -> None:
        """Measure it; a batch that does not fit into memory is halved, for this part and the later ones."""
        while True:
            self._measure(name, make)
            if name in self.timings:
                self.batch_sizes[name] = self.batch_size
            if not self.left_out.get(name, "").startswith(OUT_OF_MEMORY) or self.batch_size == 1:
                return
            self.batch_size //= 2

    def _measure_judged(self) -> None:
        reset_peak_memory(self.device)
        self._measure_training(JUDGED, bf16=True, channels_last=True)
        timing = self.timings.get(JUDGED)
        if timing is None:
            return
        self.peak_bytes = peak_memory_bytes(self.device)
        self.watts, self.sm_mhz = self.readings.watts, self.readings.sm_mhz
        if len(timing.seconds) < ENOUGH_CALLS:
            self.left_out["verdict"] = f"it needs {ENOUGH_CALLS} calls, and there was time for {len(timing.seconds)}"
        else:
            self.verdict = judge(timing, self.readings, self.busy_percent)

    def _measure_compiled(self, sizes: Sizes) -> None:
        if self.device.type != "cuda":
            return
        if self.left_s < MIN_FOR_COMPILING_S * self.limit_s / LIMIT_S:
            self.left_out["compiled"] = f"{NO_TIME} of the {self.limit_s:.0f} s"
            return
        with self._reasons("compiled"):
            self.batch_sizes["compiled"], self.timings["compiled"] = time_compiled(
                self.device, self.batch_size, sizes.seconds, limit_s=self.left_s
            )

    # ------------------------------------------------------------ how a part is measured

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.batch_size, 3, 224, 224

    @property
    def left_s(self) -> float:
        """Seconds for what is still to be measured."""
        return self.limit_s - KEPT_BACK_S - (time.perf_counter() - self.started)

    def _share_s(self, name: str) -> float:
        """Seconds for this part, of what is left for all."""
        left = self.left_s - (FOR_COMPILING_S * self.limit_s / LIMIT_S if self.device.type == "cuda" else 0.0)
        return left * SHARES.get(name, 1) / sum(SHARES.get(part, 1) for part in self.to_come)

    def _measure(self, name: str, make: Callable[[], Work]) -> None:
        """Time what `make` makes; what goes wrong, or has no time left, is noted in its place."""
        self.left_out.pop(name, None)
        ends_at = time.perf_counter() + self._share_s(name)
        if ends_at <= time.perf_counter() or self._expected_s(name) > self.left_s:
            self.left_out[name] = f"{NO_TIME} of the {self.limit_s:.0f} s"
            self.to_come.remove(name)
            return
        with self._reasons(name):
            work = make()
            self.timings[name] = self._time(name, work, ends_at - time.perf_counter())
        if name in self.timings or self.batch_size == 1 or not self.left_out[name].startswith(OUT_OF_MEMORY):
            self.to_come.remove(name)
        _free_memory(self.device)

    def _expected_s(self, name: str) -> float:
        """How long a warm-up and one call will last, by what was measured before; 0 if nothing tells."""
        trainings = [timing for part, timing in self.timings.items() if part in TRAINING_KINDS]
        return 2 * LIKE[name] * trainings[-1].median if name in LIKE and trainings else 0.0

    def _time(self, name: str, work: Work, share_s: float) -> Timing:
        assert self.clock is not None
        assert self.sensors is not None
        assert self.sizes is not None
        seconds, min_calls, during = self.sizes.seconds, self.sizes.min_calls, None
        if name == JUDGED:
            self.readings = Readings()
            seconds, min_calls, during = self.sizes.judged_s, ENOUGH_CALLS, self.sensors.watching(self.readings)
        return time_calls(
            work, self.clock, seconds, warm_up=self.sizes.warm_up, min_calls=min_calls, at_most_s=share_s, during=during
        )

    @contextlib.contextmanager
    def _reasons(self, name: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                batch = f" with a batch of {self.batch_size}" if name in TRAINING_KINDS or name == "inference" else ""
                self.left_out[name] = f"{OUT_OF_MEMORY}{batch}"
            else:
                self.left_out[name] = (str(error).strip() or type(error).__name__).splitlines()[0]


def _free_memory(device: torch.device) -> None:
    """What the part before has left goes back to the device: the next one may need it in other sizes."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError):
            torch.accelerator.empty_cache()


# ---------------------------------------------------------------- from times to figures


def figures(bench: Bench) -> dict[str, Any]:
    """What was found, in plain types: rates with their 10th and 90th percentile, and what is left out, with the reason."""
    batch = bench.batch_sizes.get(JUDGED, bench.batch_size)
    flops = batch * bench.flops_per_image
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
        "training_images_s": {name: _images_s(bench, name) for name in TRAINING_KINDS},
        "inference_images_s": _images_s(bench, "inference"),
        "batch_size": batch,
        "batch_sizes": dict(bench.batch_sizes),
        "training_tflop_per_step": round(flops / 1e12, 3),
        "training_tflops": _rate_of(bench, JUDGED, flops / 1e12),
        "peak_mib": None if bench.peak_bytes is None else round(bench.peak_bytes / 2**20),
        "watts": bench.watts,
        "sm_mhz": bench.sm_mhz,
        "sensors": bench.sensors.missing or "read",
        "verdict": None if bench.verdict is None else bench.verdict._asdict(),
        "left_out": dict(bench.left_out),
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
    return {**{name: float(f"{value:.6g}") for name, value in rates.items()}, "calls": len(timing.seconds)}


def _images_s(bench: Bench, name: str) -> dict[str, float] | None:
    return _rate_of(bench, name, bench.batch_sizes.get(name, 0))


def _rate_of(bench: Bench, name: str, amount: float) -> dict[str, float] | None:
    return rate(bench.timings[name], amount) if name in bench.timings else None


def _text(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
