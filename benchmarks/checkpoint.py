"""What saving costs: how long one save stops the training thread, and what a save in the background costs the steps meanwhile.

The state is a model and Adam's moments on the CPU, 300 MB in all. Rows take turns, another one first in each round; before each
what the one before has written is synced to the disk. "blocking" is how long the call keeps the thread that trains, "total" the
time until the file is complete, "CPU" what all threads use for it. "with two files of weights" is what an epoch's end asks for:
best.pth and epoch_N.pth, which are copied when they are asked for, and the state. Ours syncs, and it alone makes a digest, reads
the file back and keeps the one before.

Steps are those of a hand-written loop, with one thread, on a small CNN and on an MLP so tiny that every wait shows; beside them
the 300 MB are written, by ours, by dcp.async_save, and by a torch.save in a thread. `raw again` against `raw` is the error bar.
Where other processes want the cores too, a writer takes its share of them from the steps. So Linux is asked how long the thread
that trains was ready to run and had no core, and how many cores others used; "quiet" is over the rounds where these were few.

    python benchmarks/checkpoint.py [--megabytes 300] [--rounds 11] [--output benchmarks/results/checkpoint.json]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from torch_frame import Trainer

try:
    from safetensors.torch import save_file
except ImportError:
    save_file = None

SIDE = 1024
"""Of the big model's square layers: 4 MiB of weights each."""
QUIET_CORES = 0.15
"""A round is quiet where other processes used fewer cores than this."""


class Saving(NamedTuple):
    """A save that has been begun."""

    busy: Callable[[], bool]
    finish: Callable[[], object]


Begin = Callable[[], Saving]


def done() -> Saving:
    return Saving(lambda: False, lambda: None)


# ---------------------------------------------------------------- what is saved, and by whom


def big_model(megabytes: int, device: torch.device | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Weights and Adam's two moments are `megabytes` together; on the CPU if no device is given."""
    num_layers = max(round(megabytes * 1e6 / 3 / (4 * SIDE * SIDE)), 1)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(num_layers))).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


class Savers:
    """The ways to save one and the same model and optimizer below `folder`.

    Args:
        model, optimizer: what is saved.
        folder: where the files go.
        group: a gloo group of its own for `torch.distributed.checkpoint`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str, group: Any) -> None:
        self.model, self.optimizer, self.group = model, optimizer, group
        self.folder = Path(folder)
        self.trainer = self.new_trainer()
        self.turn = 0

    def new_trainer(self) -> Trainer:
        return Trainer(
            self.model, self.optimizer, None, [0], 1, self.folder / "ours", hooks=[], create_new_dir=None, seed=0
        )

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """Flat: safetensors holds nothing else."""
        moments = self.optimizer.state_dict()["state"]
        of_optimizer = {f"optimizer.{i}.{name}": value for i, row in moments.items() for name, value in row.items()}
        return {**{f"model.{name}": value for name, value in self.model.state_dict().items()}, **of_optimizer}

    def ours_async(self, trainer: Trainer | None = None) -> Saving:
        trainer = trainer or self.trainer
        trainer.save_at_safe_point("latest.pth", save_single_model=False)
        trainer.safe_point()
        saver = trainer._saver
        return Saving(lambda: saver.busy, trainer.wait_for_saves)

    def ours_with_weights(self) -> Saving:
        """As at an epoch's end: best.pth and epoch_N.pth are asked for, then the state, at one safe point."""
        for name in ("best.pth", "epoch_0.pth"):
            self.trainer.save_at_safe_point(name)
        return self.ours_async()

    def ours_async_first(self) -> Saving:
        return self.ours_async(self.fresh)

    def ours_sync(self) -> Saving:
        self.trainer.save_checkpoint("latest.pth", save_single_model=False)
        return done()

    def torch_save(self, sync: bool) -> Saving:
        with open(self.folder / "torch.pth", "wb") as file:
            torch.save(self.state(), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        return done()

    def torch_save_in_thread(self) -> Saving:
        """Without a snapshot, so of a state that stands still: only what writing costs."""
        thread = threading.Thread(target=self.torch_save, args=(True,))
        thread.start()
        return Saving(thread.is_alive, thread.join)

    def safetensors(self) -> Saving:
        save_file(self.tensors(), self.folder / "model.safetensors")
        return done()

    def dcp_save(self) -> Saving:
        dcp.save(self.state(), checkpoint_id=self._dcp_folder(), process_group=self.group)
        return done()

    def dcp_async_save(self) -> Saving:
        future: Any = dcp.async_save(self.state(), checkpoint_id=self._dcp_folder(), process_group=self.group)
        return Saving(lambda: not future.done(), future.result)

    def _dcp_folder(self) -> Path:
        """The older one of two, as ours has `previous.pth` and `latest.pth`."""
        self.turn += 1
        return self.folder / f"dcp_{self.turn % 2}"

    def settle(self) -> None:
        """Nothing of the row before is left to be written; a trainer is there whose buffers have yet to be found."""
        self.fresh = self.new_trainer()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps would be there at once (glibc)
        for path in self.folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())


@contextlib.contextmanager
def process_group(folder: str) -> Iterator[Any]:
    """torch.distributed.checkpoint wants a gloo group, and not the default one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield dist.new_group(backend="gloo")
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- blocking and total time


def measure_saves(savers: Savers, rounds: int) -> dict[str, dict[str, float]]:
    rows: dict[str, Begin] = {
        "ours, asynchronous, first save": savers.ours_async_first,
        "ours, asynchronous, buffers reused": savers.ours_async,
        "ours, with two files of weights": savers.ours_with_weights,
        "ours, synchronous": savers.ours_sync,
        "torch.save": functools.partial(savers.torch_save, sync=False),
        "torch.save + fsync": functools.partial(savers.torch_save, sync=True),
        "dcp.save (syncs)": savers.dcp_save,
        "dcp.async_save (syncs)": savers.dcp_async_save,
    }
    if save_file is not None:
        rows["safetensors save_file"] = savers.safetensors
    else:
        print("safetensors is not installed: its row is left out (pip install safetensors)")
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, begin in in_turn(rows, round_):
            savers.settle()
            started, cpu = time.perf_counter(), time.process_time()
            saving = begin()
            blocked = time.perf_counter() - started
            saving.finish()
            if round_:
                seconds[name].append((blocked, time.perf_counter() - started, time.process_time() - cpu))
    columns = ("blocking_ms", "total_ms", "cpu_ms")
    return {
        name: {
            key: value
            for column, values in zip(columns, zip(*of_rounds, strict=True), strict=True)
            for key, value in quartiles(column, [one * 1e3 for one in values]).items()
        }
        for name, of_rounds in seconds.items()
    }


def in_turn(rows: dict[str, Begin], round_: int) -> list[tuple[str, Begin]]:
    first = round_ % len(rows)
    return [*rows.items()][first:] + [*rows.items()][:first]


def quartiles(name: str, values: list[float], digits: int = 1) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        f"{name}_median": round(middle, digits),
        f"{name}_quartile_1": round(low, digits),
        f"{name}_quartile_3": round(high, digits),
    }


# ---------------------------------------------------------------- steps meanwhile


def raw_step(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.randint(0, 10, (len(inputs),))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps() -> dict[str, Callable[[], None]]:
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )
    tiny = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return {"cnn": raw_step(cnn, torch.randn(8, 3, 32, 32)), "tiny mlp": raw_step(tiny, torch.randn(16, 32))}


class Stretch(NamedTuple):
    """Steps in a row, in milliseconds."""

    wall: list[float]  # of each step
    thread_cpu: float  # a step, of the thread that trains
    process_cpu: float  # a step, of all threads: what is written meanwhile too
    no_core: float  # a step, ready to run but without a core; NaN where the system does not tell
    others_cores: float  # used by other processes; NaN where the system does not tell


def without_core_s() -> float:
    """Seconds that this thread has been ready to run and has waited for a core."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return math.nan


def machine_cpu_s() -> float:
    """CPU seconds of all processes and the kernel since the machine came up."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def stretch(step: Callable[[], None], goes_on: Callable[[], bool]) -> Stretch:
    """Steps for as long as something goes on, one at least."""
    wall: list[float] = []
    clocks = (time.thread_time, time.process_time, without_core_s, machine_cpu_s)
    begin = [clock() for clock in clocks]
    before = time.perf_counter()
    while goes_on() or not wall:
        step()
        now = time.perf_counter()
        wall.append((now - before) * 1e3)
        before = now
    thread, process, no_core, machine = (clock() - at for clock, at in zip(clocks, begin, strict=True))
    others = max((machine - process) / sum(wall) * 1e3, 0.0)
    return Stretch(wall, *(seconds / len(wall) * 1e3 for seconds in (thread, process, no_core)), others)


def measure_steps(savers: Savers, step: Callable[[], None], rounds: int) -> dict[str, dict[str, Any]]:
    def nothing() -> Saving:
        until = time.perf_counter() + 0.7  # about as long as a save
        return Saving(lambda: time.perf_counter() < until, lambda: None)

    rows: dict[str, Begin] = {
        "raw": nothing,
        "while ours writes": savers.ours_async,
        "raw again": nothing,
        "while dcp.async_save writes": savers.dcp_async_save,
        "while torch.save + fsync in a thread": savers.torch_save_in_thread,
    }
    found: dict[str, list[Stretch]] = {name: [] for name in rows}
    for round_ in range(rounds + 1):
        for name, begin in in_turn(rows, round_):
            savers.settle()
            saving = begin()
            measured = stretch(step, saving.busy)
            saving.finish()
            if round_:
                found[name].append(measured)
    return {name: summary(stretches, found["raw"]) for name, stretches in found.items()}


def summary(stretches: list[Stretch], base: list[Stretch]) -> dict[str, Any]:
    """Step times over all rounds, and each round's mean step beside its raw one's."""
    wall = [value for one in stretches for value in one.wall]
    ratios, lost, quiet = [], [], []
    for one, raw in zip(stretches, base, strict=True):
        own, other = statistics.mean(one.wall), statistics.mean(raw.wall)
        ratios.append(own / other)
        lost.append((own - other) * len(one.wall))
        quiet.append(max(one.others_cores, raw.others_cores) < QUIET_CORES)
    of_quiet = [i for i, is_quiet in enumerate(quiet) if is_quiet]
    row: dict[str, Any] = {
        "steps": len(wall),
        **quartiles("wall_ms", wall, 3),
        "wall_ms_p95": round(statistics.quantiles(wall, n=20, method="inclusive")[-1], 3),
        **quartiles("mean_ratio", ratios, 3),
        **quartiles("lost_ms_per_save", lost),
        "quiet_rounds": len(of_quiet),
        "quiet_mean_ratio_median": round(statistics.median(ratios[i] for i in of_quiet), 3) if of_quiet else None,
        "quiet_lost_ms_per_save_median": round(statistics.median(lost[i] for i in of_quiet), 1) if of_quiet else None,
    }
    for name in ("thread_cpu", "process_cpu", "no_core"):
        row[f"{name}_ms"] = known(statistics.median(getattr(one, name) for one in stretches))
    row["others_cores"] = known(statistics.median(one.others_cores for one in stretches))
    return row


def known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


# ---------------------------------------------------------------- the report


def print_saves(table: dict[str, dict[str, float]]) -> None:
    print(f"\n{'One save, ms: median (quartiles)':<38} {'blocking':<26} {'total':<26} CPU of all threads")
    for name, row in table.items():
        columns = [f"{spread(row, column, 1):<26}" for column in ("blocking_ms", "total_ms", "cpu_ms")]
        print(f"  {name:<36} {' '.join(columns)}")


def spread(row: dict[str, Any], name: str, digits: int) -> str:
    middle, low, high = (row[f"{name}_{which}"] for which in ("median", "quartile_1", "quartile_3"))
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def print_steps(what: str, table: dict[str, dict[str, Any]]) -> None:
    print(
        f"\nSteps of the {what}: wall ms, median (quartiles) and 95th percentile; a round's mean beside the raw one's;"
    )
    print("ms lost to one save; CPU ms of the thread, of the process; ms without a core; others' cores; quiet rounds")
    for name, row in table.items():
        columns = [
            f"{spread(row, 'wall_ms', 3):<26} {row['wall_ms_p95']:7.3f}  {spread(row, 'mean_ratio', 3):<22}",
            f"{spread(row, 'lost_ms_per_save', 0):<20} {row['thread_cpu_ms']:6.3f} {row['process_cpu_ms']:6.3f}",
            f"{row['no_core_ms']}  {row['others_cores']}",
            f"{row['quiet_rounds']}: {row['quiet_mean_ratio_median']}, {row['quiet_lost_ms_per_save_median']} ms",
        ]
        print(f"  {name:<36} {'  '.join(columns)}")


def setting(options: argparse.Namespace, load_before: float, saved_bytes: int) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": options.rounds,
        "state_megabytes": round(saved_bytes / 1e6),
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the state")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", help="write the files below this folder; default: the system's temporary one")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load_before = os.getloadavg()[0]
    folder = tempfile.mkdtemp(dir=options.folder)
    try:
        with process_group(folder) as group:
            savers = Savers(*big_model(options.megabytes), folder, group)
            figures: dict[str, Any] = {"saves": measure_saves(savers, options.rounds)}
            print_saves(figures["saves"])
            for what, step in steps().items():
                figures[f"steps, {what}"] = measure_steps(savers, step, options.rounds)
                print_steps(what, figures[f"steps, {what}"])
            size = sum(tensor.nbytes for tensor in savers.tensors().values())
    finally:
        shutil.rmtree(folder)
    facts = setting(options, load_before, size)
    print(f"\n{facts['state_megabytes']} MB; load {facts['load_average_before']} .. {facts['load_average_after']}")
    if options.output:
        options.output.write_text(json.dumps({"setting": facts, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
